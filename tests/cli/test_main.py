"""The `lowrank` command: help at once and without torch, errors in one line and a status."""

import inspect
import subprocess
import sys
from importlib import import_module

import pytest

from lowrank.cli.main import COMMANDS, main

HELP = """
import sys
from lowrank.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    heavy = {"torch", "numpy", "transformers", "pandas", "yaml"} & set(sys.modules)
    sys.exit(f"loaded {heavy}" if heavy else end.code)
"""


def test_help_of_all_commands_loads_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", HELP, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "lowrank"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: lowrank ")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_of_the_command(name: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: lowrank {name} ")
    examples = [line.split() for line in said.splitlines() if line.startswith(f"    lowrank {name} ")]
    assert examples
    assert (inspect.getdoc(import_module(COMMANDS[name])) or "").partition("\n")[0].split("`")[0] in said


@pytest.mark.parametrize("words", [[], ["nothing"], ["info"]])
def test_words_that_are_no_command_end_with_usage(words, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert "usage: lowrank" in capsys.readouterr().err
