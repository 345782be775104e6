"""Division by name: complete, disjoint, near the share that is asked for, the same in every order and on every machine."""

import pytest

from lowrank.tasks.splits import halve, part_of

NAMES = [f"sample {i}" for i in range(4000)]


def test_the_halves_are_disjoint_complete_in_order_and_near_half() -> None:
    one, two = halve(NAMES)
    assert sorted(one + two) == list(range(len(NAMES)))
    assert one == sorted(one)
    assert two == sorted(two)
    assert abs(len(one) - len(two)) < 4 * len(NAMES) ** 0.5  # four standard deviations


def test_a_name_gets_into_the_same_half_wherever_it_stands_and_whatever_else_there_is() -> None:
    sides = [{NAMES[i] for i in half} for half in halve(NAMES)]
    backwards = NAMES[::-1][:999]
    for side, half in zip(sides, halve(backwards), strict=True):
        assert {backwards[i] for i in half} == side & set(backwards)
    one, _ = halve(NAMES[:20] * 2)
    assert all((i in one) == (i + 20 in one) for i in range(20))


def test_the_division_is_the_published_one() -> None:
    assert [part_of(name, 5) for name in ("a", "b", "numpy/linalg/_linalg.py", "")] == [3, 4, 4, 0]
    assert [part_of(name, 5, salt="test") for name in ("a", "b", "numpy/linalg/_linalg.py", "")] == [2, 1, 4, 1]


def test_parts_are_of_equal_size_and_divisions_of_other_salts_independent() -> None:
    pairs = [(part_of(name, 5), part_of(name, 5, salt="test")) for name in NAMES]
    expected = len(NAMES) / 25
    assert all(abs(pairs.count((i, j)) - expected) < 5 * expected**0.5 for i in range(5) for j in range(5))


@pytest.mark.parametrize("names", [[], ["a"], ["a"] * 5])
def test_a_half_is_never_empty(names: list[str]) -> None:
    with pytest.raises(ValueError, match="`names` must fall into two halves, got"):
        halve(names)
