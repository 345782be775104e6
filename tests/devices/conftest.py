"""The devices that all checks of this folder run on: the virtual accelerator, and a GPU if there is one."""

from collections.abc import Iterator

import pytest
import torch
import virtual_accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState


@pytest.fixture(params=["virtual", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "virtual":
        return virtual_accelerator.register()
    if not torch.cuda.is_available():
        pytest.skip("no GPU on this machine")
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda", 0)


@pytest.fixture
def trainer(device: torch.device) -> Iterator[torch.device]:
    """The device, as the one that accelerate trains on: it knows none of Python's backends."""
    PartialState()
    PartialState._shared_state["device"] = device
    yield device
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
