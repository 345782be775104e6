"""Shared by all tests: results and caches in temporary folders unless a test says otherwise."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
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


@pytest.fixture
def unchecked() -> Iterator[None]:
    """No type checks inside: they look into mappings, and dynamo cannot trace them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium that asks nothing of the web by itself."""
    if not CHROMIUM:
        pytest.skip("no chromium on this machine")
    from playwright.sync_api import sync_playwright  # noqa: PLC0415

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield started
        started.close()


# Files that take long, relative to tests/; `make test-fast` leaves them and everything of the report out.
SLOW = (
    "tasks/test_tasks.py",
    "io/test_distributed.py",
    "io/test_cache.py",
    "io/test_hub.py",
    "factorization/test_rank_allocation.py",
    "training/test_refine.py",
    "training/test_oialr.py",
    "training/test_loop.py",
    "compression/test_replace.py",
    "compression/test_checkpoint.py",
    "pi3/test_model.py",
    "pi3/test_speed.py",
    "lora/test_rank_config.py",
    "test_benchmarks.py",
    "test_devices.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their file: `report`, `slow`; and by what they use: `browser`."""
    for item in items:
        name = (
            item.path.relative_to(Path(__file__).parent).as_posix() if item.path.is_relative_to(ROOT / "tests") else ""
        )
        if name.startswith("report/"):
            item.add_marker(pytest.mark.report)
        if name in SLOW:
            item.add_marker(pytest.mark.slow)
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.browser)


@pytest.fixture
def without_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notebook 01 without claims, which need tables that a small test does not write."""
    from lowrank.report.findings.registry import FINDINGS  # noqa: PLC0415

    monkeypatch.delitem(FINDINGS, "01_whitening")
