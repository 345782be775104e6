"""What a command line ends with: its own status, or one line about what is wrong."""

import subprocess
import sys
from collections.abc import Callable

import pytest

from lowrank.io.commands import run_command
from lowrank.io.dependencies import ROOT


class _OwnError(RuntimeError):
    exit_status = 1


def fail(error: BaseException) -> Callable[[], int]:
    def call() -> int:
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("two\n  lines"), 2, "error: two lines"),
        (FileNotFoundError("nowhere"), 2, "error: nowhere"),
        (ModuleNotFoundError("No module named 'pandas'"), 2, "error: No module named 'pandas': install lowrank[dev]"),
        (_OwnError("failed"), 1, "error: failed"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (ValueError("x" * 10_000), 2, "error: " + "x" * 2000),
    ],
)
def test_an_error_is_one_line_and_a_status(error, status, line, capsys) -> None:
    assert run_command(fail(error), _OwnError) == status
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(line)
    assert said.err.count("\n") == 1
    assert len(said.err) < 2100


def test_a_fault_of_the_program_is_no_bad_input() -> None:
    with pytest.raises(KeyError):
        run_command(fail(KeyError("name")))


def test_the_status_of_the_function_is_returned() -> None:
    assert [run_command(lambda status=status: status) for status in (0, 1)] == [0, 1]


def test_a_reader_that_leaves_early_is_no_error() -> None:
    code = "import sys; from lowrank.io.commands import run_command; sys.exit(run_command(lambda: print('line\\n' * 99999) or 0))"
    done = subprocess.run(
        f'{sys.executable} -c "{code}" | head -1', shell=True, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("line\n", "")
