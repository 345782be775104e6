"""Tasks: fixed data, masks, targeted layers, errors that name the remedy."""

from pathlib import Path
from typing import Any

import pytest
import stand_ins
import torch
from PIL import Image

from lowrank.io.checks import SPLITS
from lowrank.io.hashing import hash_model
from lowrank.nn.batches import get_labels, get_token_mask
from lowrank.nn.targets import depth_and_kind
from lowrank.tasks import cifar10, cifar10_pretrained, docs
from lowrank.tasks.baseline import load_baseline, load_calibration
from lowrank.tasks.docs import CORPUS_PACKAGES, read_corpus
from lowrank.tasks.glue import GLUE
from lowrank.tasks.registry import load_task
from lowrank.tasks.task import Task
from lowrank.training.loop import Recipe

FROZEN = "0123456789abcdef"
HELD_OUT = {"validation_samples": 50, "test_samples": 25}
SMALL_BERT = {"hidden": 16, "depth": 2, "heads": 2, "intermediate": 32, "train_samples": 200} | HELD_OUT
SMALL_LLAMA = {"hidden": 16, "depth": 2, "intermediate": 24, "vocabulary": 300, "length": 32} | HELD_OUT
EMBEDDED = {
    "digits": {"width": 16, "depth": 2},
    "docs_package": SMALL_BERT | {"vocabulary": 500},
    "docs_language": SMALL_LLAMA,
}


@pytest.fixture(scope="module", params=EMBEDDED)
def task(request: pytest.FixtureRequest) -> Task:
    return load_task(request.param, **EMBEDDED[request.param])


def test_an_embedded_task_trains_and_evaluates(task: Task) -> None:
    torch.manual_seed(0)
    model = task.make_model()
    batch = next(iter(task.batches("train", 8, seed=0)))
    loss = task.loss(model, batch)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    results = task.evaluate(model)
    assert set(results) == {"loss", *task.metrics}
    chance = {"digits": 10, "docs_package": 5, "docs_language": 300}[task.name]
    assert results["loss"] == pytest.approx(torch.tensor(float(chance)).log().item(), rel=0.2)
    count = len(get_labels(batch)) if task.objective == "classification" else 8 * 31
    assert task.total_loss(model, batch).item() == pytest.approx(task.loss(model, batch).item() * count, rel=1e-5)


def test_targeted_layers_are_those_inside_blocks(task: Task) -> None:
    names = list(task.linears(task.make_model()))
    kinds = {kind for _, kind in map(depth_and_kind, names)}
    assert len(names) == 2 * len(kinds) == 2 * {"digits": 4, "docs_package": 6, "docs_language": 7}[task.name]


