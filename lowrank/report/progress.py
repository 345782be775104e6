"""Say what a notebook is at while it runs: a bar at a terminal, elsewhere a line per section."""

import logging
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

EXECUTING = re.compile(r"Executing Cell (\d+)-")  # of papermill's log, counted from 1


class _SectionLines(logging.Handler):
    """Print a line on stderr when the first cell of a section starts."""

    def __init__(self, title: str, sections: Mapping[int, str], cells: int) -> None:
        super().__init__(logging.INFO)
        self.title, self.sections, self.cells = title, dict(sections), cells
        self.started = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        found = EXECUTING.match(record.getMessage())
        if found and (section := self.sections.pop(int(found[1]), None)):
            seconds = time.monotonic() - self.started
            line = f"{self.title}: {seconds:.0f} s, cell {found[1]} of {self.cells}: {section}"
            print(line, file=sys.stderr, flush=True)


def find_sections(notebook: Any) -> dict[int, str]:
    """Find where the sections of a notebook start.

    **Arguments**

    - `notebook`: notebook object.

    **Returns** number of a cell, from 1 -> the first heading in it.
    """
    headings = {number: re.match(r"#+ (.*)", cell.source) for number, cell in enumerate(notebook.cells, 1)}
    kinds = {number: cell.cell_type for number, cell in enumerate(notebook.cells, 1)}
    return {number: found[1] for number, found in headings.items() if found and kinds[number] == "markdown"}


@contextmanager
def showing_sections(title: str, notebook: Any, injected: bool) -> Iterator[None]:
    """Print a line on stderr for each section that papermill starts inside the block, unless stderr is a terminal.

    **Arguments**

    - `title`: what the lines start with.
    - `notebook`: notebook object, before it runs.
    - `injected`: whether papermill adds a cell with parameters, which moves all that follow the parameters cell.
    """
    if sys.stderr.isatty():
        yield
        return
    tagged = [n for n, cell in enumerate(notebook.cells, 1) if "parameters" in cell.metadata.get("tags", [])]
    moved = tagged[0] if injected and tagged else len(notebook.cells)
    sections = {number + (number > moved): heading for number, heading in find_sections(notebook).items()}
    lines, logger = _SectionLines(title, sections, len(notebook.cells) + injected), logging.getLogger("papermill")
    level = logger.level
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)
