"""Every family of models that docs/families.md lists: compressed in one call, multiplied out again, saved and loaded."""

import copy
import re
from pathlib import Path

import pytest
import torch
from families import relative
from torch import nn
from zoo import ZOO

from lowrank import compress, load_compressed, save_compressed
from lowrank.compression.replace import fold
from lowrank.nn.batches import Batch, compute_logits
from lowrank.nn.surgery import unify_linears

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
FIRST_STEP = {"GPT-2": unify_linears}  # named by the error of `compress`
NOT_DESCRIBED = {"MLP-Mixer"}  # built from its class: the folder cannot say how


def made(family: str) -> tuple[nn.Module, list[Batch]]:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ZOO[family].build().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # heads and biases start at zero
                parameter.add_(0.05 * torch.randn_like(parameter))
    if family in FIRST_STEP:
        FIRST_STEP[family](model)
    return model, [ZOO[family].sample(generator) for _ in range(3)]


@torch.no_grad()
def logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    return compute_logits(model, batch)


@pytest.mark.filterwarnings("ignore::lowrank.calibration.collect.FewTokensWarning")
@pytest.mark.filterwarnings("ignore::lowrank.io.weights.LeftOutWarning")
@pytest.mark.parametrize("family", ZOO)
def test_one_call_compresses_a_family(family: str, tmp_path: Path) -> None:
    model, batches = made(family)
    skeleton, dense = copy.deepcopy(model), logits(model, batches[0])
    result = compress(model, batches, keep=0.5, progress=False)
    found = logits(model, batches[0])
    assert result.layers
    assert sum(parameter.numel() for parameter in model.parameters()) == result.after.model < result.before.model
    assert 0 < result.share_of_model < 1
    assert 0 < relative(found, dense) < 1.5  # it is another model, and not one of noise
    save_compressed(model, tmp_path / "small")
    again = load_compressed(tmp_path / "small", architecture=skeleton if family in NOT_DESCRIBED else None)
    assert torch.equal(logits(again, batches[0]), found)
    assert relative(logits(fold(model), batches[0]), found) < 1e-4


@pytest.mark.parametrize("family", FIRST_STEP)
def test_the_error_names_the_first_step(family: str) -> None:
    model, batches = ZOO[family].build().eval(), [ZOO[family].sample(torch.Generator().manual_seed(0))]
    with pytest.raises(ValueError, match=rf"call lowrank.nn.surgery.{FIRST_STEP[family].__name__}\(model\) first"):
        compress(model, batches, keep=0.5, progress=False)


@pytest.mark.parametrize("family", NOT_DESCRIBED)
@pytest.mark.filterwarnings("ignore::lowrank.calibration.collect.FewTokensWarning")
def test_the_error_asks_for_the_architecture(family: str, tmp_path: Path) -> None:
    model, batches = made(family)
    compress(model, batches, keep=0.5, progress=False)
    save_compressed(model, tmp_path / "small")
    with pytest.raises(ValueError, match="`architecture` must be the dense model"):
        load_compressed(tmp_path / "small")


def test_the_page_lists_the_families_that_are_tested() -> None:
    rows = re.findall(r"^\| ([A-Z][^|]*?) \|", PAGE.read_text(encoding="utf8"), flags=re.MULTILINE)
    assert rows == list(ZOO)
