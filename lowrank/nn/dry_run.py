"""Try out what replacing layers does to a model, on one batch and before anything is replaced.

A model may read the weight of a layer instead of calling it, ask whether it is an `nn.Linear`, or hold it in a list of its own.
No look at a layer tells that. So each layer gets a stand-in for one pass, which computes the same but is another module.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.nn.batches import Batch, compute_logits, device_of, eval_mode, move_batch
from lowrank.nn.lazy_weight import LazyWeight
from lowrank.nn.nests import change_tensors, list_tensors
from lowrank.nn.surgery import replace_module

SAMPLED = 4096  # values of an output that are compared
TOLERANCE = 1e-3  # relative to the largest: two equal passes may round unlike on a GPU


class _StandIn(nn.Module):
    """Call a layer from its place, and count calls and uses of its weight, which is lazy as that of a factored layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.in_features, self.out_features = layer, layer.in_features, layer.out_features
        self.calls = self.uses = 0

    @property
    def weight(self) -> Tensor:
        return LazyWeight(self.layer.weight, tuple(self.layer.weight.shape), self._use_weight)

    def _use_weight(self) -> Tensor:
        self.uses += 1
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.layer(*args, **kwargs)


def find_irreplaceable(model: nn.Module, batch: Batch, layers: Mapping[str, nn.Linear]) -> dict[str, str]:
    """Find the layers that another module cannot replace, by two passes over one sample and more only if the second fails.

    **Arguments**

    - `model`: any PyTorch module; it is the same afterwards.
    - `batch`: see `lowrank.nn.batches`. Its first sample is used, or all if one is not enough to run the model. A model
      that does not run on it alone is not tried out.
    - `layers`: layer name -> layer, the ones to replace.

    **Returns** layer name -> why it cannot be replaced. A layer that the batch does not reach is not judged.

    **Raises**

    - `ValueError`: the model fails with all of them replaced, but with none of them alone.
    """
    device = device_of(model)
    with eval_mode(model), torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        batch, called = move_batch(batch, device), set[str]()
        with ExitStack() as hooks:
            for name, layer in layers.items():
                hook = layer.register_forward_pre_hook(lambda *_, name=name: called.add(name))
                hooks.callback(hook.remove)
            for tried in (_first_sample(batch), batch):
                try:
                    batch, expected = tried, _sample_output(model, tried)
                    break
                except Exception:  # who runs the model otherwise will say what is wrong
                    called.clear()
            else:
                return {}
        trial = _Trial(model, batch, expected)
        if not (failure := trial.run(layers)):
            return {name: reason for name in layers if (reason := trial.judge(name, name in called))}
        alone = {name: reason for name in layers if (reason := trial.run([name]))}
        if not alone:
            raise ValueError(f"`model` must run with its layers replaced, got: {failure}.")
        return alone


class _Trial:
    """Run a model with stand-ins."""

    def __init__(self, model: nn.Module, batch: Batch, expected: Tensor) -> None:
        self.model, self.batch, self.expected = model, batch, expected
        self.stand_ins: dict[str, _StandIn] = {}

    def run(self, names: Mapping[str, Any] | Sequence[str]) -> str | None:
        """Run one pass with stand-ins for some layers and return how it fails, or None."""
        dense: dict[str, Any] = {name: self.model.get_submodule(name) for name in names}
        self.stand_ins = {name: _StandIn(layer) for name, layer in dense.items()}
        try:
            for name, stand_in in self.stand_ins.items():
                replace_module(self.model, name, stand_in)
            output = _sample_output(self.model, self.batch)
        except Exception as error:
            text = next(iter(str(error).splitlines()), "")
            return f"the model fails without it as an nn.Linear ({type(error).__name__}: {text})"
        finally:
            for name, layer in dense.items():
                replace_module(self.model, name, layer)
        if output.shape == self.expected.shape:
            scale = self.expected.nan_to_num(0, 0, 0).abs().max() if len(output) else 0.0
            if torch.allclose(output, self.expected, rtol=0, atol=float(TOLERANCE * scale), equal_nan=True):
                return None
        return "the model computes something else if it is no nn.Linear"

    def judge(self, name: str, was_called: bool) -> str | None:
        """Return why the stand-in of a layer has no effect, after a pass that went well."""
        stand_in = self.stand_ins[name]
        if stand_in.calls:
            return None
        if stand_in.uses:
            return "the model reads its weight instead of calling it"
        return "the model calls it from another place than its name" if was_called else None


def _first_sample(batch: Batch) -> Batch:
    """Return the first sample of a batch, if all its tensors count the same number of samples, else the batch."""
    counts = {len(tensor) if tensor.dim() else 0 for tensor in list_tensors(batch)}
    return change_tensors(batch, lambda tensor: tensor[:1]) if len(counts) == 1 and 0 not in counts else batch


def _sample_output(model: nn.Module, batch: Batch) -> Tensor:
    """Run a pass with fixed random numbers and return some values of its output, in float64 on the CPU."""
    torch.manual_seed(0)
    values = compute_logits(model, batch).flatten()
    return values[:: max(len(values) // SAMPLED, 1)].double().cpu()
