"""Read YAML files, and refuse a key that appears twice in one mapping, which YAML readers let win silently."""

from pathlib import Path
from typing import Any

import yaml

from lowrank.report.errors import ParameterError

MERGE = "tag:yaml.org,2002:merge"  # the key `<<`, which may override keys of the mapping it merges


class _DoubledKeyError(yaml.YAMLError):
    """Name a key that appears twice."""


class _Loader(yaml.SafeLoader):
    """Refuse doubled keys, at any depth."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
                value = self.construct_object(key)
                if value in seen:
                    raise _DoubledKeyError(f"{value!r} twice, again in line {key.start_mark.line + 1}")
                seen.add(value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """Read a YAML file of plain values.

    **Raises**

    - `ParameterError`: the file is not YAML, asks for Python objects, or has a key twice in one mapping.
    """
    try:
        return yaml.load(path.read_text(encoding="utf8"), _Loader)
    except _DoubledKeyError as error:
        raise ParameterError(f"set file {path} must have each key once, got {error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParameterError(f"set file {path} must be YAML: {' '.join(str(error).split())}") from error
