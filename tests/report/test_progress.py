"""What the runner says without a terminal: a line per section, whatever papermill adds."""

import logging

import pytest
from nbformat import v4

from lowrank.report.progress import showing_sections


def run_cells(title: str, injected: bool) -> None:
    """Log what papermill logs of a notebook with two sections, and with a cell of parameters if it adds one."""
    parameters = v4.new_code_cell("number = 3", metadata={"tags": ["parameters"]})
    cells = [v4.new_markdown_cell("# A question"), parameters, v4.new_code_cell("# a comment\nnumber")]
    cells += [v4.new_markdown_cell("## What was found\n\nWords."), v4.new_code_cell("1")]
    with showing_sections(title, v4.new_notebook(cells=cells), injected):
        for number in range(1, len(cells) + injected + 1):
            logging.getLogger("papermill").info(f"Executing Cell {number:-<40}")
            logging.getLogger("papermill").info(f"Ending Cell {number:-<43}")


@pytest.mark.parametrize(("injected", "second"), [(False, "cell 4 of 5"), (True, "cell 5 of 6")])
def test_each_section_is_a_line(injected: bool, second: str, capsys) -> None:
    logger = logging.getLogger("papermill")
    before = logger.level, list(logger.handlers)
    run_cells("a/01_small", injected)
    said = capsys.readouterr()
    first = f"a/01_small: 0 s, cell 1 of {5 + injected}: A question"
    assert (said.out, said.err.splitlines()) == ("", [first, f"a/01_small: 0 s, {second}: What was found"])
    assert (logger.level, logger.handlers) == before


def test_a_terminal_has_the_bar_alone(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    run_cells("a/01_small", injected=True)
    assert capsys.readouterr().err == ""
