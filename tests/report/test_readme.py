"""The README and docs/ say what the published results say, and the examples in them print what they show."""

import contextlib
import io
import itertools
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest import mock

import pytest
import torch

from lowrank.cli.main import make_parser
from lowrank.factorization.methods import METHODS
from lowrank.io.dependencies import ROOT
from lowrank.report.readme import PAGES, fill_blocks


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_outputs(page: Path) -> None:
    assert fill_blocks(page) == page.read_text(encoding="utf8"), "run `python -m lowrank.report readme`"


DOCS = sorted((ROOT / "docs").glob("*.md"))
TEXTS = {path.name: path.read_text(encoding="utf8") for path in [ROOT / "README.md", *DOCS]}
ALONE = "\n".join(text for name, text in TEXTS.items() if name != "cluster.md")  # its examples have tests of their own
EXAMPLES = re.findall(r"```python\n(.*?)```\n+```text\n(.*?)```", ALONE, flags=re.DOTALL)


def test_the_readme_is_one_screen_and_links() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 150


def test_every_example_has_its_output() -> None:
    assert len(EXAMPLES) == ALONE.count("```python") > 0


@pytest.mark.parametrize(("example", "shown"), EXAMPLES)
def test_the_examples_print_what_they_show(example: str, shown: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)  # an example that is to be short does not set it
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), mock.patch.dict(METHODS):  # an example adds to them, for itself only
        exec(compile(example, "an example", "exec"), {})
    assert printed.getvalue() == shown


def test_figures_and_links_exist() -> None:
    """Of the README; those of docs/ lead to pages of the site, see test_site."""
    prose = re.sub(r"```.*?```", "", TEXTS["README.md"], flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", prose):
        assert (ROOT / target).exists(), target


SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", "\n".join(TEXTS.values()), flags=re.DOTALL)).splitlines()
INLINE = re.findall(r"`((?:make|python -m|pip) [^`]+)`", "\n".join(TEXTS.values()))
COMMANDS = sorted({shlex.join(shlex.split(line, comments=True)) for line in [*SHELL, *INLINE]} - {""})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_it_names_is_there(command: str) -> None:
    """Short of running it: CI runs report, site and test, test_lab.py the lab, and each module has tests of its own."""
    words = list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), shlex.split(command)))
    if words[0] == "srun":
        pytest.skip("needs a cluster; `make cluster-test` has one")
    if words[0] == "make":
        planned = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, check=False)
        assert planned.returncode == 0
    elif words[0] == "python":
        start = words[1 : 4 if words[2:3] == ["lowrank.report"] else 3 if words[1] == "-m" else 2]
        shown = subprocess.run([sys.executable, *start, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
        text = shown.stdout
        assert (" ".join(start[1:]) if start[0] == "-m" else Path(start[0]).stem) in text
        assert all(word in text for word in words if word.startswith("--"))
    elif words[0] == "lowrank":
        help_alone = pytest.raises(SystemExit, match="^0$") if "--help" in words else contextlib.nullcontext()
        with help_alone:
            make_parser().parse_args(words[1:])
    else:
        assert words[:2] == ["pip", "install"], command
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
        extra = re.fullmatch(r"\.\[(\w+)\]", words[2])
        assert extra
        assert extra[1] in project["optional-dependencies"]
