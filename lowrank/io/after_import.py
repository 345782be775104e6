"""Import a module of this package once another library is imported, so that neither is loaded before it is needed."""

import importlib
import sys
import warnings
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class _Follower:
    """Import a module right after the code of another one has run; part of `sys.meta_path`."""

    def __init__(self, watched: str, follower: str) -> None:
        self.watched, self.follower = watched, follower

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find the watched module as Python does, and add the import; leave all other modules to Python."""
        spec = PathFinder.find_spec(name, path, target) if name == self.watched else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_both(module: ModuleType) -> None:
            execute(module)
            _import_or_warn(self.follower)

        setattr(spec.loader, "exec_module", execute_both)  # noqa: B010 (of this import only: each has a loader of its own)
        return spec


def follow_import(watched: str, follower: str) -> None:
    """Import a module as soon as another one is imported, or now if it already is.

    **Arguments**

    - `watched`: dotted name of the module to wait for.
    - `follower`: dotted name of the module to import after it.
    """
    if watched in sys.modules:
        _import_or_warn(follower)
    else:
        sys.meta_path.insert(0, _Follower(watched, follower))


def _import_or_warn(name: str) -> None:
    """Import a module; one that does not fit the versions of other packages must not stop those from being imported."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        warnings.warn(f"{name} could not be imported, what it adds is not there: {error}", RuntimeWarning, stacklevel=3)
