"""Every family of models that docs/families.md lists: compressed in one call, multiplied out again, saved and loaded."""

import copy
import re
from pathlib import Path

import pytest
import torch
from families import FIRST_STEP, NOT_DESCRIBED, REPLACED, ZOO, of_zoo, outputs, relative
from torch import nn

from lowrank import compress, load_compressed, save_compressed
from lowrank.compression.replace import fold
from lowrank.nn.targets import find_linears

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"


@pytest.mark.filterwarnings("ignore::lowrank.calibration.collect.FewTokensWarning")
@pytest.mark.filterwarnings("ignore::lowrank.io.weights.LeftOutWarning")
@pytest.mark.parametrize("family", ZOO)
def test_one_call_compresses_a_family(family: str, tmp_path: Path) -> None:
    model, batches = of_zoo(family)
    skeleton, dense, modules = copy.deepcopy(model), outputs(model, batches), dict(model.named_modules())
    result = compress(model, batches, keep=0.5, progress=False)
    found = outputs(model, batches)
    assert list(result.ranks) == list(find_linears(skeleton, REPLACED[family]))
    assert sum(parameter.numel() for parameter in model.parameters()) == result.after.model < result.before.model
    assert 0 < result.share_of_model < 1
    assert 0 < relative(found, dense) < 1.5  # it is another model, and not one of noise
    for name, module in modules.items():  # only plain layers are touched, and all else is the very same
        touched = name in result.ranks and model.get_submodule(name) is not module
        assert type(module) is nn.Linear if touched else model.get_submodule(name) is module
    save_compressed(model, tmp_path / "small")
    again = load_compressed(tmp_path / "small", architecture=skeleton if family in NOT_DESCRIBED else None)
    assert torch.equal(outputs(again, batches), found)
    assert relative(outputs(fold(model), batches), found) < 1e-4


@pytest.mark.parametrize("family", FIRST_STEP)
def test_the_error_names_the_first_step(family: str) -> None:
    model, batches = ZOO[family].build().eval(), of_zoo(family)[1]
    with pytest.raises(ValueError, match=rf"call lowrank.nn.surgery.{FIRST_STEP[family].__name__}\(model\) first"):
        compress(model, batches, keep=0.5, progress=False)


@pytest.mark.parametrize("family", NOT_DESCRIBED)
@pytest.mark.filterwarnings("ignore::lowrank.calibration.collect.FewTokensWarning")
def test_the_error_asks_for_the_architecture(family: str, tmp_path: Path) -> None:
    model, batches = of_zoo(family)
    compress(model, batches, keep=0.5, progress=False)
    save_compressed(model, tmp_path / "small")
    with pytest.raises(ValueError, match="`architecture` must be the dense model"):
        load_compressed(tmp_path / "small")


def test_the_page_lists_the_families_that_are_tested() -> None:
    rows = re.findall(r"^\| ([A-Z][^|]*?) \|", PAGE.read_text(encoding="utf8"), flags=re.MULTILINE)
    assert rows == list(ZOO)
