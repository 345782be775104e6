"""Training the factors of a compressed model: one factor after the other by LoRA, or all of them together.

Rank and number of parameters stay exactly what they were: a LoRA update of a factor is merged into the factor.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.nn.batches import Batch, labels, logits
from lowrank.nn.low_rank import FACTORED
from lowrank.training.loop import Recipe, fit

ORDERS = {"left-right": ("left", "right"), "right-left": ("right", "left")}


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a transformers model computes from the labels of its batch; the cross-entropy of other classifiers."""
    if isinstance(batch, dict) and "labels" in batch:
        outputs: Any = model(**batch)
        if getattr(outputs, "loss", None) is not None:
            return outputs.loss
    return nn.functional.cross_entropy(logits(model, batch), labels(batch))


def factor_names(model: nn.Module, factor: str) -> list[str]:
    """The dotted names of one factor, 'left' or 'right', of every factored layer.

    **Raises:** `ValueError`: the model has no factored layer.
    """
    found = [
        f"{name}.{factor}" for name, module in model.named_modules() if isinstance(module, tuple(FACTORED.values()))
    ]
    if not found:
        raise ValueError(
            "`model` must have factored layers, as lowrank.compression.compress.compress makes them, got none."
        )
    return found


def refine_factors(
    model: nn.Module,
    batches: Iterable[Batch],
    order: str = "left-right",
    *,
    recipe: Recipe | None = None,
    loss: Callable[[nn.Module, Batch], Tensor] = model_loss,
    r: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.0,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Trains one factor of every layer by LoRA with all else frozen, merges it, then the other; in place.

    **Arguments:** `model`: with factored layers. `batches`: gone through again and again, as often as the steps need, so no
    generator; to resume exactly, in the same order each time.
    `order`: 'left-right' or 'right-left'; `left` is the factor next to the outputs (C where the storage is pivoted).
    `recipe`: its steps are those of both stages together, half for each. `loss`: `(model, batch) -> scalar`. `r`,
    `lora_alpha`, `lora_dropout`: peft's, r at most the rank of the layer. `checkpoint`: a folder; a call that follows a
    killed one resumes from it, in either stage. `checkpoint_every`: steps between saves.

    **Returns:** one row per step: `stage` ('left' or 'right'), `step`, `loss`, `learning_rate`.

    **Raises:** `ValueError`: an unknown order, a model without factored layers, fewer than 2 steps, batches that are empty or
    cannot be gone through again. `FloatingPointError`: a loss that is not finite; the stage is undone.

    **Reference:** Wang et al., SVD-LLM, ICLR 2025, arXiv:2403.07378, section 3.3.
    """
    import peft  # noqa: PLC0415

    recipe = recipe or Recipe(steps=200, learning_rate=1e-4)
    if order not in ORDERS:
        raise ValueError(f"`order` must be one of {sorted(ORDERS)}, got {order!r}.")
    if recipe.steps < 2:
        raise ValueError(f"`recipe` must have at least 2 steps, one for each stage, got {recipe.steps}.")
    following, history = endless(batches), []
    halves = (recipe.steps - recipe.steps // 2, recipe.steps // 2)
    with flags_restored(model):
        for stage, steps in zip(ORDERS[order], halves, strict=True):
            names = factor_names(model, stage)
            ranks = {name: min(r, *model.get_submodule(name).weight.shape) for name in names}  # pyright: ignore
            smaller = {rf"^{re.escape(name)}$": rank for name, rank in ranks.items() if rank < r}
            config = peft.LoraConfig(
                r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=names, rank_pattern=smaller
            )
            torch.manual_seed(recipe.seed)  # of the new adapters
            adapted: Any = peft.get_peft_model(model, config)  # pyright: ignore[reportArgumentType] (any module will do)
            try:
                rows = fit(
                    adapted,
                    following,
                    replace(recipe, steps=steps),
                    loss,
                    checkpoint=checkpoint / stage if checkpoint else None,
                    checkpoint_every=checkpoint_every,
                    progress=progress,
                )
            except BaseException:
                adapted.unload()
                raise
            adapted.merge_and_unload(safe_merge=True)
            history += [{"stage": stage} | row for row in rows]
    return history


def tune_factors(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    recipe: Recipe | None = None,
    loss: Callable[[nn.Module, Batch], Tensor] = model_loss,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Trains both factors of every layer together with all else frozen, in place: the plain way that `refine_factors` is to
    be compared with. With `loss` the divergence from the dense model this is distillation.

    **Arguments, returns, raises:** as for `refine_factors`; the rows have no `stage`.
    """
    names = set(factor_names(model, "left")) | set(factor_names(model, "right"))
    following = endless(batches)
    with flags_restored(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.removesuffix(".weight") in names)
        return fit(
            model,
            following,
            recipe or Recipe(steps=200, learning_rate=1e-4),
            loss,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            progress=progress,
        )


@contextmanager
def flags_restored(model: nn.Module) -> Iterator[None]:
    """Which parameters require gradients is after the block as it was before."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])


def endless(batches: Iterable[Batch]) -> Callable[[int], Iterator[Batch]]:
    """`(steps done) -> the batches of the steps that follow`, the same ones gone through again and again.

    **Raises:** `ValueError`: batches that are empty or cannot be gone through again.
    """
    if isinstance(batches, Iterator):
        raise ValueError("`batches` must be gone through more than once: pass a list or a loader, got an iterator.")

    def again() -> Iterator[Batch]:
        while True:
            empty = True
            for batch in batches:
                empty = False
                yield batch
            if empty:
                raise ValueError("`batches` must hold at least one batch, got none.")

    return lambda done: itertools.islice(again(), done, None)
