"""Train the factors of a compressed model: one factor after the other by LoRA, or all of them together.

Rank and number of parameters stay exactly the same: the LoRA update of a factor is merged into the factor.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require
from lowrank.nn.batches import IGNORED, Batch, compute_logits, get_labels, has_labels, is_empty
from lowrank.nn.low_rank import FACTORED_LAYERS
from lowrank.nn.quantized import QuantizedLinear
from lowrank.training.loop import Recipe, fit

ORDERS = {"left-right": ("left", "right"), "right-left": ("right", "left")}


@check_arguments
@dataclass(frozen=True)
class LoraOptions:
    """Hold the sizes of the LoRA updates of factors.

    **Arguments**

    - `r`: rank of an update, >= 1. A smaller factor gets an update of its own rank.
    - `alpha`: > 0; an update is scaled by alpha / r.
    - `dropout`: probability of dropping an input of an update, in [0, 1].

    **Raises**

    - `ValueError`: a value out of its range.
    """

    r: int = 8
    alpha: int = 16
    dropout: float = 0.0

    def __post_init__(self) -> None:
        rules = {
            "r": (self.r >= 1, ">= 1"),
            "alpha": (self.alpha > 0, "> 0"),
            "dropout": (0 <= self.dropout <= 1, "in [0, 1]"),
        }
        for name, (holds, rule) in rules.items():
            require(holds, name, f"be {rule}", getattr(self, name))


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Compute the loss that a transformers model takes from the labels of its batch, else the mean cross-entropy.

    Positions with the label -100 do not count.

    **Arguments**

    - `model`: any PyTorch module.
    - `batch`: with labels, see `lowrank.nn.batches`.

    **Returns** a scalar.
    """
    if isinstance(batch, Mapping) and has_labels(batch):
        outputs: Any = model(**batch)
        if getattr(outputs, "loss", None) is not None:
            return outputs.loss
    outputs, labels = compute_logits(model, batch), get_labels(batch)
    if labels.is_floating_point():  # probabilities of classes
        return nn.functional.cross_entropy(outputs, labels)
    if bool((labels == IGNORED).all()):
        return 0.0 * outputs.sum()
    return nn.functional.cross_entropy(outputs.flatten(0, -2), labels.flatten())


def factor_names(model: nn.Module, factor: str) -> list[str]:
    """List the dotted names of one factor of every factored layer.

    **Arguments**

    - `model`: a compressed model.
    - `factor`: 'left' or 'right'.

    **Returns** the names in the order of the model.

    **Raises**

    - `ValueError`: the model has no factored layer, or one with quantised factors.
    """
    kinds = tuple(FACTORED_LAYERS.values())
    names = [f"{name}.{factor}" for name, module in model.named_modules() if isinstance(module, kinds)]
    if not names:
        raise ValueError(
            "`model` must have factored layers, as lowrank.compression.compress.compress makes them, got none."
        )
    quantised = next((name for name in names if isinstance(model.get_submodule(name), QuantizedLinear)), None)
    require(quantised is None, "model", "have factors in floating point: train first, then quantise", quantised)
    return names


