"""Say whether two runs agree: their verdicts, and the numbers that they print."""

import re
from itertools import zip_longest

from lowrank.report.inference import INCONCLUSIVE, REFUTED, SUPPORTED

VERDICTS = (SUPPORTED, REFUTED, INCONCLUSIVE)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
TRAINING_FREE = 2e-3  # relative, of printed numbers that no training goes into
AFTER_TRAINING = 0.2  # relative, of those that training amplifies


def verdicts_agree(one: str, other: str) -> bool:
    """Return whether two verdicts agree: equal ones do, and an inconclusive one does with any other.

    **Arguments**

    - `one`, `other`: each one of `VERDICTS`.
    """
    return one == other or INCONCLUSIVE in (one, other)


def settle_text(text: str, reference: str, tolerance: float = TRAINING_FREE) -> str:
    """Replace the lines that agree with those of another run by the other's.

    Two lines agree if they differ in nothing but numbers within the tolerance, or in nothing but verdicts that agree.

    **Arguments**

    - `text`: printed lines.
    - `reference`: what the other run printed.
    - `tolerance`: relative, of numbers; one unit of the last printed digit is added to it.

    **Returns** the text; lines that do not agree stay as they are.
    """
    lines, others = text.splitlines(keepends=True), reference.splitlines(keepends=True)
    pairs = zip_longest(lines, others[: len(lines)], fillvalue="")
    return "".join(other if _lines_agree(line, other, tolerance) else line for line, other in pairs)


def _lines_agree(line: str, other: str, tolerance: float) -> bool:
    (one, _, claim), (another, _, same) = line.partition(": "), other.partition(": ")
    if claim and claim == same and {one, another} <= set(VERDICTS):
        return verdicts_agree(one, another)
    if NUMBER.sub("#", line) != NUMBER.sub("#", other):
        return False
    pairs = zip(NUMBER.findall(line), NUMBER.findall(other), strict=True)
    return all(_numbers_agree(here, there, tolerance) for here, there in pairs)


def _numbers_agree(one: str, other: str, tolerance: float) -> bool:
    here, there = (float(text.replace(",", "")) for text in (one, other))
    digits = [digit for digit in map(_last_digit, (one, other)) if digit]
    return abs(here - there) <= tolerance * abs(there) + min(digits, default=0.0) * (1 + 1e-9)


def _last_digit(text: str) -> float:
    """Return the value of one unit of the last digit; 0 of a whole number, which is a count."""
    mantissa, _, exponent = text.replace(",", "").partition("e")
    _, point, decimals = mantissa.partition(".")
    return 10.0 ** (int(exponent or 0) - len(decimals)) if point or exponent else 0.0
