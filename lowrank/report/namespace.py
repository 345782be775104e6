"""Check the parameters that a notebook runs with, whoever set them, and name the folder of their results.

A runner, papermill on its own or a person at JupyterLab may set them. An unknown name would change nothing, and a text in the
place of a list would fail far from its cause.
"""

import ast
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lowrank.io.hashing import hash_options
from lowrank.report.errors import ParameterError
from lowrank.report.parameters import (
    COMMON,
    VARIANT,
    check_parameters,
    read_defaults,
    read_parameters,
    read_set,
    read_variant_value,
    section_name,
    set_names,
)

LONGEST_NAME = 120  # characters of a folder; file systems take 255 bytes, with what is put before and after it
OTHER = "parameters"  # SET@parameters=HASH, a combination that no variant can be written for
PLAIN_NAME = re.compile(r"[\w-][\w.,@=+-]*")


def read_namespace(notebook: str, namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Read the parameters of a running notebook, and check their names and types against its parameters cell.

    **Arguments**

    - `notebook`: stem of the notebook.
    - `namespace`: its `globals()`.

    **Returns** parameter name -> value, in the order of the parameters cell.

    **Raises**

    - `ParameterError`: a cell of nothing but values, at or right after the parameters cell, sets a name that is no parameter; a
      parameter is missing or has another type than its default; `set_name` is no plain name of a folder.
    """
    defaults = read_defaults(notebook)
    if missing := [name for name in defaults if name not in namespace]:
        raise ParameterError(f"`namespace` must have all parameters of {notebook!r}, got none for {missing}.")
    values = {name: namespace[name] for name in defaults}
    names = _assigned_names(namespace.get("In", ()), set(defaults))
    if {COMMON, section_name(notebook)} & set(names):
        raise ParameterError(
            f"parameters of {notebook!r} must be a flat file, got a whole set, which has a section for each notebook: write "
            f"the file with `lowrank params SET {notebook} > FILE`."
        )
    check_parameters(notebook, {name: namespace.get(name) for name in names} | values, "", _explain)
    if not PLAIN_NAME.fullmatch(values["set_name"]):
        raise ParameterError(
            f"parameter `set_name` of {notebook!r} must be letters, digits and any of -.,@=+, as it names a folder, got "
            f"{values['set_name']!r}."
        )
    return values


def _assigned_names(cells: Iterable[str], known: set[str]) -> list[str]:
    """Return the names that the last parameters cell sets, and the cells of nothing but values that follow it.

    **Arguments**

    - `cells`: the source of all cells that have run, as IPython keeps them in `In`.
    - `known`: the parameters. A cell that sets them all is the parameters cell.
    """
    names: list[str] = []
    reading = False
    for source in cells:
        targets = _literal_targets(source)
        if known <= set(targets):
            names, reading = [], True
        reading = reading and bool(targets)
        names += targets if reading else []
    return names


def _literal_targets(source: str) -> list[str]:
    """Return the names that a cell sets, none if it does anything else than setting names to literals."""
    targets: list[str] = []
    try:
        for node in ast.parse(source).body:
            places = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            targets += [place.id for place in places if isinstance(place, ast.Name)]
            ast.literal_eval(node.value)  # pyright: ignore[reportAttributeAccessIssue] (a node without one is refused)
    except (ValueError, SyntaxError, AttributeError, TypeError, RecursionError):
        return []
    return targets


def _explain(value: Any, default: Any) -> str:
    """Say how a value of this type is passed, if it is a text that looks like one, as YAML and `papermill -p` give it."""
    if isinstance(value, str) and isinstance(default, list | dict):
        return ": `papermill -p` passes no lists and mappings; give them in a YAML file with -f, or with -y"
    if isinstance(value, str) and type(default) in (int, float):
        return ": YAML takes 1e-3 and quoted numbers for texts; write 1.0e-3, without quotes"
    if isinstance(default, str):
        return ": `papermill -r` passes a number as a text; in YAML, quote it"
    return ""


def name_results(notebook: str, parameters: Mapping[str, Any]) -> str:
    """Return the name of the set or variant with these parameters, so that each combination gets a folder of its own.

    **Arguments**

    - `notebook`: stem of the notebook.
    - `parameters`: parameter name -> value, all of them.

    **Returns** `set_name` if the values are those of this set (for a name that is no set: the defaults). Else
    SET@NAME=VALUE, which the runner takes too; SET@parameters=HASH, if a value cannot be written so or the name is long.
    """
    name = parameters["set_name"]
    known = name.partition("@")[0] in set_names() and notebook in read_set(name)
    expected = read_parameters(name, notebook) if known else read_defaults(notebook)
    changes = {key: value for key, value in parameters.items() if key != "set_name" and value != expected[key]}
    if not changes:
        return name
    texts = {key: _write_value(value) for key, value in changes.items()}
    variant = "".join(f"@{key}={text}" for key, text in texts.items())
    read = {key: read_variant_value(text, expected[key]) for key, text in texts.items()}
    if VARIANT.fullmatch(variant) and read == changes and len(name + variant) <= LONGEST_NAME:
        return name + variant
    return f"{name}@{OTHER}={hash_options(changes)}"


def _write_value(value: Any) -> str:
    """Write a value as a variant has it."""
    if isinstance(value, list):
        return ",".join(map(_write_value, value))
    return value if isinstance(value, str) else repr(value)
