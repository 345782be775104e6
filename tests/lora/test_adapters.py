"""Adapters on frozen models: how each start begins, that it comes back from disk, and a model whose files bear other names."""

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank.io.weights import read_tensors
from lowrank.lora.adapters import add_adapter, load_adapter, load_model
from lowrank.lora.deltas import delta_spectra
from lowrank.lora.rank_config import RankConfig
from lowrank.lora.ranks import uniform_ranks

BATCH = torch.arange(24).reshape(3, 8)


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, intermediate_size=24, **sizes))


def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification  # noqa: PLC0415

    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    return BertForSequenceClassification(BertConfig(vocab_size=64, **sizes))


def vision_language() -> Any:
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig  # noqa: PLC0415

    rope = {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"}
    text = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, rope_scaling=rope)
    text |= dict(intermediate_size=24, vocab_size=64, bos_token_id=0, eos_token_id=1)
    vision = dict(depth=2, hidden_size=16, num_heads=2, intermediate_size=24, out_hidden_size=16)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision | {"fullatt_block_indexes": [1]})
    return AutoModelForImageTextToText.from_config(config)


MODELS = {"llama": llama, "bert": bert, "vision-language": vision_language}


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path, Path, dict[str, Any]]:
    """A model class, a base and a tuned folder, and the spectra of what changed: rank 3 in each layer, and the head."""
    torch.manual_seed(0)
    base = MODELS[request.param]()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.dim() == 2 and re.search(r"layers?\.\d+\.", name):
                parameter += 0.1 * torch.randn(parameter.shape[0], 3) @ torch.randn(3, parameter.shape[1])
            elif name.startswith("classifier"):
                parameter += 1.0
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    layers = [r".*layers?\.\d+\..*"]  # not those of the vision tower, which text does not reach
    spectra = delta_spectra(tmp_path / "base", tmp_path / "tuned", layers, progress=False)
    return type(base), tmp_path / "base", tmp_path / "tuned", spectra


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=BATCH).logits


def exact(spectra: dict[str, Any]) -> RankConfig:
    return RankConfig.from_ranks(spectra, dict.fromkeys(spectra, 3), {"rule": "by hand"})


def test_starts_begin_where_they_should(case: Any) -> None:
    kind, base, tuned, spectra = case
    head = ["classifier"] if kind.__name__.startswith("Bert") else None
    expected = {folder: outputs(load_model(folder, kind)) for folder in (base, tuned)}
    assert not torch.allclose(expected[base], expected[tuned], atol=1e-2)
    for start, folder in (("zero", base), ("pissa", base), ("eva", base), ("warm", tuned)):
        model = add_adapter(
            load_model(base, kind),
            exact(spectra),
            start=start,
            base=base,
            tuned=tuned,
            batches=[{"input_ids": BATCH, "labels": BATCH}] * 3,
            scaling=0.5,
            modules_to_save=head,
        )
        torch.testing.assert_close(outputs(model), expected[folder], atol=2e-4, rtol=1e-3)
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained
        assert all("lora_" in name or "classifier" in name for name in trained)


