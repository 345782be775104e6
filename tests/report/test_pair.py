"""Pairs come from published runs where these ran the code of the source, whatever its words and the cuts between its cells."""

import nbformat
import pytest

from lowrank.report import pair
from lowrank.report.run import read_notebook

NAME = "01_whitening"


@pytest.fixture
def source(monkeypatch):
    """The source of a notebook, which a test may change."""
    notebook = read_notebook(NAME)
    monkeypatch.setattr(pair, "read_notebook", lambda name: notebook)
    return notebook


def code_of(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown_by(notebook) -> list:
    """What each cell shows, without its number."""
    return [[output.get("text", output.get("data")) for output in c.outputs] for c in code_of(notebook) if c.outputs]


def test_outputs_are_those_of_the_published_run(source) -> None:
    found = pair._find_published(NAME)
    stored = nbformat.read(pair.NOTEBOOKS / f"{NAME}.ipynb", 4)
    assert [cell.outputs for cell in code_of(found)] == [cell.outputs for cell in code_of(stored)]
    assert [cell.execution_count for cell in code_of(found)] == list(range(1, len(code_of(found)) + 1))


def test_words_and_cuts_are_free(source) -> None:
    whole = shown_by(pair._find_published(NAME))
    source.cells[0].source += " More words."
    first = code_of(source)[0]
    first.source += "\n# a comment"
    imports = code_of(source)[1]
    head, _, rest = imports.source.partition("\n")
    place = source.cells.index(imports)
    source.cells[place : place + 1] = [nbformat.v4.new_code_cell(part) for part in (head, rest)]
    assert shown_by(pair._find_published(NAME)) == whole


@pytest.mark.parametrize(
    "change",
    [
        lambda notebook: setattr(code_of(notebook)[-1], "source", code_of(notebook)[-1].source + "\nmore = 1"),
        lambda notebook: notebook.cells.append(nbformat.v4.new_code_cell("more = 1")),
        lambda notebook: notebook.cells.pop(),
    ],
    ids=["a line", "a cell more", "a cell less"],
)
def test_other_code_has_no_published_run(source, change) -> None:
    change(source)
    assert pair._find_published(NAME) is None