@torch.inference_mode(False)  # the updates are trained
@check_arguments
def refine_factors(
    model: nn.Module,
    batches: Iterable[Batch],
    order: str = "left-right",
    *,
    lora: LoraOptions = LoraOptions(),
    recipe: Recipe | None = None,
    loss: Callable[[nn.Module, Batch], Tensor] = model_loss,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train one factor of every layer by LoRA with everything else frozen, merge it, then train the other; in place.

    **Arguments**

    - `model`: with factored layers.
    - `batches`: repeated as often as the steps need, so a generator is refused. To resume exactly, their order must be the
      same each time.
    - `order`: 'left-right' or 'right-left'. `left` is the factor next to the outputs (C if the storage is pivoted).
    - `lora`: sizes of the updates.
    - `recipe`: its steps are the sum of both stages, half for each; by default 200 steps with a peak learning rate of 1e-4.
    - `loss`: `(model, batch) -> scalar`; by default the model's, else the cross-entropy.
    - `checkpoint`: folder of saved states. A call after a killed one resumes from it, in either stage. By default nothing is
      saved.
    - `progress`: show a progress bar.

    **Returns** one row per step: `stage` ('left' or 'right'), `step`, `loss`, `learning_rate`.

    **Raises**

    - `ValueError`: an unknown order; a model without factored layers; fewer than 2 steps; no batches, or batches that cannot
      be repeated.
    - `FloatingPointError`: a loss that is not finite; the stage is undone.

    **Reference** Wang et al., SVD-LLM, ICLR 2025, arXiv:2403.07378, section 3.3.
    """
    recipe = recipe or Recipe(steps=200, learning_rate=1e-4)
    require(order in ORDERS, "order", f"be one of {sorted(ORDERS)}", order)
    require(recipe.steps >= 2, "recipe", "have at least 2 steps, one for each stage", recipe.steps)
    following, history = repeat_batches(batches), []
    halves = (recipe.steps - recipe.steps // 2, recipe.steps // 2)
    with restore_flags(model):
        for stage, steps in zip(ORDERS[order], halves, strict=True):
            adapted = _add_updates(model, stage, lora, recipe.seed)
            part, folder = replace(recipe, steps=steps), checkpoint / stage if checkpoint else None
            try:
                rows = fit(adapted, following, part, loss, checkpoint=folder, progress=progress)
            except BaseException:
                adapted.unload()
                raise
            adapted.merge_and_unload(safe_merge=True)
            history += [{"stage": stage} | row for row in rows]
    return history


def _add_updates(model: nn.Module, factor: str, lora: LoraOptions, seed: int) -> Any:
    """Wrap a model so that one factor of every layer has a LoRA update."""
    import peft  # noqa: PLC0415

    names = factor_names(model, factor)
    ranks = {name: min(lora.r, *model.get_submodule(name).weight.shape) for name in names}  # pyright: ignore
    smaller = {rf"^{re.escape(name)}$": rank for name, rank in ranks.items() if rank < lora.r}
    config = peft.LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names, rank_pattern=smaller
    )
    torch.manual_seed(seed)  # of the new updates
    return peft.get_peft_model(model, config)  # pyright: ignore[reportArgumentType] (any module will do)


def tune_factors(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    recipe: Recipe | None = None,
    loss: Callable[[nn.Module, Batch], Tensor] = model_loss,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train both factors of every layer together with everything else frozen, in place.

    This is the plain training to compare `refine_factors` with. If `loss` is the divergence from the dense model, it is
    distillation.

    **Arguments**

    - `model`: with factored layers.
    - `batches`: repeated as often as the steps need, so a generator is refused. To resume exactly, their order must be the
      same each time.
    - `recipe`: by default 200 steps with a peak learning rate of 1e-4.
    - `loss`: `(model, batch) -> scalar`; by default the model's, else the cross-entropy.
    - `checkpoint`: folder of saved states. A call after a killed one resumes from it. By default nothing is saved.
    - `progress`: show a progress bar.

    **Returns** one row per step: `step`, `loss`, `learning_rate`.

    **Raises**

    - `ValueError`: a model without factored layers; no batches, or batches that cannot be repeated.
    - `FloatingPointError`: a loss that is not finite.
    """
    names = set(factor_names(model, "left")) | set(factor_names(model, "right"))
    recipe, following = recipe or Recipe(steps=200, learning_rate=1e-4), repeat_batches(batches)
    with restore_flags(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.removesuffix(".weight") in names)
        return fit(model, following, recipe, loss, checkpoint=checkpoint, progress=progress)


@contextmanager
def restore_flags(model: nn.Module) -> Iterator[None]:
    """Restore the `requires_grad` flag of every parameter when the block ends."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])


def repeat_batches(batches: Iterable[Batch]) -> Callable[[int], Iterator[Batch]]:
    """Repeat batches without end, for `fit`, and leave empty ones out.

    **Arguments**

    - `batches`: a list, a loader or another iterable that can be read again and again.

    **Returns** `(steps done) -> batches of the remaining steps`, one for each step.

    **Raises**

    - `ValueError`: an iterator, at once; no batches, when the first one is asked for.
    """
    if isinstance(batches, Iterator):
        raise ValueError("`batches` must be iterable more than once: pass a list or a loader, got an iterator.")

    def repeat() -> Iterator[Batch]:
        while True:
            none = True
            for batch in batches:
                if not is_empty(batch):
                    none = False
                    yield batch
            if none:
                raise ValueError("`batches` must hold at least one batch, got none.")

    return lambda done: itertools.islice(repeat(), done, None)
