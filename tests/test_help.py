"""Every module that is a command says what it does at once: `--help` imports nothing heavy."""

import subprocess
import sys

import pytest

from lowrank.io.dependencies import PACKAGE, ROOT

COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for path in PACKAGE.rglob("*.py")
    if '\nif __name__ == "__main__":\n' in path.read_text(encoding="utf8")
)
CODE = """
import runpy, sys
name, sys.argv = sys.argv[1], ["command", "--help"]
try:
    runpy.run_module(name, run_name="__main__")
except SystemExit as end:
    heavy = {"torch", "numpy", "transformers", "pandas", "matplotlib", "yaml"} & set(sys.modules)
    sys.exit(f"loaded {heavy}" if heavy else end.code)
"""


def test_the_commands_are_found() -> None:
    assert {"lowrank", "lowrank.report", "lowrank.tasks.pretrain", "lowrank.pi3.pretrain"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_loads_nothing_heavy(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", CODE, name], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
