"""What a folder says of how to build a model is verified by outputs; state of any kind comes back, or is refused by name."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from families import (
    CAPTIONS,
    FAMILIES,
    NOT_DESCRIBED,
    REPLACED,
    ZOO,
    cast,
    compressed,
    compressed_zoo,
    made,
    new_of_zoo,
    of_zoo,
    outputs,
    ranks_of,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel

from lowrank.compression.checkpoint import METADATA, TENSORS, load_compressed, save_compressed
from lowrank.compression.probes import (
    ELSEWHERE,
    SAME,
    check_probe,
    compare_outputs,
    describe_probe,
    find_difference,
    find_dtype,
    find_probe,
    run_probe,
)
from lowrank.compression.replace import replace_layers
from lowrank.io.hashing import hash_model
from lowrank.nn.targets import find_linears
from lowrank.training.oialr import OIALR, OIALRConfig

DTYPES = (torch.float64, torch.bfloat16, torch.float16)
KNOWN = [family for family in FAMILIES if family not in ("plain", "vit")]  # those that a folder builds by itself


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "compressed"


def truncated(model: nn.Module) -> nn.Module:
    replace_layers(model, {n: min(layer.weight.shape) // 2 for n, layer in find_linears(model).items()}, "svd")
    return model


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# --- timm ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_vit", {"num_heads": 4}),
        ("test_vit", {"act_layer": "relu"}),
        ("test_vit", {"global_pool": "avg"}),
        ("test_vit", {"dynamic_img_size": True}),
        ("test_vit", {"img_size": 64, "qkv_bias": False}),
        ("test_vit", {"class_token": False, "global_pool": "avg", "num_classes": 0}),
        ("test_vit", {"features_only": True}),
        ("test_convnext", {"global_pool": "max", "num_classes": 5}),
        ("test_convnext", {"output_stride": 16}),
        ("test_resnet", {"act_layer": "silu", "in_chans": 1}),
        ("test_efficientnet", {"global_pool": "max", "features_only": True, "out_indices": (1, 2)}),
        ("test_mambaout", {"num_classes": 3}),
    ],
)
def test_options_that_change_no_shape_come_back(name, options, folder) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    size = 96 if options.get("dynamic_img_size") else options.get("img_size", 160)
    x = torch.randn(1, options.get("in_chans", 3), size, size)
    assert save_compressed(model, folder)["why"] is None
    with torch.no_grad():
        pairs = zip(*([y] if isinstance(y, Tensor) else y for y in (model(x), load_compressed(folder)(x))), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_what_was_changed_after_building_comes_back(folder) -> None:
    model = timm.create_model("test_vit", num_classes=3).eval()
    model.reset_classifier(7, global_pool="avg")
    save_compressed(model, folder)
    x = torch.randn(1, 3, 160, 160)
    assert torch.equal(load_compressed(folder)(x), model(x))


# Options of each family that change outputs and no shape.
OPTIONS: dict[str, dict[str, Any]] = {
    "BERT": dict(hidden_act="relu", num_attention_heads=4),
    "BART": dict(activation_function="relu", scale_embedding=True),
    "T5": dict(layer_norm_epsilon=0.1, relative_attention_max_distance=3),
    "Llama": dict(hidden_act="relu", rms_norm_eps=0.1),
    "Gemma 3": dict(query_pre_attn_scalar=4, final_logit_softcapping=2.0, sliding_window=2),
    "Mixtral": dict(num_experts_per_tok=1),
    "GPT-2": dict(activation_function="relu", scale_attn_by_inverse_layer_idx=True),
    "OPT": dict(activation_function="gelu", num_attention_heads=4),
    "CLIP": dict(text_config=CAPTIONS | dict(hidden_act="relu")),
    "Whisper": dict(activation_function="relu", scale_embedding=True),
    "ViT": dict(hidden_act="relu", layer_norm_eps=0.1),
    "BEiT": dict(global_pool="token"),  # with another norm
    "Swin": dict(global_pool="max"),
    "ConvNeXt": dict(global_pool="max", act_layer="relu"),
    "MLP-Mixer": dict(act_layer=nn.ReLU),
}


@pytest.mark.parametrize("family", ZOO)
def test_every_family_comes_back_with_options_that_change_no_shape_and_in_bfloat16(family, folder) -> None:
    usual, batches = of_zoo(family)
    model, skeleton = (new_of_zoo(family, **OPTIONS[family]) for _ in range(2))
    model.load_state_dict(usual.state_dict(), strict=family != "BEiT")
    assert not torch.allclose(outputs(model, batches), outputs(usual, batches))
    replace_layers(model, ranks_of(model, layers=REPLACED[family]), "svd")
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        about = save_compressed(model, folder / str(dtype))
        assert (about["base"] is None) == (family in NOT_DESCRIBED)
        loaded = load_compressed(folder / str(dtype), architecture=skeleton if family in NOT_DESCRIBED else None)
        assert {tensor.dtype for tensor in loaded.parameters()} == {dtype}
        assert torch.equal(outputs(loaded, cast(batches, dtype)), outputs(model, cast(batches, dtype)))


# --- models that no description builds ----------------------------------------------------------------------------------


def change_activation(model: nn.Module) -> str:
    """Replace an activation, wherever the model has one; no shape shows it."""
    for module in model.modules():
        for name, value in {**vars(module), **module._modules}.items():
            if "act" in name and callable(value):
                module._modules.pop(name, None)
                setattr(module, name, nn.Hardtanh(-0.01, 0.02))
                return name
    raise AssertionError


@pytest.mark.parametrize("family", KNOWN)
def test_a_model_changed_by_hand_needs_its_architecture(family, folder) -> None:
    model, batches = compressed(family)
    change_activation(model)
    about = save_compressed(model, folder)
    assert about["base"] is None
    assert "outputs that differ by" in about["why"]
    with pytest.raises(ValueError, match="`architecture` must be the dense model, because .* outputs that differ by"):
        load_compressed(folder)
    dense, _, _ = made(family)
    change_activation(dense)
    loaded = load_compressed(folder, architecture=dense)
    assert torch.equal(outputs(loaded, batches), outputs(model, batches))
    unchanged, _, _ = made(family)
    with pytest.raises(ValueError, match="`model` must give the outputs that it gave .*, got .outputs that differ by"):
        load_compressed(folder, architecture=unchanged)


LLAMA = LlamaConfig(
    vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
)


class Tagger(LlamaPreTrainedModel):
    def __init__(self, config: LlamaConfig, heads: int = 1) -> None:
        super().__init__(config)
        self.model, self.out, self.heads = LlamaModel(config), nn.Linear(24, 4), heads
        self.post_init()

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.model(ids)[0]).softmax(-1) * self.heads


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config, self.body, self.out = LLAMA, LlamaModel(LLAMA), nn.Linear(24, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.body(ids)[0])


@pytest.mark.parametrize("make", [lambda: Tagger(LLAMA), Wrapper])
def test_own_classes_are_saved_and_loaded_with_their_architecture(make, folder) -> None:
    model, ids = truncated(make().eval()), torch.arange(3, 13)[None]
    about = save_compressed(model, folder)
    assert about["base"] is None
    assert about["probe"]["inputs"] == {"": {"shape": [1, 12], "below": 60}}
    assert torch.equal(load_compressed(folder, architecture=make())(ids), model(ids))


def test_an_own_class_that_computes_otherwise_is_found(folder) -> None:
    save_compressed(truncated(Tagger(LLAMA).eval()), folder)
    with pytest.raises(
        ValueError, match=r"outputs that differ by 1 of their norm.*`verify=False` loads|`verify=False`"
    ):
        load_compressed(folder, architecture=Tagger(LLAMA, heads=2))
    load_compressed(folder, architecture=Tagger(LLAMA, heads=2), verify=False)


def test_another_head_is_saved_and_loaded_with_its_architecture(folder) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model, _, _ = made("bert")
        model.classifier = nn.Sequential(nn.Linear(24, 12), nn.Linear(12, 2))
        return model

    model, ids = truncated(make()), torch.arange(3, 13)[None]
    assert "classifier.weight is missing" in save_compressed(model, folder)["why"]
    assert torch.equal(load_compressed(folder, architecture=make())(ids).logits, model(ids).logits)


def test_a_given_base_that_builds_another_model_is_refused(folder) -> None:
    model = timm.create_model("test_vit", num_classes=3, num_heads=4).eval()
    base = {"timm": "test_vit", "options": {"num_classes": 3, "num_heads": 2}}
    words = r"`base` must build the model again, got outputs that differ by .* \(blocks.0.attn has num_heads 4, not 2\)"
    with pytest.raises(ValueError, match=words):
        save_compressed(model, folder, base)
    assert list(folder.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (lambda m: torch.compile(m, backend="eager"), "with `torch.compile`"),
        (nn.DataParallel, "with `DataParallel`"),
        (lambda m: peft.get_peft_model(m, peft.LoraConfig(r=2, target_modules=["q_proj"])), "with an adapter"),
        (
            lambda m: (peft.get_peft_model(m, peft.LoraConfig(r=2, target_modules=["q_proj"])), m)[1],
            "adapter in '.*q_proj'",
        ),
    ],
)
def test_wrapped_models_are_refused(wrap, words, folder) -> None:
    model = wrap(LlamaForCausalLM(LLAMA))
    with pytest.raises(ValueError, match=f"`model` must be the module inside a wrapper, without adapters.*{words}"):
        save_compressed(model, folder)
    assert list(folder.parent.iterdir()) == []


def test_converted_convolutions_come_back(folder) -> None:
    make = lambda: nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 1))  # noqa: E731
    model = make().eval()
    OIALR(model, OIALRConfig(delay=1, sigma_cutoff=0), exclude=()).step(torch.optim.SGD(model.parameters(), lr=0.1))
    kinds = {row["kind"] for row in save_compressed(model, folder)["layers"].values()}
    assert kinds == {"usv_conv2d"}
    x = torch.randn(2, 8, 12, 12)
    assert torch.equal(load_compressed(folder, architecture=make())(x), model(x))
    with pytest.raises(ValueError, match="`base` must have a convolution '0', as the compressed model has, got Linear"):
        load_compressed(folder, architecture=nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)))


# --- a recipe that was changed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "file", "change"),
    [
        ("bert", "config.json", {"num_attention_heads": 4}),
        ("bert", "config.json", {"hidden_act": "relu"}),
        ("llama", "config.json", {"rms_norm_eps": 0.5}),
        ("llama", "config.json", {"hidden_act": "gelu"}),
        ("opt", "config.json", {"num_attention_heads": 4}),
        ("gpt2", "config.json", {"activation_function": "relu"}),
        ("t5", "config.json", {"scale_decoder_outputs": False, "relative_attention_max_distance": 3}),
        ("created vit", METADATA, {"num_heads": 4}),
        ("created vit", METADATA, {"act_layer": "relu"}),
        ("created vit", METADATA, {"global_pool": "avg", "fc_norm": False}),
    ],
)
def test_a_changed_recipe_is_found_by_its_outputs(family, file, change, folder) -> None:
    save_compressed(compressed(family)[0], folder)
    edit(folder / file, lambda content: (content["base"]["options"] if file == METADATA else content).update(change))
    with pytest.raises(
        ValueError, match="`model` must give the outputs that it gave when .* was written.*, got 'outputs"
    ):
        load_compressed(folder)
    assert hash_model(load_compressed(folder, verify=False)) == hash_model(compressed(family)[0])


@pytest.mark.parametrize("family", KNOWN)
def test_folders_without_a_fingerprint_load(family, folder) -> None:
    model, batches = compressed(family)
    save_compressed(model, folder)
    edit(folder / METADATA, lambda about: [about.pop(key) for key in ("probe", "buffers", "extra", "why")])
    assert torch.equal(outputs(load_compressed(folder), batches), outputs(model, batches))


def test_the_versions_are_named_with_the_difference(folder) -> None:
    save_compressed(compressed("bert")[0], folder)
    edit(folder / METADATA, lambda about: about["probe"]["versions"].update(torch="1.13"))
    load_compressed(folder)
    edit(folder / METADATA, lambda about: about["probe"]["outputs"].reverse())
    with pytest.raises(ValueError, match=r"\(it was saved with torch 1.13\)"):
        load_compressed(folder)


@pytest.mark.parametrize("family", ["BART", "T5", "Llama", "Gemma 3", "Mixtral", "GPT-2", "OPT", "Whisper"])
def test_settings_of_generation_that_transformers_refuses_are_kept(family, folder) -> None:
    model, batches = compressed_zoo(family)
    model.generation_config.temperature, model.generation_config.top_p = 0.9, 0.6  # without do_sample
    with pytest.raises(ValueError, match="temperature"):
        model.generation_config.save_pretrained(folder.parent / "refused")
    save_compressed(model, folder)
    loaded = load_compressed(folder)
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    assert torch.equal(outputs(loaded, batches), outputs(model, batches))


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor], str], Any], str]] = {
    "gone": (lambda tensors, key: tensors.pop(key), "{key} is missing"),
    "more": (lambda tensors, key: tensors.update(other=torch.ones(2)), "other is left over"),
    "cut": (lambda tensors, key: tensors.update({key: tensors[key][:-1].clone()}), "{key} has shape"),
}


@pytest.mark.parametrize("family", ZOO)
def test_the_tensor_that_does_not_fit_is_named_in_every_family(family, folder) -> None:
    """Not a cache, not a network, and not the first error of a library underneath."""
    model, _ = compressed_zoo(family)
    save_compressed(model, folder)
    whole = load_file(folder / TENSORS)
    key = next(key for key in whole if key.endswith("left.weight"))
    for change, words in DAMAGES.values():
        tensors = dict(whole)
        change(tensors, key)
        save_file(tensors, folder / TENSORS)
        with pytest.raises(ValueError, match=words.format(key=re.escape(key))) as caught:
            load_compressed(folder, architecture=new_of_zoo(family) if family in NOT_DESCRIBED else None)
        assert not re.search("HF_HUB_OFFLINE|cache|network", str(caught.value))


# --- the fingerprint ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_probe_that_leaves_it_as_it_was(family) -> None:
    model, _ = compressed(family)
    model.train()
    before, state = hash_model(model), torch.get_rng_state()
    found = find_probe(model)
    assert found is not None
    inputs, wanted = found
    assert torch.equal(run_probe(model, inputs), wanted)
    assert hash_model(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    about = json.loads(json.dumps(describe_probe(inputs, wanted, find_dtype(model))))
    assert check_probe(model, about) is None
    assert check_probe(model.double(), about) is None  # other kernels: rounding does not count


@pytest.mark.parametrize("dtype", SAME)
def test_outputs_are_compared_by_their_norm(dtype) -> None:
    wanted = torch.linspace(-3, 5, 40, dtype=torch.float64)
    for tolerance in (SAME[dtype], ELSEWHERE[dtype]):
        step = wanted.norm() * torch.nn.functional.one_hot(torch.tensor(3), 40)
        assert compare_outputs(wanted + 0.9 * tolerance * step, wanted, tolerance) is None
        assert "outputs that differ by" in (compare_outputs(wanted + 1.1 * tolerance * step, wanted, tolerance) or "")
    assert "outputs that differ by nan" in (compare_outputs(wanted * torch.nan, wanted, 1.0) or "")
    assert compare_outputs(wanted[:3], wanted, 1.0) == "3 outputs instead of 40"


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_models_do_not_differ(family) -> None:
    assert find_difference(made(family)[0], made(family)[0]) is None
    assert find_difference(made(family)[0], compressed(family)[0]) is not None


# --- state of every kind ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", KNOWN)
def test_buffers_that_no_state_has_come_back_as_they_were(family, dtype, folder) -> None:
    model, _ = compressed(family, "pivoted")
    model.to(dtype)
    save_compressed(model, folder)
    found, wanted = dict(load_compressed(folder).named_buffers()), dict(model.named_buffers())
    assert {name: buffer.dtype for name, buffer in found.items()} == {name: b.dtype for name, b in wanted.items()}
    assert all(torch.equal(found[name], buffer) for name, buffer in wanted.items())


class Stateful(nn.Module):
    def __init__(self, extra: Any = None, buffer: Tensor | None = None, persistent: bool = True) -> None:
        super().__init__()
        self.line, self.extra = nn.Linear(4, 4), extra
        self.register_buffer("scale", torch.ones(4) if buffer is None else buffer, persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x) * (self.scale if self.scale.layout == torch.strided else 1)


class WithExtra(Stateful):
    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize("extra", [{"step": 3, "names": ["a", None]}, 1.5, "text", torch.arange(5), torch.zeros(0)])
def test_extra_state_comes_back(extra, folder) -> None:
    model = WithExtra(extra).eval()
    replace_layers(model, {"line": 2}, "svd")
    save_compressed(model, folder)
    loaded: Any = load_compressed(folder, architecture=WithExtra(torch.ones(2) if isinstance(extra, Tensor) else None))
    assert torch.equal(loaded.extra, extra) if isinstance(extra, Tensor) else loaded.extra == extra
    with pytest.raises(ValueError, match="`folder` must fit the model's tensors, got: _extra_state is left over"):
        load_compressed(folder, architecture=Stateful())


@pytest.mark.parametrize("persistent", [True, False])
def test_own_buffers_come_back(persistent, folder) -> None:
    model, x = Stateful(buffer=torch.arange(4.0), persistent=persistent).eval(), torch.randn(3, 4)
    save_compressed(model, folder)
    assert torch.equal(load_compressed(folder, architecture=Stateful(persistent=persistent))(x), model(x))
    other: Any = nn.Module()
    other.line = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"got: scale is left over|`architecture` must have the buffer 'scale'"):
        load_compressed(folder, architecture=other)


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda p: Stateful(buffer=torch.eye(4).to_sparse(), persistent=p), "'scale', which is sparse"),
        (lambda p: Stateful(buffer=torch.eye(4).to_sparse_csr(), persistent=p), "'scale', which is sparse"),
        (lambda p: Stateful(buffer=torch.ones(4, device="meta"), persistent=p), "load 'scale', .*the meta device"),
        (
            lambda p: nn.Sequential(Stateful(persistent=p), nn.Linear(2, 2, device="meta")),
            "load '1.weight', .*the meta device",
        ),
        (lambda p: WithExtra({"object": object()}, persistent=p), "dict in '_extra_state'"),
        (lambda p: WithExtra((1, 2), persistent=p), "tuple in '_extra_state'"),
        (lambda p: WithExtra({"tensor": torch.ones(2)}, persistent=p), "dict in '_extra_state'"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_state_that_no_file_holds_is_refused_by_name(model, words, persistent, folder) -> None:
    with pytest.raises(ValueError, match=f"`model` must have .*{words}"):
        save_compressed(model(persistent), folder)
    assert os.listdir(folder.parent) == []


def test_models_with_sparse_buffers_are_compressed() -> None:
    sparse, dense = (Stateful(buffer=b) for b in (torch.eye(4).to_sparse(), torch.eye(4)))
    sparse.line, extra = dense.line, WithExtra({"object": object()}, torch.eye(4))
    extra.line = dense.line
    assert hash_model(sparse) == hash_model(dense) == hash_model(extra)
    assert replace_layers(sparse, {"line": 1}, "svd")[0]["rank"] == 1
