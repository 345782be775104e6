"""`lowrank evaluate`: the numbers of the library and of the harness, on dense and compressed models."""

import csv
import io
import json
import shlex

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lowrank import compress, perplexity
from lowrank.cli.compress import save
from lowrank.cli.main import main
from lowrank.tasks.named_model import load_named

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
    with torch.no_grad():
        logits = [named.model(**named.processor(row["text"], return_tensors="pt")).logits for row in rows]
    right = [int(one.argmax()) == row["label"] for one, row in zip(logits, rows, strict=True)]
    values = {row["metric"]: float(row["value"]) for row in said}
    assert values["accuracy"] == pytest.approx(sum(right) / len(right))
    assert (here / "results" / "results.csv").read_text().splitlines()[0] == "model,task,metric,value,samples"


@pytest.mark.parametrize("model", [VIT, "image-classifier"])
def test_images_are_judged_by_their_folders(model, hub, here, capsys) -> None:
    (_, row) = json.loads(run(f"evaluate {model} --data uoft-cs/cifar10 --samples 4 --json", hub, capsys))["rows"]
    assert (row["metric"], row["samples"]) == ("accuracy", 4)


@pytest.mark.parametrize("compressed", [False, True])
def test_the_harness_says_the_same_as_by_itself(compressed, hub, here, capsys) -> None:
    named = load_named(hub[LLAMA])
    if compressed:
        compress(named.model, keep=0.5, method="svd", progress=False)
        save(named, here / "small")
    model = "small" if compressed else LLAMA
    line = f"evaluate {model} --harness my_task --include-path tasks --out results --json"
    said = json.loads(run(line, hub, capsys))
    manager = TaskManager(include_path=str(here / "tasks"), include_defaults=False)
    language_model = HFLM(pretrained=named.model, tokenizer=named.processor, batch_size=8)
    expected = simple_evaluate(language_model, tasks=["my_task"], task_manager=manager)["results"]["my_task"]
    (row,) = said["rows"]
    assert row["value"] == expected["acc,none"]
    assert row["stderr"] == expected["acc_stderr,none"]
    assert (row["task"], row["metric"], row["samples"]) == ("my_task", "acc", 6)
    (line,) = csv.DictReader(io.StringIO((here / "results" / "results.csv").read_text()))
    assert float(line["value"]) == row["value"]
    assert json.loads((here / "results" / "results.json").read_text())["harness"]["results"]["my_task"]


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


@pytest.mark.slow  # the list of all tasks of the harness takes seconds to read
def test_an_unknown_task_is_named(hub, here, capsys) -> None:
    assert main(["evaluate", hub[LLAMA], "--harness", "none_of_them", "--include-path", "tasks"]) == 2
    assert "`harness` must name tasks of the harness or of the folder, got ['none_of_them']" in capsys.readouterr().err
