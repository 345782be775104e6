"""Parameter sets and the notebooks they fill: which exist, what they may set, and what a notebook gets in the end.

A variant `SET@NAME=VALUE` is the set with one parameter changed (`@NAME=VALUE` again for more), for the notebooks that have
it. The items of a list are separated by commas. Its name is that of its folder of results.
"""

import ast
import re
from pathlib import Path
from typing import Any

import yaml

from lowrank.io.dependencies import ROOT

NOTEBOOKS = ROOT / "notebooks"
SETS = ROOT / "params"
COMMON = "common"  # a section of a set file whose values go to every notebook that has such a parameter
RESOURCES = "resources"  # another, which says what the notebooks ask of a machine, see `lowrank.report.resources`
VARIANT = re.compile(r"(@[a-z_]+=[\w.,+-]+)*")


class ParameterError(ValueError):
    """A set, a notebook or a parameter that is not as it must be."""


def notebook_names() -> list[str]:
    """The stems of all notebooks."""
    return sorted(path.stem for path in NOTEBOOKS.glob("[0-9][0-9]_*.py"))


def set_names() -> list[str]:
    """The names of all parameter sets."""
    return sorted(path.stem for path in SETS.glob("*.yaml"))


def notebook_path(name: str) -> Path:
    """The source of a notebook.

    **Raises:** `ParameterError`: no such notebook; the message lists the known ones.
    """
    if name not in notebook_names():
        raise ParameterError(f"`notebook` must be one of {notebook_names()}, got {name!r}.")
    return NOTEBOOKS / f"{name}.py"


def defaults(notebook: str) -> dict[str, Any]:
    """The parameters cell of a notebook: every name with its literal value."""
    source = notebook_path(notebook).read_text(encoding="utf8")
    cells = f"\n{source}".split("\n# %%")
    cell = next((cell for cell in cells if cell.partition("\n")[0].strip() == 'tags=["parameters"]'), None)
    if cell is None:
        raise ParameterError(f"notebook {notebook!r} must have a cell tagged 'parameters'.")
    found: dict[str, Any] = {}
    for node in ast.parse(cell.partition("\n")[2]).body:
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            raise ParameterError(f"the parameters cell of {notebook!r} must hold assignments of literals only.")
        found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


def variation(name: str) -> tuple[str, dict[str, str]]:
    """The set that a name is of, and the parameters that a variant changes, as text.

    **Raises:** `ParameterError`: no such set (the message lists the known ones), or a variant that is not written as
    `SET@NAME=VALUE`.
    """
    base, at, rest = name.partition("@")
    if base not in set_names():
        raise ParameterError(f"`set` must be one of {set_names()}, got {base!r}.")
    if not VARIANT.fullmatch(at + rest):
        raise ParameterError(f"`set` must be SET or SET@NAME=VALUE, with words, numbers or commas, got {name!r}.")
    return base, dict(change.split("=", 1) for change in rest.split("@") if change)


def read_set(name: str) -> dict[str, dict[str, Any]]:
    """The sections of a set file, or of the set of a variant: notebook -> parameters, perhaps `common` and `resources`.

    **Raises:** `ParameterError`: no such set, a file that is not a YAML mapping of mappings, or a section that is not of
    these.
    """
    path = SETS / f"{variation(name)[0]}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParameterError(f"set file {path} must be YAML: {' '.join(str(error).split())}") from error
    if not (isinstance(content, dict) and all(isinstance(section, dict) for section in content.values())):
        raise ParameterError(f"set file {path} must map notebook names to parameters, got {type(content).__name__}.")
    sections = [*notebook_names(), COMMON, RESOURCES]
    if unknown := sorted(set(content) - set(sections), key=str):
        raise ParameterError(f"sections of set file {path} must be among {sections}, got {unknown}.")
    return content


def _read(text: str, default: Any) -> Any:
    """A value of a variant, as a parameters cell would hold it in the place of the default."""
    if isinstance(default, list):
        return [_read(item, default[0] if default else None) for item in text.split(",")]
    if isinstance(default, str):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _fits(value: Any, default: Any) -> bool:
    """A value has the type of the default; an int will do for a float; the items of a list have the type of the first."""
    if isinstance(default, float) and not isinstance(value, bool):
        return isinstance(value, int | float)
    if isinstance(default, list) and isinstance(value, list):
        return not default or all(_fits(item, default[0]) for item in value)
    return type(value) is type(default)


def parameters(set_name: str, notebook: str) -> dict[str, Any]:
    """All parameters of one notebook in one set: its defaults, then `common`, its own section, and what a variant changes.

    **Raises:** `ParameterError`: the set does not name the notebook, or sets a parameter that does not exist (the
    message lists those that do) or has another type.
    """
    known = defaults(notebook)
    sections = read_set(set_name)
    if notebook not in sections:
        named = sorted(set(sections) - {COMMON, RESOURCES})
        raise ParameterError(f"`notebook` must be one of {named} in set {set_name!r}, got {notebook!r}.")
    common, own, varied = sections.get(COMMON, {}), sections[notebook], variation(set_name)[1]
    everywhere = {name for other in notebook_names() for name in defaults(other)}
    if unknown := sorted((set(own) | set(varied)) - set(known) | (set(common) - everywhere)):
        raise ParameterError(
            f"parameters of {notebook!r} must be among {sorted(known)}, got {unknown} in set {set_name!r}."
        )
    given = {name: value for name, value in common.items() if name in known} | own
    given |= {name: _read(text, known[name]) for name, text in varied.items()} | {"set_name": set_name}
    for name, value in given.items():
        if not _fits(value, known[name]):
            raise ParameterError(
                f"parameter `{name}` of {notebook!r} must be of type {type(known[name]).__name__} (as {known[name]!r}), "
                f"got {value!r} in set {set_name!r}."
            )
    return known | given


def jobs(sets: list[str]) -> list[tuple[str, str]]:
    """Every (set, notebook) that exists among the given sets; of a variant, those that have what it changes.

    **Raises:** `ParameterError`: no notebook of a variant's set has all the parameters that it changes.
    """
    found = []
    for name in sets:
        changed = set(variation(name)[1])
        own = [n for n in notebook_names() if n in read_set(name) and changed <= set(defaults(n))]
        if changed and not own:
            raise ParameterError(f"`set` must change parameters of one of its notebooks, got {name!r}.")
        found += [(name, notebook) for notebook in own]
    return found
