"""`lowrank evaluate`: the numbers of the library and of the harness, on dense and compressed models."""

import csv
import functools
import io
import json
import shlex

import lm_eval.tasks
import numpy as np
import pytest
import torch

from lowrank import compress, perplexity
from lowrank.cli.compress import save
from lowrank.cli.main import main
from lowrank.tasks.named_model import NamedModel, load_named

LLAMA, ENCODER = "meta-llama/Llama-3.2-1B", "sentence-transformers/all-MiniLM-L6-v2"
VIT = "timm:vit_base_patch16_224"


def run(line: str, hub: dict[str, str], capsys) -> str:
    assert main([hub.get(word, word) for word in shlex.split(line)]) == 0
    return capsys.readouterr().out


def test_perplexity_is_that_of_the_whole_text(hub, here, capsys) -> None:
    said = json.loads(run(f"evaluate {LLAMA} --data notes.txt --length 16 --json", hub, capsys))
    named = load_named(hub[LLAMA])
    text = "\n\n".join((here / "notes.txt").read_text().splitlines())
    tokens = torch.tensor(named.processor(text)["input_ids"])
    (row,) = said["rows"]
    assert row["value"] == perplexity(named.model, tokens, 16)
    assert (row["metric"], row["samples"], row["task"]) == ("perplexity", len(tokens) // 16, "notes.txt (train)")


def test_accuracy_is_the_share_of_right_classes(hub, here, capsys) -> None:
    said = list(
        csv.DictReader(io.StringIO(run("evaluate classifier --data SetFit/sst2 --csv --out results", hub, capsys)))
    )
    named = load_named(hub["classifier"])
    lines = (here.joinpath(hub["SetFit/sst2"]) / "test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    encode = functools.partial(named.processor, truncation=True, max_length=32)
    with torch.no_grad():
        logits = [named.model(**encode(row["text"], return_tensors="pt")).logits for row in rows]
    right = [int(one.argmax()) == row["label"] for one, row in zip(logits, rows, strict=True)]
    values = {row["metric"]: float(row["value"]) for row in said}
    assert values["accuracy"] == pytest.approx(sum(right) / len(right))
    assert (here / "results" / "results.csv").read_text().splitlines()[0] == "model,task,metric,value,samples"


@pytest.mark.parametrize("model", [VIT, "image-classifier"])
def test_images_are_judged_by_their_folders(model, hub, here, capsys) -> None:
    (_, row) = json.loads(run(f"evaluate {model} --data uoft-cs/cifar10 --samples 4 --json", hub, capsys))["rows"]
    assert (row["metric"], row["samples"]) == ("accuracy", 4)


def choose(named: NamedModel, question: str, choices: list[str]) -> int:
    """The choice that follows with the largest probability."""
    scores = []
    for choice in choices:
        ids, start = (named.processor(text)["input_ids"] for text in (f"{question} {choice}", question))
        with torch.no_grad():
            logits = named.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        scores.append(logits.gather(-1, torch.tensor(ids[1:])[:, None])[len(start) - 1 :].sum())
    return int(torch.stack(scores).argmax())


def test_the_harness_measures_dense_and_compressed_models(hub, here, capsys) -> None:
    dense, named = load_named(hub[LLAMA]), load_named(hub[LLAMA])
    compress(named.model, keep=0.5, method="svd", progress=False)
    save(named, here / "small")
    questions = [json.loads(line) for line in (here / "questions.jsonl").read_text().splitlines()]
    for name, model in {LLAMA: dense, "small": named}.items():
        said = run(f"evaluate {name} --harness my_task --include-path tasks --out results --json", hub, capsys)
        right = [choose(model, row["question"], row["choices"]) == row["answer"] for row in questions]
        (row,) = json.loads(said)["rows"]
        assert row["value"] == pytest.approx(np.mean(right))
        assert row["stderr"] == pytest.approx(np.std(right, ddof=1) / len(right) ** 0.5)
        assert (row["task"], row["metric"], row["samples"]) == ("my_task", "acc", 6)
        (line,) = csv.DictReader(io.StringIO((here / "results" / "results.csv").read_text()))
        assert float(line["value"]) == row["value"]
        harness = json.loads((here / "results" / "results.json").read_text())["harness"]
        assert harness["results"]["my_task"]["acc,none"] == row["value"]


WRONG = {
    f"evaluate {LLAMA}": "`data` must be given",
    f"evaluate {ENCODER} --data SetFit/sst2": "`model` must have a head",
    f"evaluate {LLAMA} --data notes.txt --length 999": "`length` must be in [2, 32]",
    f"evaluate {LLAMA} --data notes.txt --split test": "test",
    "evaluate classifier --data notes.txt": "`data` must have a column of labels",
    "evaluate classifier --data SetFit/sst2 --label text": "`label` must be a column of classes",
    "evaluate classifier --harness my_task --include-path tasks": "be a causal language model",
    f"evaluate {LLAMA} --harness my_task --include-path nowhere": "`include_path` must be a folder",
}


@pytest.mark.parametrize("line", WRONG)
def test_bad_input_is_one_line(line, hub, here, capsys) -> None:
    assert main([hub.get(word, word) for word in shlex.split(line)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert WRONG[line] in said.err
    assert said.err.count("\n") == 1


def test_an_unknown_task_is_named(hub, here, monkeypatch, capsys) -> None:
    alone = functools.partial(
        lm_eval.tasks.TaskManager, include_defaults=False
    )  # the whole list takes a minute to read
    monkeypatch.setattr("lm_eval.tasks.TaskManager", alone)
    assert main(["evaluate", hub[LLAMA], "--harness", "none_of_them", "--include-path", "tasks"]) == 2
    assert "`harness` must name tasks of the harness or of the folder, got ['none_of_them']" in capsys.readouterr().err
