"""Shared by all tests: results and caches in temporary folders unless a test says otherwise."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {"wide": (24, 40), "square": (32, 32), "tall": (40, 24)}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def shape(request: pytest.FixtureRequest) -> tuple[int, int]:
    """(out, in) of a weight."""
    return request.param


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`LOWRANK_OUTPUTS` in a temporary folder."""
    monkeypatch.setenv("LOWRANK_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "outputs"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`LOWRANK_CACHE` in a temporary folder."""
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
