"""Which tensors are one: views, dtypes, empty and meta ones; bytes and elements count once; models come back the same."""

import pytest
import torch
from torch import Tensor, nn

from lowrank.compression.checkpoint import load_compressed, save_compressed
from lowrank.compression.replace import replace_layers
from lowrank.io.tensor_places import byte_range, count_bytes, count_elements, tensor_place
from lowrank.io.weights import distinct_tensors
from lowrank.nn.targets import find_shared_weights

BASE = torch.arange(36, dtype=torch.float32).view(6, 6)
EMPTY, META = torch.empty(0, 3), torch.empty(6, 6, device="meta")
# a pair of tensors, whether they are one, and the bytes of both
PAIRS: dict[str, tuple[Tensor, Tensor, bool, int]] = {
    "one": (BASE, BASE.detach(), True, 144),
    "transposed": (BASE, BASE.T, False, 144),
    "first rows": (BASE, BASE[:2], False, 144),
    "last rows": (BASE[4:], BASE, False, 144),
    "apart in one storage": (BASE[:2], BASE[4:], False, 96),
    "overlapping rows": (BASE[:4], BASE[2:], False, 144),
    "another dtype": (BASE, BASE.view(torch.int32), False, 144),
    "another shape": (BASE, BASE.view(36), False, 144),
    "expanded": (BASE[0].expand(6, 6), BASE[0], False, 24),
    "a copy": (BASE, BASE.clone(), False, 288),
    "empty": (EMPTY, EMPTY.detach(), True, 0),
    "two empty": (EMPTY, torch.empty(0, 3), False, 0),
    "meta": (META, META.detach(), True, 144),
    "two meta": (META, torch.empty(6, 6, device="meta"), False, 288),
    "sparse": (BASE.to_sparse(), BASE.to_sparse(), False, 288),
}


@pytest.mark.parametrize("case", PAIRS)
def test_two_tensors_are_one_only_if_nothing_tells_them_apart(case) -> None:
    a, b, same, size = PAIRS[case]
    assert (tensor_place(a) == tensor_place(b)) is same
    assert count_bytes([a, b]) == count_bytes([b, a, a]) == size
    assert count_elements([a, b, a]) == a.numel() + (0 if same else b.numel())


def test_a_range_covers_what_a_tensor_reaches() -> None:
    storage, first, last = byte_range(BASE[1:3, 2:4])
    assert (storage, first, last) == (byte_range(BASE)[0], 4 * 8, 4 * 16)


class Shared(nn.Module):
    """Parameters and buffers over one storage, as views that a way of making them gives."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)])
        first, second = self.blocks
        whole = torch.randn(8, 6)
        views = {
            "tied": lambda: setattr(second, "weight", first.weight),
            "tied storage": lambda: setattr(second, "weight", nn.Parameter(first.weight.data)),
            "transposed": lambda: setattr(second, "weight", nn.Parameter(first.weight.data.T)),
            "rows": lambda: [
                setattr(x, "weight", nn.Parameter(whole[i : i + 6])) for x, i in ((first, 0), (second, 2))
            ],
            "buffer": lambda: self.register_buffer("again", first.weight.data.view(torch.int32)),
        }
        views[kind]()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


KINDS = ("tied", "tied storage", "transposed", "rows", "buffer")


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_share_a_storage_comes_back_from_a_file(kind, tmp_path) -> None:
    torch.manual_seed(0)
    model, x = Shared(kind).eval(), torch.randn(5, 6)
    save_compressed(model, tmp_path / "saved")
    loaded = load_compressed(tmp_path / "saved", architecture=Shared(kind))
    assert torch.allclose(loaded(x), model(x), rtol=0, atol=1e-6)  # strides choose how products are rounded
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    _, tied = distinct_tensors(model)
    assert bool(tied) is kind.startswith("tied")
    assert (loaded.blocks[0].weight is loaded.blocks[1].weight) is kind.startswith("tied")


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_whose_storage_others_use_is_not_replaced(kind) -> None:
    model = Shared(kind)
    shared = find_shared_weights(model, {"blocks.0": model.blocks[0]})
    names = shared["blocks.0"]
    assert sorted(names)[0 if kind != "buffer" else 1] == "blocks.0.weight"
    assert len(names) == 2
    with pytest.raises(ValueError, match=rf"`ranks` must leave out layer 'blocks.0'.*{names[1]}"):
        replace_layers(model, {"blocks.0": 2}, "svd")


def test_parts_of_one_storage_that_do_not_overlap_are_not_shared() -> None:
    model, whole = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), torch.randn(12, 6)
    for layer, weight in zip(model, whole.split(6), strict=True):
        layer.weight = nn.Parameter(weight)
    assert find_shared_weights(model, dict(model.named_children())) == {}
