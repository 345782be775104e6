"""How the small π³ of the embedded report is trained; `lowrank.pi3.pretrain` is the command."""

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file

from lowrank.io.files import writing
from lowrank.io.provenance import environment
from lowrank.pi3.checkpoint import METADATA_FILE, WEIGHTS_FILE
from lowrank.pi3.small import SMALL_CONFIG, build_small_pi3, scene_batches, scene_loss
from lowrank.training.loop import Recipe, fit, recipe_options
from lowrank.training.saved_states import count_saved_steps

BLOCK = 100  # steps that each recorded loss is the mean of


def pretrain(folder: Path, recipe: Recipe) -> None:
    """Train the small π³ on rendered scenes, and write `model.safetensors` in half precision and `run.json`.

    **Arguments**

    - `folder`: receives the files, and the saved states during the training.
    - `recipe`: how to train.
    """
    origin = environment()  # before there are files of this training
    model, start, checkpoint = build_small_pi3(recipe.seed), time.perf_counter(), folder / "checkpoint"
    resumed = count_saved_steps(checkpoint)
    history = fit(model, lambda done: scene_batches(done, recipe), recipe, scene_loss, checkpoint=checkpoint)
    losses = [row["loss"] for row in history]
    blocks = (losses[i : i + BLOCK] for i in range(0, len(losses), BLOCK))
    metadata = {
        "config": asdict(SMALL_CONFIG),
        "recipe": recipe_options(recipe),
        "loss": [round(sum(block) / len(block), 4) for block in blocks],
        "resumed_at_step": resumed,
        "wall_s": round(time.perf_counter() - start, 1),
        **origin,
    }
    with writing(folder / WEIGHTS_FILE) as path:
        save_file({name: value.half() for name, value in model.state_dict().items()}, path)
    with writing(folder / METADATA_FILE) as path:
        path.write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf8")
    shutil.rmtree(checkpoint)
