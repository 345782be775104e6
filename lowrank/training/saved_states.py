"""Save a training whole or not at all, find the last saved state, and load it without running code from its files."""

import json
import pickle
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from lowrank.io.checks import require
from lowrank.io.schemas import read_json

FOLDERS = "step-" + "[0-9]" * 9  # names of saved states; a name appears when its state is whole


@runtime_checkable
class Stateful(Protocol):
    """Describe an object that is saved with a training and goes on with it."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values and tensors."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from a state that `state_dict` returned."""
        ...


def find_state(checkpoint: Path | None) -> Path | None:
    """Return the folder of the last state in `checkpoint`, None if there is none."""
    return max(checkpoint.glob(FOLDERS), default=None) if checkpoint else None


def count_saved_steps(checkpoint: Path | None) -> int:
    """Return the steps done in the last state in `checkpoint`, 0 if there is none."""
    folder = find_state(checkpoint)
    return int(folder.name.removeprefix("step-")) if folder else 0


def load_objects(folder: Path | None, objects: Sequence[Stateful]) -> None:
    """Load the objects that were saved beside a training.

    **Arguments**

    - `folder`: the saved state, from `find_state`. With None nothing is loaded.
    - `objects`: in the order in which they were saved.

    **Raises**

    - `ValueError`: a damaged state, or one of another training.
    """
    if folder and objects:
        with _reading(folder):
            states = torch.load(folder / "states.pt", weights_only=True)
            for item, values in zip(objects, states, strict=True):
                item.load_state_dict(values)


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Turn what goes wrong with the files of a state into one clear error."""
    try:
        yield
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise ValueError(
            f"`checkpoint` must hold a whole state of this training, got {str(folder)!r}: {str(error).splitlines()[0]}"
        ) from error


def load_training(folder: Path | None, accelerator: Accelerator) -> list[dict[str, int | float]]:
    """Load weights, optimiser and random states of a training.

    **Arguments**

    - `folder`: the saved state, from `find_state`. With None nothing is loaded.
    - `accelerator`: has prepared model and optimiser.

    **Returns** the history: one row per step done.

    **Raises**

    - `ValueError`: the state holds objects that accelerate would unpickle; a damaged state, or one of another training.
    """
    if folder is None:
        return []
    pickled = next(folder.glob("custom_checkpoint_*.pkl"), None)  # the only files that accelerate loads without limits
    rule = "hold weights and plain values only: what another program wrote can be deleted"
    require(pickled is None, "checkpoint", rule, str(pickled))
    with _reading(folder):
        accelerator.load_state(str(folder))
    history = read_json(folder / "history.json", "checkpoint", list[dict[str, float]])
    accelerator.wait_for_everyone()  # with no step left, the first could return and its caller delete the state
    return history


def save_training(
    checkpoint: Path,
    accelerator: Accelerator,
    history: list[dict[str, int | float]],
    objects: Sequence[Stateful],
) -> None:
    """Save a new state beside the old one, then rename it: a kill leaves the old or the new, never a mixture.

    **Arguments**

    - `checkpoint`: the folder of saved states.
    - `accelerator`: has prepared model and optimiser.
    - `history`: one row per step done.
    - `objects`: saved beside the training, for `load_objects`.
    """
    partial = checkpoint / "partial"  # not `writing`: every process writes into this folder
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()  # each process writes its own random state
    if accelerator.is_main_process:
        (partial / "history.json").write_text(json.dumps(history))
        torch.save([item.state_dict() for item in objects], partial / "states.pt")
        older = list(checkpoint.glob(FOLDERS))
        partial.rename(checkpoint / f"step-{len(history):09d}")
        for folder in older:
            shutil.rmtree(folder)
    accelerator.wait_for_everyone()
