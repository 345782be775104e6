"""`lowrank compress`: it writes the model that the library makes; bad input ends in one line, and nothing is written."""

import json
import resource
import shlex
from pathlib import Path

import pytest
import torch
import transformers

from lowrank import METHODS, compress, load_compressed
from lowrank.cli.compress import read_choices
from lowrank.cli.main import main, make_parser
from lowrank.compression.configuration import ALLOCATIONS
from lowrank.factorization.storages import STORAGES
from lowrank.io.files import partial_path
from lowrank.nn.targets import find_linears
from lowrank.tasks.calibration_data import calibration_batches
from lowrank.tasks.named_data import DataSource
from lowrank.tasks.named_model import load_named

LLAMA = "meta-llama/Llama-3.2-1B"
ENCODER, VIT = "sentence-transformers/all-MiniLM-L6-v2", "timm:vit_base_patch16_224"


def words(line: str, hub: dict[str, str]) -> list[str]:
    return [hub.get(word, word) for word in shlex.split(line)]


def test_the_model_is_that_of_the_library(hub, here, capsys) -> None:
    line = f"compress {LLAMA} --data notes.txt --keep 0.6 --samples 6 --length 16 --batch-size 3 --seed 4 --out small --json"
    assert main(words(line, hub)) == 0
    said = json.loads(capsys.readouterr().out)
    named = load_named(hub[LLAMA])
    batches = calibration_batches(named, DataSource("notes.txt"), 6, length=16, batch_size=3, seed=4)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(3, 16), (3, 16)]
    result = compress(named.model, batches, 0.6, progress=False)
    small, ids = load_compressed("small"), torch.arange(20)[None]
    assert torch.equal(small(ids).logits, named.model(ids).logits)
    assert {row["layer"]: row["rank"] for row in said["layers"]} == result.ranks
    assert said["keep"]["targeted"] == result.keep_targeted <= 0.6
    assert said["calibration"] == {"data": "notes.txt", "split": "train", "seed": 4, "samples": 6}
    tokenizer = transformers.AutoTokenizer.from_pretrained("small")
    assert tokenizer("a good film")["input_ids"] == named.processor("a good film")["input_ids"]


@pytest.mark.parametrize("options", ["--retarget", "--method whitened --allocation uniform --multiple 4"])
def test_choices_reach_the_library(options, hub, here, capsys) -> None:
    line = f"compress {LLAMA} --data notes.txt --keep 0.6 --samples 8 --out small --json {options}"
    assert main(words(line, hub)) == 0
    said = json.loads(capsys.readouterr().out)
    if "multiple" in options:
        assert all(row["rank"] % 4 == 0 or row["storage"] == "dense" for row in said["layers"])
    else:
        assert all("ridge" in row for row in said["layers"])


def test_layers_are_included_and_excluded(hub, here, capsys) -> None:
    line = (
        f"compress {LLAMA} --method svd --keep 0.5 --out small --json --include '.*mlp.*' '.*q_proj' --exclude '.*up.*'"
    )
    assert main(words(line, hub)) == 0
    ends = {row["layer"].rpartition(".")[2] for row in json.loads(capsys.readouterr().out)["layers"]}
    assert ends == {"gate_proj", "down_proj", "q_proj"}


def test_excluding_alone_leaves_the_other_layers_of_blocks(hub) -> None:
    line = "compress m --keep 0.5 --out small --exclude model.layers.0.mlp.up_proj '.*q_proj'"
    choices = read_choices(make_parser().parse_args(shlex.split(line)))
    model = load_named(hub[LLAMA]).model
    everything = set(find_linears(model))
    left = everything - set(find_linears(model, choices["layers"]))
    assert left == {"model.layers.0.mlp.up_proj"} | {name for name in everything if name.endswith("q_proj")}


def test_an_encoder_counts_by_its_hidden_states(hub, here, capsys) -> None:
    assert main(words(f"compress {ENCODER} --data SetFit/sst2 --keep 0.6 --samples 12 --out small", hub)) == 0
    said = capsys.readouterr().out
    assert "calibrated on 12 samples" in said
    assert "outputs weighed by hidden states" in said
    assert "whole model:" in said


def test_images_go_through_the_transform_of_timm(hub, here, capsys) -> None:
    assert main(words(f"compress {VIT} --data uoft-cs/cifar10 --keep 0.5 --samples 4 --out small --json", hub)) == 0
    assert json.loads(capsys.readouterr().out)["calibration"]["samples"] == 4
    assert load_compressed("small").num_classes == 10


