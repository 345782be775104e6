"""Shared by the tests of the command: stand-ins for the Hub, and no network."""

from pathlib import Path

import pytest
import stand_ins


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name on the Hub -> the small local thing in its place."""
    folder: Path = tmp_path_factory.mktemp("hub")
    return stand_ins.make_models(folder / "models") | stand_ins.make_data(folder / "data")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with files of the user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(
        "torch.utils.collect_env.run", lambda _: (1, "", "")
    )  # the harness lists all packages, for seconds
    stand_ins.make_files(tmp_path)
    return tmp_path
