"""The sets of pretrained models, on tiny models of the same families with random weights: every arm of notebook 03 runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import stand_ins
import torch
import transformers

from lowrank.compression.configuration import Configuration
from lowrank.io.checks import SPLITS
from lowrank.report.parameters import read_parameters
from lowrank.tasks import cifar10, cifar10_pretrained
from lowrank.tasks.baseline import load_calibration
from lowrank.tasks.registry import load_task
from lowrank.tasks.sweep import Sweep, SweepConfig, best_combination
from lowrank.tasks.task import Task
from lowrank.tasks.text import train_tokenizer

SMALL: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
)
GROUPED = SMALL | {"num_key_value_heads": 2}
LANGUAGE = {  # set -> the configuration of a tiny model of its family
    "wikitext2-opt125m": lambda size: transformers.OPTConfig(
        vocab_size=size,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    ),
    "wikitext2-qwen05b": lambda size: transformers.Qwen2Config(vocab_size=size, **GROUPED),
    "wikitext2-smollm2": lambda size: transformers.LlamaConfig(vocab_size=size, tie_word_embeddings=True, **GROUPED),
    "wikitext2-llama7b": lambda size: transformers.LlamaConfig(vocab_size=size, **SMALL),
    "wikitext2-gemma270m": lambda size: transformers.Gemma3TextConfig(
        vocab_size=size, head_dim=16, sliding_window=8, **SMALL | {"num_key_value_heads": 1}
    ),
}


def language_task(name: str, folder: Path) -> Task:
    """The task of a set with a tiny model and a short text in place of its own."""
    tokenizer = train_tokenizer([f"the quick brown fox {i}" for i in range(99)], 300, sentence=False)
    tokenizer.save_pretrained(folder)
    config = LANGUAGE[name](len(tokenizer))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (folder / "data").mkdir()
    for split in SPLITS:
        (folder / "data" / f"{split}.txt").write_text(
            "\n".join(f"{split} fox {i} jumps over {i * i}" for i in range(150))
        )
    options = read_parameters(name, "03_svd_comparison")["task_options"]
    chunks = {"evaluation_chunks": 8} if "evaluation_chunks" in options else {}
    own = {"model": str(folder), "data": str(folder / "data"), "config": None, "length": 24, "dtype": "float32"}
    return load_task("wikitext2", **options | own | chunks)


def vision_task(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """The task of a set with a tiny model and a few images in place of its own."""
    monkeypatch.setattr(cifar10, "VALIDATION_SAMPLES", 10)
    rows = stand_ins.make_cifar10(folder / "data")
    monkeypatch.setattr(cifar10_pretrained, "load_splits", lambda name: rows)
    stand_ins.make_dinov2(folder / "model")
    options = read_parameters(name, "03_svd_comparison")["task_options"]
    own = dict(model=str(folder / "model"), size=32, head_samples=30, train_samples=None, evaluation_samples=8)
    return load_task("cifar10_pretrained", **options | own)


@pytest.mark.parametrize("name", [*LANGUAGE, "cifar10-dinov2"])
def test_every_arm_of_the_comparison_runs_on_the_family(name, tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    task = language_task(name, tmp_path) if name in LANGUAGE else vision_task(name, tmp_path, monkeypatch)
    values = read_parameters(name, "03_svd_comparison")
    model = task.make_model().eval()
    read = sorted({*values["methods"], "whitened"} - {"fwsvd"})
    drawn = dict(samples=16, batch_size=4, seed=0, side="smaller", methods=read, gradients="sampled")
    statistics = load_calibration(task, model, **drawn)
    config = SweepConfig(16, probe_samples=4, batch_size=4, in_memory=values["in_memory"])
    sweep = Sweep(model, task, statistics, config)
    arms = {method: Configuration(method) for method in read} | best_combination(sweep.biased)
    found = sweep.run(arms, [0.6])
    assert [row["way"] for row in found] == list(arms)
    assert all(torch.isfinite(torch.tensor([row["loss"], row["added_error"]])).all() for row in found)
    sizes = {row["weights_mb"] for row in found}
    assert max(sizes) < sweep.quality(model)["weights_mb"]
    rules = [rule for rule in values["policies"] if sweep.affords(replace(arms["two_sided"], allocation=rule), 0.6)]
    for rule in rules:
        ranks = sweep.ranks(replace(arms["two_sided"], allocation=rule), 0.6)
        assert ranks.keys() == sweep.shapes.keys()
