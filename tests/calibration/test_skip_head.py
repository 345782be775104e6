"""Passes that end before the output head give the same statistics."""

import pytest
import torch
import transformers
from torch import Tensor, nn

from lowrank.calibration.collect import collect_statistics


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=50)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()


def batches() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(0, 50, (8, 30))} for _ in range(4)]


def calls_of_the_head(model: nn.Module, layers) -> tuple[int, dict]:
    calls = []
    handle = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    found = collect_statistics(model, batches(), layers)
    handle.remove()
    return len(calls), found


def test_only_the_first_pass_runs_through_the_head() -> None:
    model = llama()
    count, found = calls_of_the_head(model, ["model.layers.*"])
    assert count == 1
    model.get_output_embeddings = lambda: None
    count, whole = calls_of_the_head(model, ["model.layers.*"])
    assert count == 4
    for name, layer in whole.items():
        assert (found[name].tokens, layer.tokens) == (960, 960)
        assert torch.equal(found[name].gram, layer.gram)


def test_a_head_that_is_watched_is_run() -> None:
    count, found = calls_of_the_head(llama(), ["model.layers.*", "lm_head"])
    assert (count, found["lm_head"].tokens) == (4, 960)


class HeadFirst(nn.Module):
    """A head that is called before the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(6, 9)
        self.blocks = nn.ModuleList([nn.Linear(9, 6)])

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](self.lm_head(x))


@pytest.mark.filterwarnings("ignore::lowrank.calibration.collect.FewTokensWarning")
def test_a_head_that_is_not_the_last_is_run() -> None:
    parts = [torch.randn(5, 6) for _ in range(3)]
    assert collect_statistics(HeadFirst().eval(), parts, ["blocks.*"])["blocks.0"].tokens == 15


def test_an_error_behind_the_head_is_still_an_error() -> None:
    model = llama()
    model.lm_head.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken head")))
    with pytest.raises(RuntimeError, match="broken head"):
        collect_statistics(model, batches(), ["model.layers.*"])