def test_help_names_every_choice(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["compress", "--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in [*METHODS, *STORAGES, *ALLOCATIONS])


WRONG = {
    "compress nothing --data notes.txt --keep 0.5 --out small": "'nothing' could not be loaded",
    "compress ./nothing --data notes.txt --keep 0.5 --out small": "there is no such folder",
    f"compress {LLAMA} --data none.txt --keep 0.5 --out small": "no file 'none.txt'",
    f"compress {LLAMA} --data no/such --keep 0.5 --out small": "HF_HUB_OFFLINE is set",
    f"compress {LLAMA} --keep 0.5 --out small": "`data` must be given",
    f"compress {LLAMA} --data notes.txt --keep 1.5 --out small": "`keep` must be in (0, 1]",
    f"compress {LLAMA} --data notes.txt --keep 0.5 --out tasks": "`--out` must be a new or empty folder",
    f"compress {LLAMA} --data notes.txt --keep 0.5 --method best --out small": "`method` must be one of ['svd'",
    f"compress {LLAMA} --data notes.txt --keep 0.5 --dtype int8 --out small": "`dtype` must be 'auto' or",
    f"compress {LLAMA} --data notes.txt --keep 0.5 --device moon --out small": "`device` must be a device of this machine",
    f"compress {LLAMA} --data notes.txt --keep 0.5 --length 999 --out small": "`length` must be in [2, 32]",
    f"compress {LLAMA} --data notes.txt --keep 0.5 --column body --out small": "without ['body'], got ['text']",
    f"compress {LLAMA} --data notes.txt --keep 0.5 --split best --out small": "best",
    f"compress {LLAMA} --data uoft-cs/cifar10 --keep 0.5 --out small": "`data` must have a column of text",
    f"compress {VIT} --data notes.txt --keep 0.5 --out small": "`data` must have a column of images",
    f"compress {LLAMA} --data chats.jsonl --keep 0.5 --out small": "a chat template to read chats",
    f"compress {LLAMA} --method svd --include '.*none' --keep 0.5 --out small": "`layers` must match nn.Linear modules",
    f"compress {LLAMA} --data empty.txt --keep 0.5 --out small": "empty.txt",
    "compress no-tokenizer --data notes.txt --keep 0.5 --out small": "tokenizer 'no-tokenizer' could not be loaded",
    "compress half --data notes.txt --keep 0.5 --out small": "must hold all weights of LlamaForCausalLM",
    "compress no-linears --method svd --keep 0.5 --out small": "",
}


@pytest.mark.parametrize("line", WRONG)
def test_bad_input_is_one_line_and_nothing_is_written(line, hub, here, capsys) -> None:
    (here / "empty.txt").write_text("")
    llama = transformers.LlamaForCausalLM.from_pretrained(hub[LLAMA])
    llama.save_pretrained(here / "no-tokenizer")
    state = {name: value for name, value in llama.state_dict().items() if "down_proj" not in name}
    llama.save_pretrained(here / "half", state_dict=state)
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1])
    transformers.ResNetModel(config).save_pretrained(here / "no-linears")
    before = sorted(here.iterdir())
    capsys.readouterr()  # the bars of transformers, from above
    assert main(words(line, hub)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert WRONG[line] in said.err
    assert said.err.count("\n") == 1
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize("where", ["collect_statistics", "replace_layers"])
def test_an_interrupted_run_writes_nothing(where, hub, here, monkeypatch, capsys) -> None:
    def interrupt(*_, **__) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"lowrank.compression.compress.{where}", interrupt)
    assert main(words(f"compress {LLAMA} --data notes.txt --keep 0.5 --samples 4 --out small", hub)) == 130
    assert capsys.readouterr().err.endswith("error: interrupted\n")
    assert not (here / "small").exists()


def test_a_full_disk_is_one_line_and_nothing_is_left(hub, here, capsys) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (2000, hard)
    )  # a file may not grow beyond; stands for a disk that is full
    try:
        status = main(words(f"compress {LLAMA} --method svd --keep 0.5 --out small", hub))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr()
    assert (status, said.out) == (2, "")
    assert said.err.count("\n") == 1
    assert not (here / "small").exists()
    assert not partial_path(here / "small").exists()


def test_a_run_that_was_stopped_goes_on_from_its_blocks(hub, here, monkeypatch, capsys) -> None:
    line = f"compress {LLAMA} --data notes.txt --keep 0.5 --samples 8 --resume blocks --json"
    assert main(words(f"{line} --out whole", hub)) == 0
    blocks = sorted(Path("blocks").glob("*.safetensors"))
    assert len(blocks) == 2
    blocks[1].unlink()  # as if it had been stopped in the second
    times = blocks[0].stat().st_mtime_ns
    assert main(words(f"{line} --out again", hub)) == 0
    assert blocks[0].stat().st_mtime_ns == times
    ids = torch.arange(20)[None]
    assert torch.equal(load_compressed("whole")(ids).logits, load_compressed("again")(ids).logits)
