"""What a notebook asks of a machine: the section `resources` of its set. A cluster's scheduler goes by it.

A set that says nothing gets `DEFAULTS`. What the section says goes for all notebooks of the set, and what it says under the
name of a notebook for that one: `resources: {gpus: 1, minutes: 120, 02_prehab: {minutes: 600}}`.
"""

from lowrank.report.parameters import COMMON, RESOURCES, ParameterError, read_set

DEFAULTS = {"memory_mb": 4000, "minutes": 60, "cpus": 1, "gpus": 0}


def resources(set_name: str, notebook: str) -> dict[str, int]:
    """Memory, run time, CPUs and GPUs of one notebook with one set.

    **Raises:** `ParameterError`: the section names a resource or a notebook that does not exist (the message lists those that
    do), or an amount that is not a whole number of at least 1, for GPUs 0.
    """
    sections = read_set(set_name)
    section = sections.get(RESOURCES, {})
    notebooks = sorted(set(sections) - {COMMON, RESOURCES})
    own = section.get(notebook, {})
    if not isinstance(own, dict):
        raise ParameterError(f"resources of {notebook!r} must be a mapping, got {own!r} in set {set_name!r}.")
    asked = DEFAULTS | {name: value for name, value in section.items() if name not in notebooks} | own
    if unknown := sorted(set(asked) - set(DEFAULTS)):
        known = [*DEFAULTS, *notebooks]
        raise ParameterError(f"resources must be among {known}, got {unknown} in set {set_name!r}.")
    for name, value in asked.items():
        least = min(1, DEFAULTS[name])
        if type(value) is not int or value < least:
            raise ParameterError(
                f"resource `{name}` must be a whole number >= {least}, got {value!r} in set {set_name!r}."
            )
    return asked
