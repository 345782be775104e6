"""Hashes of tensors: what they depend on, and that those of former versions are still known."""

import pytest
import torch

from lowrank.io.hashing import hash_tensors

TENSORS = {
    "b": torch.arange(6.0).reshape(2, 3),
    "a": torch.ones(3, dtype=torch.bfloat16),
    "c": torch.tensor(True),
}


@pytest.mark.parametrize(
    ("digits", "value"), [(32, "21516dfac03f3a65c4a2a2b34632a0a9"), (16, "c488965ca36c1ff3")], ids=["XXH3", "BLAKE2b"]
)
def test_hashes_stay_what_files_of_former_versions_hold(digits, value) -> None:
    assert hash_tensors(TENSORS, digits) == value
    assert hash_tensors(dict(reversed(TENSORS.items())), digits) == value


@pytest.mark.parametrize(
    "changed",
    [
        {"b": TENSORS["b"].T.contiguous()},
        {"b": TENSORS["b"].nextafter(torch.tensor(9.0))},
        {"b": TENSORS["b"].int()},
        {"d": TENSORS["c"]},
    ],
    ids=["shape", "last digit", "dtype", "name"],
)
@pytest.mark.parametrize("digits", [32, 16])
def test_hashes_depend_on_everything(changed, digits) -> None:
    assert hash_tensors(TENSORS | changed, digits) != hash_tensors(TENSORS, digits)


def test_layout_and_strides_do_not_matter() -> None:
    other = TENSORS | {"b": TENSORS["b"].T.contiguous().T, "a": TENSORS["a"].to_sparse()}
    assert hash_tensors(other) == hash_tensors(TENSORS)