def test_an_adapter_comes_back_and_others_take_its_place(case: Any, tmp_path: Path) -> None:
    kind, base, tuned, spectra = case
    configs = {
        "exact": exact(spectra),
        "uniform": RankConfig.from_ranks(
            spectra, uniform_ranks({n: s.shape for n, s in spectra.items()}, 600), {"rule": "uniform"}
        ),
    }
    expected = {}
    for name, config in configs.items():
        model = add_adapter(load_model(base, kind), config, start="warm", base=base, tuned=tuned)
        assert model.get_nb_trainable_parameters()[0] == config.parameters
        model.save_pretrained(tmp_path / name)
        expected[name] = outputs(model)
    assert not torch.allclose(expected["exact"], expected["uniform"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_adapter(load_model(base, kind), tmp_path / "exact", "exact")
        assert load_adapter(model, tmp_path / "uniform", "uniform") is model
    with pytest.raises(ValueError, match="adapter_config.json"):
        load_adapter(load_model(base, kind), base)
    for name in ("exact", "uniform", "exact"):
        model.set_adapter(name)
        torch.testing.assert_close(outputs(model), expected[name])


def test_files_with_other_names_than_the_modules_are_matched(tmp_path: Path) -> None:
    model = vision_language()
    model.save_pretrained(tmp_path)
    spectra = delta_spectra(tmp_path, doubled(tmp_path), progress=False)
    names = exact(spectra).find_modules(model)
    assert names["model.layers.1.mlp.up_proj"] == "model.language_model.layers.1.mlp.up_proj"
    assert names["visual.blocks.0.mlp.up_proj"] == "model.visual.blocks.0.mlp.up_proj"
    assert len(set(names.values())) == len(names) == len(spectra)
    twins = nn.ModuleDict({"a": model.model.language_model, "b": copy.deepcopy(model.model.language_model)})
    one = RankConfig.from_ranks(spectra, {"model.layers.1.mlp.up_proj": 2}, {"rule": "by hand"})
    with pytest.raises(ValueError, match=r"should be \(24, 16\), got 'a.layers.1.mlp.up_proj' and 'b.layers"):
        one.find_modules(twins)
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.up_proj' should be \(24, 16\), got none"):
        one.find_modules(bert())


def doubled(folder: Path) -> Path:
    """Another checkpoint with all weights doubled."""
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    save_file({n: 2 * t for n, t in load_file(folder / "model.safetensors").items()}, folder / "doubled.safetensors")
    return folder / "doubled.safetensors"


def test_checkpointing_changes_no_gradient(case: Any) -> None:
    kind, base, _, spectra = case
    gradients = []
    for checkpointing in (False, True):
        frozen = load_model(base, kind, gradient_checkpointing=checkpointing)
        model = add_adapter(frozen, exact(spectra), start="pissa").train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model(input_ids=BATCH).logits.square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_refusals(case: Any, tmp_path: Path) -> None:
    kind, base, tuned, spectra = case
    config, model = exact(spectra), load_model(base, kind)
    with pytest.raises(ValueError, match=r"`start` must be one of \['eva', 'pissa', 'warm', 'zero'\], got 'cold'"):
        add_adapter(model, config, start="cold")
    with pytest.raises(ValueError, match="`base` and `tuned` must name the two checkpoints for `start` 'warm'"):
        add_adapter(model, config, start="warm", base=base)
    with pytest.raises(ValueError, match="`batches` must have inputs for `start` 'eva', got none"):
        add_adapter(model, config, start="eva")
    mixed = RankConfig.from_ranks(spectra, {n: 2 + i % 2 for i, n in enumerate(spectra)}, {"rule": "by hand"})
    with pytest.raises(ValueError, match=r"`config` must have one rank for all modules .* got \[2, 3\]"):
        add_adapter(model, mixed, start="eva", batches=[{"input_ids": BATCH}])
    with pytest.raises(ValueError, match="`scaling` must be left out if `lora_alpha` is set, got 1 and 16"):
        add_adapter(model, config, scaling=1, lora_alpha=16)
    assert not any("lora" in name for name, _ in model.named_modules())
    with pytest.raises(ValueError, match=r"`quantised` must be '' or one of \['4bit', '8bit'\], got '3bit'"):
        load_model(base, kind, quantised="3bit")
    with pytest.raises(FileNotFoundError, match="model .* could not be loaded"):
        load_model(tmp_path / "nowhere", kind)
    with pytest.raises(ValueError, match="`modules` must have parameters in `source`, got 'lost'"):
        read_tensors(tuned, ["lost"])


def test_a_start_from_inputs_sees_no_padding_of_either_sequence() -> None:
    """Source and target have one length; what is on their padding may be anything."""
    from transformers import BartConfig, BartForConditionalGeneration  # noqa: PLC0415

    sizes = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    torch.manual_seed(0)
    base = BartForConditionalGeneration(
        BartConfig(vocab_size=64, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, **sizes)
    ).eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    spectra = delta_spectra(base, tuned, [r".*layers\.0\.(fc1|encoder_attn\.k_proj)"], progress=False)
    ids = torch.randint(3, 60, (6, 10))
    masks = {"attention_mask": torch.arange(10) < 9, "decoder_attention_mask": torch.arange(10) < 4}
    starts = []
    for fill in (7, 51):
        batch = {key: mask.expand(6, 10).long() for key, mask in masks.items()}
        batch |= {"input_ids": ids.where(masks["attention_mask"], fill)}
        batch |= {"decoder_input_ids": ids.where(masks["decoder_attention_mask"], fill)}
        model = add_adapter(copy.deepcopy(base), exact(spectra), start="eva", batches=[batch] * 3)
        starts.append({name: value for name, value in model.named_parameters() if "lora_A" in name})
    assert len(starts[0]) == 3
    for name, value in starts[0].items():
        torch.testing.assert_close(value, starts[1][name], atol=1e-5, rtol=1e-4)