def test_data_and_identity_are_the_same_every_time(task: Task) -> None:
    again = load_task(task.name, **EMBEDDED[task.name])
    assert again.identity == task.identity
    other = load_task(task.name, **EMBEDDED[task.name] | {"depth": 1})
    assert other.identity != task.identity
    for seed in (None, 3):
        one, two = (next(iter(t.batches("train", 16, samples=40, seed=seed))) for t in (task, again))
        pairs = zip(one.values(), two.values(), strict=True) if isinstance(one, dict) else zip(one, two, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def identities(*options: dict) -> list:
    def load(width: int = 3, layers: tuple[str, ...] | list[str] = ("a", "b")) -> Task:
        """Return a task whose fingerprints do not depend on its options."""
        splits = {split: [0] for split in SPLITS}
        return Task("any", splits, torch.nn.Identity, "classification", ("accuracy",), fingerprints={"data": "0af"})

    return [load_task(load, **each).identity for each in options]


def test_the_identity_is_all_options_and_what_the_loader_adds() -> None:
    (identity,) = identities({})
    assert identity == {"task": "any", "options": {"width": 3, "layers": ["a", "b"]}, "data": "0af"}


def test_a_default_that_is_named_is_the_same_identity() -> None:
    default, named, as_list, other = identities({}, {"width": 3}, {"layers": ["a", "b"]}, {"layers": ["a"]})
    assert default == named == as_list != other


def test_results_without_an_identity_are_not_cached() -> None:
    task = Task("any", {}, torch.nn.Identity, "classification", ("accuracy",))
    with pytest.raises(ValueError, match="`task` must have an identity, which `load_task` sets, got 'any' without"):
        load_baseline(task, Recipe(steps=1))
    with pytest.raises(ValueError, match="`task` must have an identity"):
        load_calibration(task, torch.nn.Identity(), samples=1, batch_size=1, seed=0)


def test_batches_cover_the_split_once(task: Task) -> None:
    size = len(task.splits["validation"])
    assert sum(len(get_labels(batch)) for batch in task.batches("validation", 7)) == size
    assert sum(len(get_labels(batch)) for batch in task.batches("validation", 7, samples=8, seed=1)) == 8
    with pytest.raises(ValueError, match=rf"`samples` must be in \[1, {size}\] .* got 0"):
        task.batches("validation", 7, samples=0)
    with pytest.raises(ValueError, match="`split` must be one of .* got 'tests'"):
        task.batches("tests", 7)


READS = {
    "split": lambda task: task.split("test"),
    "batches": lambda task: next(iter(task.batches("test", 4))),
    "loader": lambda task: next(iter(task.loader("test", [[0]]))),
    "evaluate": lambda task: task.evaluate(task.make_model(), "test"),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_the_test_split_is_read_only_after_the_choices_are_frozen(task: Task, read) -> None:
    with pytest.raises(ValueError, match="`frozen` must be 16 hex digits .* `open_test`.* `Report.freeze` .* got None"):
        read(task)
    opened = task.open_test(FROZEN)
    read(opened)
    assert (opened.frozen, task.frozen) == (FROZEN, None)
    assert opened.identity == task.identity
    with pytest.raises(ValueError, match="`frozen` must be"):
        read(task)  # opening makes a copy


@pytest.mark.parametrize("frozen", ["", "chosen", FROZEN.upper(), FROZEN[1:], FROZEN + "0", FROZEN + "\n"])
def test_only_a_hash_opens_the_test_split(task: Task, frozen: str) -> None:
    with pytest.raises(ValueError, match="`frozen` must be 16 hex digits"):
        task.open_test(frozen)


def test_a_task_counts_the_rows_of_each_split(task: Task) -> None:
    expected = {
        "digits": {"train": 897, "validation": 450, "test": 450},
        "docs_package": {"train": 200, "validation": 50, "test": 25},
        "docs_language": {"train": len(task.splits["train"]), "validation": 50, "test": 25},
    }
    assert task.rows == expected[task.name]


def contents(samples: Any) -> set[bytes]:
    """The samples of a split as bytes, without labels."""
    found = (samples[i] for i in range(len(samples)))
    inputs = (sample["input_ids"] if isinstance(sample, dict) else sample[0] for sample in found)
    return {torch.as_tensor(x).numpy().tobytes() for x in inputs}


@pytest.mark.parametrize("task", ["digits", "docs_package"], indirect=True)  # clauses in common may fill a short chunk
def test_no_sample_is_in_two_splits(task: Task) -> None:
    train, validation, test = (contents(task.splits[split]) for split in SPLITS)
    assert not train & validation
    assert not train & test
    assert not validation & test


@pytest.mark.parametrize("missing", SPLITS)
def test_a_task_without_one_of_the_three_splits_is_refused(missing: str) -> None:
    def load() -> Task:
        splits = {split: [0] for split in SPLITS if split != missing}
        return Task("any", splits, torch.nn.Identity, "classification", ("accuracy",))

    with pytest.raises(ValueError, match=rf"`splits` must have all of .* for task 'load', without \['{missing}'\]"):
        load_task(load)


def test_digits_chooses_on_the_images_that_were_always_held_out() -> None:
    from sklearn.datasets import load_digits  # noqa: PLC0415
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    _, labels = load_digits(return_X_y=True)
    _, expected = train_test_split(labels, test_size=0.25, stratify=labels, random_state=0)
    task = load_task("digits")
    assert task.splits["validation"].tensors[1].tolist() == expected.tolist()  # type: ignore[attr-defined]
    counts = [torch.bincount(task.splits[split].tensors[1]) for split in ("validation", "test")]  # type: ignore[attr-defined]
    assert (counts[0] - counts[1]).abs().max() <= 1  # stratified


def test_the_corpus_is_split_by_file_and_large() -> None:
    corpus = read_corpus()
    assert len({p.text for p in corpus}) == len(corpus) > 30_000
    for split, share in {"validation": 0.23, "test": 0.12}.items():
        held_out = [p for p in corpus if p.split == split]
        assert len(held_out) / len(corpus) == pytest.approx(share, abs=0.02)
        assert {p.package for p in held_out} == set(range(len(CORPUS_PACKAGES)))


def test_a_text_of_files_in_several_splits_counts_for_the_first_of_them(tmp_path: Path, monkeypatch) -> None:
    common = {"all": "train", "held out": "validation", "trained and tested": "train"}
    where = {"all": SPLITS, "held out": SPLITS[1:], "trained and tested": ("train", "test")}
    files = []
    for split in reversed(SPLITS):  # the order in which files are read does not matter
        name = next(f"{i}.py" for i in range(100) if docs._split_of(f"{i}.py") == split)
        texts = [f"own text of {split}", *(text for text, splits in where.items() if split in splits)]
        body = "\n\n".join(f"{text} {'.' * docs.MIN_CHARACTERS}" for text in texts)
        (tmp_path / name).write_text(f'"""{body}"""')
        files.append((name, tmp_path / name))
    monkeypatch.setattr(docs, "CORPUS_PACKAGES", ("any",))
    monkeypatch.setattr(docs, "_find_files", lambda package: files)
    found = {p.text.rpartition(" ")[0]: p.split for p in docs._read_packages()}
    assert found == common | {f"own text of {split}": split for split in SPLITS}


def test_classes_are_balanced_and_batches_padded() -> None:
    task = load_task("docs_package", **EMBEDDED["docs_package"])
    train, validation = (task.splits[name].columns for name in ("train", "validation"))  # type: ignore[attr-defined]
    assert [train["labels"].count(label) for label in range(5)] == [40] * 5
    assert [validation["labels"].count(label) for label in range(5)] == [10] * 5
    masks = [get_token_mask(batch) for batch in task.batches("train", 50)]
    assert any(bool((~mask).any()) for mask in masks if mask is not None)


def test_language_packages_can_be_chosen() -> None:
    four = load_task("docs_language", **SMALL_LLAMA, packages=list(CORPUS_PACKAGES[:4]))
    fifth = load_task("docs_language", **SMALL_LLAMA, packages=[CORPUS_PACKAGES[4]])
    both = load_task("docs_language", **SMALL_LLAMA)
    assert abs(len(four.splits["train"]) + len(fifth.splits["train"]) - len(both.splits["train"])) <= 1
    with pytest.raises(ValueError, match=r"among .* got \['torch'\]"):
        load_task("docs_language", packages=["torch"])


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("mnist", {}, r"`task` must be one of \['cifar10', 'cifar10_pretrained', 'digits'.* got 'mnist'"),
        ("digits", {"size": 3}, r"`options` must be among .*'width'\] for task 'digits', got \['size'\]"),
        ("docs_package", {"train_samples": 10**7}, r"`train_samples` must be in \[5, \d+\] .* got 10000000"),
        ("docs_language", {"validation_samples": 10**7}, r"`validation_samples` must be in \[1, \d+\], got 10000000"),
        ("docs_package", {"test_samples": 10**7}, r"`test_samples` must be in \[5, \d+\] .* got 10000000"),
        ("glue", {"task": "sst3"}, "`task` must be one of .* got 'sst3'"),
        ("imagenet", {"model": "vit_x"}, "`model` must be a timm model with pretrained weights, got 'vit_x'"),
        ("wikitext2", {"dtype": "int8"}, "`dtype` must be the name of a floating torch dtype, got 'int8'"),
    ],
)
def test_bad_options_are_named(name: str, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_task(name, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [("glue", {"data": "no/such"}), ("cifar10", {"data": "no/such"}), ("wikitext2", {"data": "no/such"})],
)
def test_missing_data_names_the_remedy(name: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"'no/such' could not be loaded: HF_HUB_OFFLINE is set, .* HF_HOME"):
        load_task(name, **options)


def test_glue_has_all_nine_tasks_with_known_metrics() -> None:
    from lowrank.tasks.metrics import METRICS  # noqa: PLC0415

    assert sorted(GLUE) == ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"]
    for facts in GLUE.values():
        objective = "classification" if facts.classes > 1 else "regression"
        assert all(objective in METRICS[name].objectives for name in facts.metrics)


def bert_folder(folder: Path, words: list[str]) -> Path:
    """A tiny BERT with its tokenizer, as `save_pretrained` writes them."""
    import transformers  # noqa: PLC0415

    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = transformers.BertTokenizerFast(vocab_file=str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:An input array is nearly constant")  # what an untrained model predicts
@pytest.mark.parametrize("name", GLUE)
def test_every_glue_task_loads_from_a_folder(name: str, tmp_path: Path) -> None:
    facts = GLUE[name]
    model = bert_folder(tmp_path, ["good", "bad", "film"])
    data = tmp_path / "source" / "data"
    data.mkdir(parents=True)
    header = ",".join([*facts.fields, "label"])
    label = ["0.5", "4.0"] if facts.classes == 1 else ["0", "1"]
    lines = [",".join([f"{'good ' * i}film"] * len(facts.fields) + [label[i % 2]]) for i in range(6)]
    unlabelled = [line.rpartition(",")[0] + ",-1" for line in lines]
    splits = {"train": lines, facts.validation: lines, facts.validation.replace("validation", "test"): unlabelled}
    for split, rows in splits.items():
        (data / f"{split}-00000-of-00001.csv").write_text("\n".join([header, *rows]))
    task = load_task("glue", task=name, model=str(model), data=str(data.parent))
    torch.manual_seed(0)
    net = task.make_model()
    assert task.rows["validation"] + task.rows["test"] == 6  # the source's validation split is halved
    assert not contents(task.splits["validation"]) & contents(task.splits["test"])
    batch = next(iter(task.batches("validation", 6)))
    assert isinstance(batch, dict)
    pair = batch["token_type_ids"].sum(1)
    assert bool((pair > 0).all()) == (len(facts.fields) == 2)  # the second sentence is marked as such
    assert list(task.evaluate(net)) == ["loss", *facts.metrics]  # tables show the column after the loss
    assert task.headline.name == task.metric == facts.metrics[0]


def sentences(folder: Path, name: str, columns: str, rows: list[str]) -> None:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "data" / f"{name}-00000-of-00001.csv").write_text("\n".join([columns, *rows]))


def test_a_source_with_text_and_a_labelled_test_split_is_taken_as_it_is(tmp_path: Path) -> None:
    model = str(bert_folder(tmp_path, ["good", "bad", "film"]))
    for split, rows in {"train": 6, "validation": 4, "test": 5}.items():
        lines = [f"{split} {'good ' * i}film,{i % 2},word" for i in range(rows)]
        sentences(tmp_path / "source", split, "text,label,label_text", lines)
    task = load_task("glue", task="sst2", model=model, data=str(tmp_path / "source"))
    assert task.rows == {"train": 6, "validation": 4, "test": 5}
    with pytest.raises(ValueError, match=r"`data` must have the columns \['sentence1', 'sentence2', 'label'\], got"):
        load_task("glue", task="rte", model=model, data=str(tmp_path / "source"))


def test_a_source_without_validation_is_refused(tmp_path: Path) -> None:
    model = str(bert_folder(tmp_path, ["good", "bad", "film"]))
    sentences(tmp_path / "source", "train", "text,label", ["good film,1", "bad film,0"])
    with pytest.raises(ValueError, match=r"for task 'glue', without \['validation', 'test'\]"):
        load_task("glue", task="sst2", model=model, data=str(tmp_path / "source"))


def test_mnli_halves_its_matched_part_and_keeps_the_mismatched_one(tmp_path: Path) -> None:
    model = str(bert_folder(tmp_path, ["good", "bad", "film"]))
    lines = [f"{'good ' * i}film,bad film,{i % 3}" for i in range(12)]
    for split in ("train", "validation_matched", "validation_mismatched"):
        sentences(tmp_path / "source", split, "premise,hypothesis,label", lines)
    task = load_task("glue", task="mnli", model=model, data=str(tmp_path / "source"))
    assert sorted(task.rows) == ["test", "train", "validation", "validation_mismatched"]
    assert task.rows["validation"] + task.rows["test"] == task.rows["validation_mismatched"] == 12


def test_imagenet_loads_from_class_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm  # noqa: PLC0415

    for split in ("train", "val"):
        for label in range(3):
            folder = tmp_path / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for name in "abcd":
                Image.new("RGB", (40, 30), (80 * label, ord(name), 10)).save(folder / f"{name}.png")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name, pretrained=False))
    task = load_task("imagenet", model="vit_tiny_patch16_224", data=str(tmp_path))
    model = task.make_model()
    linears = task.linears(model)
    assert len(linears) == 12 * 4 + 1
    assert "head" in linears
    halves = [range(12)[p] for split in SPLITS[1:] for p in task.splits[split].indices]  # type: ignore[attr-defined]
    assert sorted(halves) == list(range(12))
    images, targets = next(iter(task.batches("validation", 3)))
    assert images.shape == (3, 3, 224, 224)
    wanted = [position // 4 for position in task.splits["validation"].indices[:3]]  # type: ignore[attr-defined]
    assert targets.tolist() == wanted
    monkeypatch.undo()
    scratch = load_task("imagenet", model="vit_tiny_patch16_224", data=str(tmp_path), pretrained=False)
    assert scratch.identity != task.identity
    assert scratch.make_model().head.out_features == 1000  # asks for no weights
    names = [type(step).__name__ for step in scratch.split("train").transform.transforms]  # pyright: ignore
    assert any(name.startswith("Random") for name in names)
    assert torch.equal(scratch.split("validation")[1][0], task.split("validation")[1][0])
    with pytest.raises(FileNotFoundError, match=r"must be a folder with train/ and val/ .* lacks \['train', 'val'\]"):
        load_task("imagenet", data=str(tmp_path / "train"))


def llama_folder(folder: Path) -> Path:
    """A tiny Llama with a tokenizer."""
    import transformers  # noqa: PLC0415

    from lowrank.tasks.text import train_tokenizer  # noqa: PLC0415

    tokenizer = train_tokenizer(["the quick brown fox"] * 4, 300, sentence=False)
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_wikitext_protocol_from_a_folder(tmp_path: Path) -> None:
    model = llama_folder(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    lines = ["the quick brown fox", "", "= fox =", ""] * 20
    for split in SPLITS:
        (data / f"{split}.txt").write_text("\n".join(lines))
    options = dict(model=str(model), data=str(data), config=None, length=16, dtype="float32")
    task = load_task("wikitext2", **options)
    assert load_task("wikitext2", **options, auto="AutoModelForImageTextToText").identity != task.identity
    import transformers  # noqa: PLC0415

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    expected = tokenizer("\n\n".join(lines))["input_ids"]
    assert len(task.splits["validation"]) == len(expected) // 16  # the chunk count of the protocol
    assert task.splits["validation"][0]["input_ids"].tolist() == expected[:16]
    uniform = task.make_model()
    for p in uniform.parameters():
        torch.nn.init.zeros_(p)
    assert task.evaluate(uniform)["perplexity"] == pytest.approx(len(tokenizer), rel=1e-5)  # uniform logits
    assert task.rows == dict.fromkeys(SPLITS, len(expected) // 16)


def start_texts(folder: Path) -> None:
    """Let the tokenizer of a folder put its token for the beginning in front of every text."""
    import tokenizers  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    token = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{token[0]} $A", special_tokens=[token]
    )
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("starts", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_chunks_start_with_the_token_that_texts_start_with(tmp_path: Path, starts: bool, bos: bool) -> None:
    model = llama_folder(tmp_path)
    if starts:
        start_texts(model)
    data = tmp_path / "data"
    data.mkdir()
    lines = [f"the quick brown fox {i}" for i in range(20)]
    for split in SPLITS:
        (data / f"{split}.txt").write_text("\n".join(lines))
    options = dict(model=str(model), data=str(data), config=None, length=16, dtype="float32", bos=bos)
    task = load_task("wikitext2", **options)
    import transformers  # noqa: PLC0415

    tokens = transformers.AutoTokenizer.from_pretrained(model)("\n\n".join(lines))["input_ids"]
    start = [tokens[0]] if starts and bos else []
    text, size = tokens[len(start) :], 16 - len(start)
    wanted = [start + text[i : i + size] for i in range(0, len(text) - size + 1, size)]
    for split in SPLITS:
        chunks = task.splits[split] if split != "test" else task.open_test(FROZEN).split("test")
        assert [chunks[i]["input_ids"].tolist() for i in range(len(chunks))] == wanted
        assert chunks[1]["labels"].tolist() == wanted[1]
    few = load_task("wikitext2", **options, evaluation_chunks=3)
    assert few.rows == {"train": len(wanted), "validation": 3, "test": 3}
    drawn = [few.splits["validation"][i]["input_ids"].tolist() for i in range(3)]
    assert drawn == [few.splits["test"][i]["input_ids"].tolist() for i in range(3)]
    assert [wanted.index(chunk) for chunk in drawn] == sorted(wanted.index(chunk) for chunk in drawn)
    for count in (0, len(wanted) + 1):
        with pytest.raises(ValueError, match=rf"`evaluation_chunks` must be in \[1, {len(wanted)}\]"):
            load_task("wikitext2", **options, evaluation_chunks=count)


@pytest.mark.parametrize("starts", [True, False])
def test_a_pretrained_model_reads_the_docs_in_its_own_tokens(tmp_path: Path, starts: bool) -> None:
    model = llama_folder(tmp_path)
    if starts:
        start_texts(model)
    options = dict(model=str(model), length=24, validation_samples=5, test_samples=3)
    task = load_task("docs_pretrained", **options)
    other = load_task("docs_language", **SMALL_LLAMA)
    assert task.rows | {"train": 0} == {"train": 0, "validation": 5, "test": 3}
    import transformers  # noqa: PLC0415

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    first = next(p.text for p in read_corpus() if p.split == "train")
    found = task.splits["train"][0]["input_ids"].tolist()
    start = [tokenizer.bos_token_id]
    wanted = start * (1 + starts) + tokenizer(first, add_special_tokens=False)["input_ids"]
    assert found[: len(wanted)] == wanted[:24]
    firsts = {task.splits["validation"][i]["input_ids"][0].item() for i in range(5)}
    assert (firsts == set(start)) == starts  # else chunks begin within a text
    assert next(iter(task.make_model().parameters())).dtype == torch.float32
    assert task.identity["data"] == other.identity["data"]
    with pytest.raises(ValueError, match="`packages` must be among"):
        load_task("docs_pretrained", model=str(model), packages=["flask"])


def test_a_pretrained_vision_model_gets_a_head_fitted_to_its_features(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cifar10, "VALIDATION_SAMPLES", 10)
    rows = stand_ins.make_cifar10(tmp_path / "data")
    monkeypatch.setattr(cifar10_pretrained, "load_splits", lambda name: rows)
    model = stand_ins.make_dinov2(tmp_path / "model")
    options = dict(model=str(model), size=32, head_samples=30, evaluation_samples=8)
    task = load_task("cifar10_pretrained", **options)
    assert task.rows == {"train": 30, "validation": 8, "test": 8}
    torch.manual_seed(1)
    first, again = task.make_model(), task.make_model()
    assert hash_model(first) == hash_model(again)
    assert first.classifier.weight.shape == (10, 32)
    whole = Task("train", dict.fromkeys(SPLITS, task.splits["train"]), task.make_model, task.objective, task.metrics)
    assert whole.evaluate(first)["accuracy"] > 0.5
    assert len(task.linears(first)) == 2 * 6
    with pytest.raises(ValueError, match="`evaluation_samples` must be in"):
        load_task("cifar10_pretrained", **options | {"evaluation_samples": 11})
    with pytest.raises(ValueError, match="`head_samples` must be in"):
        load_task("cifar10_pretrained", **options | {"head_samples": 31})
    with pytest.raises(ValueError, match="`size` must be at least 32"):
        load_task("cifar10_pretrained", **options | {"size": 16})


def test_wikitext_without_a_train_split_calibrates_on_the_first_half_of_validation(tmp_path: Path) -> None:
    model = llama_folder(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    calibration, choice = ["the quick brown fox"] * 30, ["fox fox the the"] * 30
    (data / "validation.txt").write_text("\n".join(calibration + choice))
    (data / "test.txt").write_text("\n".join(["brown brown brown"] * 30))
    options = dict(model=str(model), data=str(data), config=None, length=16, dtype="float32")
    task = load_task("wikitext2", **options)
    import transformers  # noqa: PLC0415

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    for split, lines in {"train": calibration, "validation": choice}.items():
        expected = tokenizer("\n\n".join(lines))["input_ids"]
        assert task.rows[split] == len(expected) // 16
        assert task.splits[split][0]["input_ids"].tolist() == expected[:16]
    (data / "validation.txt").unlink()
    with pytest.raises(ValueError, match=r"for task 'wikitext2', without \['train', 'validation'\]"):
        load_task("wikitext2", **options)
