"""Warm starts of every kind of module: the wrapped model is the tuned one, or the module is refused before any change."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank.lora.adapters import add_adapter
from lowrank.lora.deltas import delta_spectra
from lowrank.lora.rank_config import RankConfig
from lowrank.nn.low_rank import LowRankLinear

RANK = 2
X = torch.arange(24).reshape(4, 6) % 10


class Kinds(nn.Module):
    """One module of each kind; the wide, tall and square `Conv1D` keep their weights transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.linear = nn.Linear(8, 12)
        self.wide, self.tall, self.square = Conv1D(8, 12), Conv1D(12, 8), Conv1D(12, 12)
        self.conv1, self.conv2, self.conv3 = (
            nn.Conv1d(12, 8, 3),
            nn.Conv2d(1, 6, 3, stride=2),
            nn.Conv3d(6, 4, (2, 1, 1)),
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.square(self.tall(self.wide(self.linear(self.embed(ids)).tanh())))
        x = self.conv2(self.conv1(x.mT)[:, None])
        return self.conv3(x[..., None]).flatten(1)


def changed(base: nn.Module, names: list[str]) -> Any:
    """A copy with a change of rank 2 in the flattened weights of some modules."""
    tuned, generator = copy.deepcopy(base), torch.Generator().manual_seed(1)
    for name in names:
        weight: Any = tuned.get_submodule(name).weight.data
        rows, columns = weight.flatten(1).shape
        left, right = (torch.randn(*sides, generator=generator) for sides in ((rows, RANK), (RANK, columns)))
        weight += 0.3 * (left @ right).view_as(weight)
    return tuned


def config_for(base: nn.Module, tuned: nn.Module, names: list[str]) -> RankConfig:
    spectra = delta_spectra(base, tuned, [re.escape(name) for name in names], progress=False)
    return RankConfig.from_ranks(spectra, dict.fromkeys(names, RANK), {})


NAMES = [name for name, _ in Kinds().named_children()]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")  # of peft, if Conv1D and others are mixed
@pytest.mark.parametrize("options", [{}, {"scaling": 0.5}, {"lora_alpha": 3, "use_rslora": True}], ids=str)
@pytest.mark.parametrize("names", [*([name] for name in NAMES), NAMES], ids="-".join)
def test_a_change_of_low_rank_is_met_exactly(names: list[str], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    base = Kinds().eval()
    for parameter in base.parameters():  # a Conv1D starts near 0, which hides what stands before it
        nn.init.normal_(parameter, std=0.4)
    tuned = changed(base, names)
    config = config_for(base, tuned, names)
    adapted = add_adapter(copy.deepcopy(base), config, start="warm", base=base, tuned=tuned, **options)
    with torch.no_grad():
        distance, expected = base(X) - tuned(X), tuned(X)
        assert distance.norm() > 0.05 * expected.norm()
        torch.testing.assert_close(adapted(X), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(adapted.merge_and_unload()(X), expected, rtol=1e-4, atol=1e-4)


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv1d(8, 8, 3, groups=2)
        self.turned = nn.ConvTranspose1d(8, 8, 3)
        self.low = LowRankLinear(8, 8, 2)
        self.attention = nn.MultiheadAttention(8, 2)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        (
            "grouped",
            {},
            "linear layers, embeddings or convolutions of one group for `start` 'warm', got 'grouped', a Conv1d",
        ),
        ("turned", {}, "got 'turned', a ConvTranspose1d"),
        ("low.right", {"use_dora": True}, "`use_dora` must be False for `start` 'warm', got True: module 'low.right'"),
        ("low.right", {"lora_alpha": 0}, "`lora_alpha` must be None or finite and > 0, got 0"),
        ("low.right", {"scaling": 0.0}, "`scaling` must be None or finite and > 0"),
        ("low.right", {"scaling": float("nan")}, "`scaling` must be None or finite and > 0"),
        ("attention.out_proj", {}, "got 'attention.out_proj', whose weight MultiheadAttention reads itself"),
    ],
)
def test_what_has_no_place_for_the_factors_is_refused_before_a_change(
    name: str, options: dict[str, Any], said: str
) -> None:
    base = Grouped()
    tuned = changed(base, [name])
    config = config_for(base, tuned, [name])
    model = copy.deepcopy(base)
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=re.escape(said)):
        add_adapter(model, config, start="warm", base=base, tuned=tuned, **options)
    assert dict(model.named_modules()) == modules
    assert all(parameter.requires_grad for parameter in model.parameters())
