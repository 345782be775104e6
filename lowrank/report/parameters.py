"""Read parameter sets, and give each notebook its parameters.

A set is a file of params/, with a section for each notebook: its name without the number, as papermill makes Python names of
the keys of a file. A variant `SET@NAME=VALUE` is the set with one parameter changed (`@NAME=VALUE` again for more), for the
notebooks that have this parameter. Commas separate the items of a list. The results of a variant go to a folder with its name.
"""

import ast
import math
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lowrank.io.dependencies import ROOT
from lowrank.report.errors import ParameterError
from lowrank.report.yaml_files import read_yaml

NOTEBOOKS = ROOT / "notebooks"
SETS = ROOT / "params"
COMMON = "common"  # a section of a set file: its values go to every notebook that has such a parameter
RESOURCES = "resources"  # another section: what the notebooks need of a machine, see `lowrank.report.resources`
VARIANT = re.compile(r"(@[a-z_]+=[\w.,+-]+)*")


def notebook_names() -> list[str]:
    """Return the stems of all notebooks, sorted."""
    return sorted(path.stem for path in NOTEBOOKS.glob("[0-9][0-9]_*.py"))


def set_names() -> list[str]:
    """Return the names of all parameter sets, sorted."""
    return sorted(path.stem for path in SETS.glob("*.yaml"))


def notebook_path(name: str) -> Path:
    """Return the source file of a notebook.

    **Raises**

    - `ParameterError`: no such notebook; the message lists all notebooks. Or an installation without notebooks.
    """
    if not NOTEBOOKS.is_dir():
        raise ParameterError(
            f"`notebook` needs a clone of the project, which has the notebooks, got none at {str(ROOT)!r}."
        )
    if name not in notebook_names():
        raise ParameterError(f"`notebook` must be one of {notebook_names()}, got {name!r}.")
    return NOTEBOOKS / f"{name}.py"


def read_defaults(notebook: str) -> dict[str, Any]:
    """Read the parameters cell of a notebook: parameter name -> literal value.

    **Raises**

    - `ParameterError`: no such notebook, no parameters cell, or a cell with more than assignments of literals.
    """
    source = notebook_path(notebook).read_text(encoding="utf8")
    cells = f"\n{source}".split("\n# %%")
    cell = next((cell for cell in cells if cell.partition("\n")[0].strip() == 'tags=["parameters"]'), None)
    if cell is None:
        raise ParameterError(f"notebook {notebook!r} must have a cell tagged 'parameters'.")
    values: dict[str, Any] = {}
    try:
        for node in ast.parse(cell.partition("\n")[2]).body:
            if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
                raise ValueError(f"got {ast.unparse(node)!r}")
            values[node.targets[0].id] = ast.literal_eval(node.value)
    except (ValueError, SyntaxError, RecursionError) as error:
        reason = f"the parameters cell of {notebook!r} must hold assignments of literals only: {error}."
        raise ParameterError(reason) from error
    return values


def section_name(notebook: str) -> str:
    """Return the name that the section of a notebook has in a set file, for example 'whitening'."""
    return notebook.partition("_")[2]


def split_variant(name: str) -> tuple[str, dict[str, str]]:
    """Split the name of a set or variant into the name of the set and its changes, parameter name -> text.

    **Raises**

    - `ParameterError`: no such set (the message lists all sets), or a variant not written as `SET@NAME=VALUE`.
    """
    base, at, rest = name.partition("@")
    if base not in set_names():
        raise ParameterError(f"`set` must be one of {set_names()}, got {base!r}.")
    if not VARIANT.fullmatch(at + rest):
        raise ParameterError(f"`set` must be SET or SET@NAME=VALUE, with words, numbers or commas, got {name!r}.")
    return base, dict(change.split("=", 1) for change in rest.split("@") if change)


def read_set(name: str) -> dict[str, dict[str, Any]]:
    """Read the sections of a set: notebook -> parameters, and perhaps `common` and `resources`.

    **Arguments**

    - `name`: a set, or a variant, which has the sections of its set.

    **Raises**

    - `ParameterError`: no such set, a file that is not a YAML mapping of mappings, a key that appears twice in one mapping, or
      an unknown section.
    """
    path = SETS / f"{split_variant(name)[0]}.yaml"
    content = read_yaml(path)
    if not (isinstance(content, dict) and all(isinstance(section, dict) for section in content.values())):
        raise ParameterError(f"set file {path} must map sections to parameters, got {type(content).__name__}.")
    names = {section_name(notebook): notebook for notebook in notebook_names()} | {COMMON: COMMON, RESOURCES: RESOURCES}
    if unknown := sorted(set(content) - set(names), key=str):
        raise ParameterError(f"sections of set file {path} must be among {sorted(names)}, got {unknown}.")
    return {names[section]: values for section, values in content.items()}


