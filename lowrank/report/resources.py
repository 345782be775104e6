"""Read what a notebook needs of a machine, for the scheduler of a cluster.

The section `resources` of a set overrides `DEFAULTS` for all notebooks of the set. Inside it, the section of a notebook
overrides both for this notebook: `resources: {gpus: 1, minutes: 120, prehab: {minutes: 600}}`.
"""

from lowrank.report.errors import ParameterError
from lowrank.report.parameters import COMMON, RESOURCES, read_set, section_name

DEFAULTS = {"memory_mb": 4000, "minutes": 60, "cpus": 1, "gpus": 0}


def read_resources(set_name: str, notebook: str) -> dict[str, int]:
    """Read the memory, run time, CPUs and GPUs that one notebook needs with one set.

    **Arguments**

    - `set_name`: a set or a variant.
    - `notebook`: stem of the notebook.

    **Returns** `memory_mb`, `minutes`, `cpus` and `gpus`.

    **Raises**

    - `ParameterError`: a resource or a notebook of the section does not exist (the message lists those that do), or an amount
      is not a whole number >= 1, for `gpus` >= 0.
    """
    sections = read_set(set_name)
    section = sections.get(RESOURCES, {})
    notebooks = sorted(section_name(other) for other in set(sections) - {COMMON, RESOURCES})
    specific = section.get(section_name(notebook), {})
    if not isinstance(specific, dict):
        raise ParameterError(f"resources of {notebook!r} must be a mapping, got {specific!r} in set {set_name!r}.")
    amounts = DEFAULTS | {name: value for name, value in section.items() if name not in notebooks} | specific
    if unknown := sorted(set(amounts) - set(DEFAULTS)):
        raise ParameterError(f"resources must be among {[*DEFAULTS, *notebooks]}, got {unknown} in set {set_name!r}.")
    for name, value in amounts.items():
        least = min(1, DEFAULTS[name])
        if type(value) is not int or value < least:
            raise ParameterError(
                f"resource `{name}` must be a whole number >= {least}, got {value!r} in set {set_name!r}."
            )
    return amounts
