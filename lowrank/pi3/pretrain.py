"""Trains the small π³ of the embedded report: `python -m lowrank.pi3.pretrain [--folder FOLDER]`.

About an hour on one core. A call that follows a killed one goes on where that one saved last; the files in the folder are
replaced when the training has ended.
"""

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file

from lowrank.io.provenance import environment
from lowrank.pi3.checkpoint import ABOUT, PRETRAINED, WEIGHTS
from lowrank.pi3.small import RECIPE, SMALL, fresh_small_pi3, scene_loss, training_batches
from lowrank.training.loop import STATES, Recipe, fit, recipe_options

BLOCK = 100  # steps that the recorded losses are means over


def pretrain(folder: Path, recipe: Recipe) -> None:
    """Writes `model.safetensors` (half precision) and `run.json` into a folder."""
    origin = environment()  # before there are files of this training
    model, start, checkpoint = fresh_small_pi3(recipe.seed), time.perf_counter(), folder / "checkpoint"
    resumed = max((int(path.name.removeprefix("step-")) for path in checkpoint.glob(STATES)), default=0)
    history = fit(
        model,
        lambda done: training_batches(done, recipe),
        recipe,
        scene_loss,
        checkpoint=checkpoint,
        checkpoint_every=250,
    )
    losses = [row["loss"] for row in history]
    about = {
        "config": asdict(SMALL),
        "recipe": recipe_options(recipe),
        "loss": [
            round(sum(part) / len(part), 4) for part in (losses[i : i + BLOCK] for i in range(0, len(losses), BLOCK))
        ],
        "resumed_at_step": resumed,
        "wall_s": round(time.perf_counter() - start, 1),
        **origin,
    }
    save_file({name: value.half() for name, value in model.state_dict().items()}, folder / WEIGHTS)
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf8")
    shutil.rmtree(checkpoint)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lowrank.pi3.pretrain", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=PRETRAINED, help="where to write; default: the package's own")
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    pretrain(given.folder, RECIPE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