def read_variant_value(text: str, default: Any) -> Any:
    """Read a value of a variant as the type of the default.

    **Arguments**

    - `text`: the value, as the variant has it. Commas separate the items of a list.
    - `default`: the default of the parameter.

    **Returns** the value; text that does not fit is returned as it is.
    """
    if isinstance(default, list):
        return [read_variant_value(item, default[0] if default else None) for item in text.split(",")]
    if isinstance(default, str):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _fits(value: Any, default: Any) -> bool:
    """Return True if a value has the type of the default. An int fits a float; items of a list fit its first item."""
    if isinstance(default, float) and not isinstance(value, bool):
        return isinstance(value, int | float) and math.isfinite(value)
    if isinstance(default, list) and isinstance(value, list):
        return not default or all(_fits(item, default[0]) for item in value)
    return type(value) is type(default)


def check_parameters(
    notebook: str, values: Mapping[str, Any], place: str, explain: Callable[[Any, Any], str] = lambda value, default: ""
) -> None:
    """Check names and types of parameters against the parameters cell of a notebook.

    **Arguments**

    - `notebook`: stem of the notebook.
    - `values`: parameter name -> value.
    - `place`: what follows the value in an error, such as " in set 'a'".
    - `explain`: (value, default) -> what follows an error about the type. Default: nothing.

    **Raises**

    - `ParameterError`: a parameter does not exist (the message lists those that do, and the nearest one) or has another type
      than its default.
    """
    defaults = read_defaults(notebook)
    if unknown := sorted(set(values) - set(defaults)):
        near = [name for wrong in unknown for name in get_close_matches(wrong, defaults, 1)]
        question = f": did you mean {', '.join(map(repr, near))}?" if near else "."
        raise ParameterError(
            f"parameters of {notebook!r} must be among {sorted(defaults)}, got {unknown}{place}{question}"
        )
    for name, value in values.items():
        if not _fits(value, default := defaults[name]):
            raise ParameterError(
                f"parameter `{name}` of {notebook!r} must be of type {type(default).__name__} (as {default!r}), "
                f"got {value!r}{place}{explain(value, default)}."
            )


def read_parameters(set_name: str, notebook: str) -> dict[str, Any]:
    """Read all parameters of one notebook in one set.

    Later sources win: the defaults of the notebook, the section `common`, the section of the notebook, the variant.

    **Arguments**

    - `set_name`: a set or a variant.
    - `notebook`: stem of the notebook.

    **Returns** parameter name -> value, `set_name` included.

    **Raises**

    - `ParameterError`: the set has no section for the notebook; a parameter does not exist (the message lists those that do)
      or has another type than its default.
    """
    default_values = read_defaults(notebook)
    sections = read_set(set_name)
    if notebook not in sections:
        notebooks = sorted(set(sections) - {COMMON, RESOURCES})
        raise ParameterError(f"`notebook` must be one of {notebooks} in set {set_name!r}, got {notebook!r}.")
    common, specific, changes = sections.get(COMMON, {}), sections[notebook], split_variant(set_name)[1]
    anywhere = {name for other in notebook_names() for name in read_defaults(other)}
    place = f" in set {set_name!r}"
    check_parameters(notebook, dict.fromkeys(set(common) - anywhere | set(changes) - set(default_values)), place)
    values = {name: value for name, value in common.items() if name in default_values} | specific
    values |= {name: read_variant_value(text, default_values[name]) for name, text in changes.items()}
    values |= {"set_name": set_name}
    check_parameters(notebook, values, place)
    return default_values | values


def jobs(sets: list[str]) -> list[tuple[str, str]]:
    """List every pair (set, notebook) of some sets; for a variant, the notebooks that have the parameters it changes.

    **Raises**

    - `ParameterError`: no notebook of a variant's set has all the parameters that it changes.
    """
    pairs = []
    for name in sets:
        changed = set(split_variant(name)[1])
        notebooks = [n for n in notebook_names() if n in read_set(name) and changed <= set(read_defaults(n))]
        if changed and not notebooks:
            raise ParameterError(f"`set` must change parameters of one of its notebooks, got {name!r}.")
        pairs += [(name, notebook) for notebook in notebooks]
    return pairs
