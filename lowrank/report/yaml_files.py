"""Read YAML files of plain values, and refuse what YAML readers take in silence for something else, or never end with.

Keys are texts, each once in its mapping. A value must mean the same in YAML 1.1 and 1.2: `yes`, `1:30` and `1_000` are a
boolean and numbers in one of them only. Aliases may not multiply a small file into a large one.
"""

import math
import re
from pathlib import Path
from typing import Any

import yaml

from lowrank.report.errors import ParameterError

TAG = "tag:yaml.org,2002:"
MERGE = f"{TAG}merge"  # the key `<<`, which may override keys of the mapping it merges
INT, FLOAT = r"[-+]?(0|[1-9][0-9]{0,17})", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?"
BOOL, NULL = "true|True|TRUE|false|False|FALSE", "null|Null|NULL|~|"
PLAIN = {
    "str": ".*",
    "bool": BOOL,
    "null": NULL,
    "int": INT,
    "float": FLOAT,
    "merge": "<<",
}  # type -> how it is written
NUMBER = re.compile(
    rf"{INT}|[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|0o[0-7]+|0x[0-9a-fA-F]+"
)  # of YAML 1.2
LONGEST, MOST_BYTES, MOST_VALUES = 40, 1_000_000, 10_000


class _RefusedError(yaml.YAMLError):
    """Say what a file must not have."""


def read_yaml(path: Path) -> Any:
    """Read a YAML file of plain values.

    **Raises**

    - `ParameterError`: the file is too large, no YAML, nested too deeply, or multiplied by aliases; it asks for other objects
      than texts, numbers, booleans, lists and mappings; a key is no text, or comes twice in one mapping; a value is read in
      two ways.
    """
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise _RefusedError(f"be at most {MOST_BYTES} bytes long, got {size}")
        loader = yaml.SafeLoader(path.read_text(encoding="utf8"))
        try:
            if (node := loader.get_single_node()) is None:
                return None
            _check(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except _RefusedError as error:
        raise ParameterError(f"set file {path} must {error}.") from error
    except RecursionError:
        raise ParameterError(f"set file {path} must be nested less deeply, got a deeper one.") from None
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise ParameterError(f"set file {path} must be YAML: {' '.join(str(error).split())}") from error


def _check(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Return how many values a node stands for, with those of its aliases. A node that is not done has infinitely many."""
    if id(node) not in sizes:
        sizes[id(node)] = MOST_VALUES
        if isinstance(node, yaml.ScalarNode):
            _check_scalar(node)
            parts = []
        elif isinstance(node, yaml.MappingNode):
            _check_keys(node)
            parts = [part for pair in node.value for part in pair]
        else:
            parts = node.value
        if node.tag.removeprefix(TAG) not in {*PLAIN, "seq", "map"}:
            raise _RefusedError(f"hold plain values, got {node.tag!r} in {_line(node)}")
        sizes[id(node)] = 1 + sum(_check(part, sizes) for part in parts)
        if sizes[id(node)] >= MOST_VALUES:
            raise _RefusedError(f"hold less than {MOST_VALUES} values, aliases included, got more in {_line(node)}")
    return sizes[id(node)]


def _check_scalar(node: yaml.ScalarNode) -> None:
    kind, text = node.tag.removeprefix(TAG), node.value
    one = kind not in PLAIN or re.fullmatch(PLAIN[kind], text, re.DOTALL) is not None
    if kind == "str" and node.style is None:
        one = NUMBER.fullmatch(text) is None  # 1e-3 is a text in YAML 1.1
    if kind == "float" and one:
        one = math.isfinite(float(text))
    if not one:
        rule = "true, false, an integer, a decimal fraction as 1.0e-3, or a text in quotes"
        raise _RefusedError(f"have values that are read in one way ({rule}), got {text[:LONGEST]!r} in {_line(node)}")


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if not (isinstance(key, yaml.ScalarNode) and key.tag in (f"{TAG}str", MERGE)):
            value = key.value[:LONGEST] if isinstance(key, yaml.ScalarNode) else type(key).__name__
            raise _RefusedError(f"have texts as keys, got {value!r} in {_line(key)}")
        if key.tag != MERGE and key.value in seen:
            raise _RefusedError(f"have each key once, got {key.value[:LONGEST]!r} twice, again in {_line(key)}")
        seen.add(key.value)


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def write_yaml(values: dict[str, Any]) -> str:
    """Write plain values by name as YAML, in their order, so that `read_yaml` and papermill read the same values.

    **Arguments**

    - `values`: name -> text, number, boolean, or lists and mappings of them.

    **Returns** the text, a line per name where the value is no mapping.
    """
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=math.inf, allow_unicode=True)
