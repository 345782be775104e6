"""The README says what outputs/ say, and the examples in it and in docs/ print what they show."""

import contextlib
import io
import re

import pytest
from conftest import ROOT

from lowrank import factorize
from lowrank.readme import filled

README = (ROOT / "README.md").read_text(encoding="utf8")


def test_tables_are_those_of_the_outputs() -> None:
    assert filled(README) == README, "run `python -m lowrank.readme`"


TEXTS = [README, *(path.read_text(encoding="utf8") for path in sorted((ROOT / "docs").glob("*.md")))]
EXAMPLES = re.findall(r"```python\n(.*?)```\n+```text\n(.*?)```", "\n".join(TEXTS), flags=re.DOTALL)


def test_every_example_has_its_output() -> None:
    assert len(EXAMPLES) == sum(text.count("```python") for text in TEXTS) > 0


@pytest.mark.parametrize(("example", "shown"), EXAMPLES)
def test_the_examples_print_what_they_show(example: str, shown: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("METHODS", "READS", "NORMS"):  # an example adds to them, for itself only
        monkeypatch.setattr(factorize, name, dict(getattr(factorize, name)))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "an example", "exec"), {})
    assert printed.getvalue() == shown


def test_figures_and_links_exist() -> None:
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", prose):
        assert (ROOT / target).exists(), target


def test_every_make_target_it_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf8")
    for target in re.findall(r"(?:`|^)make ([a-z]+)", "\n".join(TEXTS), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
