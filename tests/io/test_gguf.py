"""GGUF files: named by path, dequantised, and saved as any other model."""

from pathlib import Path

import pytest
import torch
import transformers

from lowrank import compress, load_compressed, save_compressed
from lowrank.io.hub import load_pretrained, load_tokenizer, revision, split_gguf

gguf = pytest.importorskip("gguf")
HIDDEN, HEADS, INTERMEDIATE, VOCABULARY = 32, 4, 64, 300


def write_llama(path: Path) -> transformers.LlamaForCausalLM:
    """A tiny Llama as a GGUF file with matrices of 8 bits, and the model that it was made from."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=64,
    )
    model = transformers.LlamaForCausalLM(config)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCABULARY)
    characters = [chr(i) for i in range(33, 127)]
    tokens = ["<s>", "</s>", *characters, *(a + b for a in characters[:15] for b in characters[:15])][:VOCABULARY]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges([f"{token[0]} {token[1]}" for token in tokens[2 + len(characters) :]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for ours, theirs in names.items():
        weight = state[f"model.layers.0.{ours}.weight"]
        if theirs in ("attn_q", "attn_k"):  # GGUF interleaves the two halves of each head
            weight = weight.reshape(HEADS, 2, -1, HIDDEN).swapaxes(1, 2).reshape(weight.shape)
        _add(writer, f"blk.0.{theirs}.weight", weight)
    _add(writer, "token_embd.weight", state["model.embed_tokens.weight"])
    _add(writer, "output.weight", state["lm_head.weight"])
    _add(writer, "output_norm.weight", state["model.norm.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _add(writer, name: str, weight) -> None:
    if weight.ndim == 1:
        writer.add_tensor(name, weight)
        return
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)


def test_a_gguf_file_is_a_dense_model_that_can_be_compressed_and_saved(tmp_path) -> None:
    path = tmp_path / "files" / "tiny.gguf"
    path.parent.mkdir()
    origin = write_llama(path).eval()
    model = load_pretrained("AutoModelForCausalLM", str(path), whole=True, dtype=torch.float32).eval()
    tokens = torch.arange(2, 34).view(2, 16)
    with torch.no_grad():
        wanted, found = origin(tokens).logits, model(tokens).logits
    assert 0 < (found - wanted).norm() < 0.05 * wanted.norm()  # 8 bits
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    model.save_pretrained(tmp_path / "dense")
    again = load_pretrained("AutoModelForCausalLM", str(tmp_path / "dense"), whole=True).eval()
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    compress(model, [{"input_ids": tokens}] * 4, keep=0.6, progress=False)
    save_compressed(model, tmp_path / "small")
    assert torch.equal(load_compressed(tmp_path / "small")(tokens).logits, model(tokens).logits)
    assert load_tokenizer(str(path)).bos_token_id == 0


def test_the_revision_of_a_gguf_file_changes_with_it(tmp_path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"one")
    before = revision(str(path))
    path.write_bytes(b"other")
    assert revision(str(path)) != before


@pytest.mark.parametrize(
    ("name", "place", "file"),
    [
        ("owner/repo/a.gguf", "owner/repo", "a.gguf"),
        ("owner/repo/sub/a.gguf", "owner/repo", "sub/a.gguf"),
        ("/data/models/a.gguf", "/data/models", "a.gguf"),
        ("./models/sub/a.gguf", "models/sub", "a.gguf"),
        ("a.gguf", ".", "a.gguf"),
    ],
)
def test_names_of_gguf_files_are_split(name, place, file) -> None:
    assert split_gguf(name) == (place, {"gguf_file": file})


def test_other_names_are_not_split() -> None:
    assert split_gguf("facebook/opt-125m") == ("facebook/opt-125m", {})


def test_a_file_that_is_no_gguf_is_named(tmp_path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"no such format")
    with pytest.raises((ValueError, FileNotFoundError), match=r"model '.*bad\.gguf' could not be loaded"):
        load_pretrained("AutoModelForCausalLM", str(tmp_path / "bad.gguf"))
