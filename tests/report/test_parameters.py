"""Parameter sets: every committed set fits its notebooks, and what does not fit is named."""

import importlib
import inspect
from itertools import chain
from pathlib import Path

import pytest
import yaml

from lowrank.pi3.calibration import RENDERED_LAYOUT, split_of
from lowrank.pi3.data import load_scenes, rendered_scenes
from lowrank.pi3.evaluation import GEOMETRY_TASKS, PROTOCOLS
from lowrank.report import parameters as module
from lowrank.report.errors import ParameterError
from lowrank.report.parameters import jobs, notebook_names, read_defaults, read_parameters, read_set, set_names
from lowrank.tasks.registry import TASKS
from lowrank.training.loop import Recipe

EMBEDDED = ("digits-vit", "docs-llama", "scenes-pi3")


@pytest.mark.parametrize("name", set_names())
def test_every_set_fits_every_notebook_it_names(name: str) -> None:
    found = jobs([name])
    assert found
    for _, notebook in found:
        values = read_parameters(name, notebook)
        assert values["set_name"] == name
        if "task" not in values:  # of notebook 07, which is no task of training
            reported = [values["swept"], values["refined_on"], *chain.from_iterable(values["evaluation"].values())]
            assert split_of(values["calibration"]) == "train"
            assert {split_of(source) for source in reported} == {"test"}
            for source in [values["calibration"], *reported]:
                load = rendered_scenes if source["layout"] == RENDERED_LAYOUT else load_scenes
                assert set(source) - {"layout", "split"} <= set(inspect.signature(load).parameters)
                assert source["layout"] in PROTOCOLS
            assert set(values["evaluation"]) <= set(GEOMETRY_TASKS)
            continue
        options = inspect.signature(importlib.import_module(TASKS[values["task"]]).load).parameters
        assert set(values["task_options"]) <= set(options)
        Recipe(
            values.get("steps", values.get("epochs")),
            values["batch_size"],
            values["learning_rate"],
            precision=values["precision"],
        )


@pytest.mark.parametrize("notebook", notebook_names())
def test_defaults_are_the_first_embedded_set(notebook: str) -> None:
    first = next(name for name in EMBEDDED if name in set_names() and notebook in read_set(name))
    assert read_parameters(first, notebook) == read_defaults(notebook)


def test_the_sets_of_the_plan_exist() -> None:
    planned = {"digits-vit", "docs-bert", "docs-llama", "sst2-minilm", "sst2-bert", "imagenet-vit", "wikitext2-llama7b"}
    planned |= {"cifar10-minivit", "cifar10-minivit-full"}
    assert planned <= set(set_names())


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with one small notebook."""
    monkeypatch.setattr(module, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(module, "SETS", tmp_path)
    source = (
        '# %% tags=["parameters"]\nset_name = "a"\nwidth = 3\nrate = 0.5\nfast = True\nsizes = [1, 2]\n'
        "more = {}\n\n# %%\nprint(width)\n"
    )
    (tmp_path / "01_small.py").write_text(source)
    return tmp_path


def write(house: Path, content: object) -> None:
    (house / "a.yaml").write_text(content if isinstance(content, str) else yaml.safe_dump(content))


def test_defaults_then_common_then_own(house: Path) -> None:
    write(house, {"common": {"width": 5, "rate": 1}, "small": {"width": 7}})
    expected = {"set_name": "a", "width": 7, "rate": 1, "fast": True, "sizes": [1, 2], "more": {}}
    assert read_parameters("a", "01_small") == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"small": {"widht": 4}},
            r"must be among \['fast', 'more', 'rate', 'set_name', 'sizes', 'width'\], got \['widht'\]",
        ),
        ({"common": {"depth": 4}, "small": {}}, r"got \['depth'\]"),
        ({"small": {"width": "4"}}, r"`width` of '01_small' must be of type int \(as 3\), got '4' in set 'a'"),
        ({"small": {"width": 4.0}}, "must be of type int"),
        ({"small": {"width": True}}, "must be of type int"),
        ({"small": {"rate": True}}, "must be of type float"),
        ({"small": {"fast": 1}}, "must be of type bool"),
        ({"small": {"sizes": [1, "2"]}}, "must be of type list"),
        ({"small": {"more": [1]}}, "must be of type dict"),
        ({"small": None}, "must map sections to parameters"),
        ({"common": {}}, r"`notebook` must be one of \[\] in set 'a', got '01_small'"),
        ({"small": {}, "resource": {"gpus": 1}}, r"must be among .*'resources'.*\], got \['resource'\]"),
        ("just words", "must map sections to parameters, got str"),
        ("", "must map sections to parameters, got NoneType"),
        ("a: [1, 2", "must be YAML: while parsing a flow sequence"),
        (
            "small: {width: 4}\nsmall: {}",
            "set file .*a.yaml must have each key once, got 'small' twice, again in line 2",
        ),
        ("small:\n  width: 4\n  rate: 1\n  width: 5", "must have each key once, got 'width' twice, again in line 4"),
        ("small: {more: {deep: [{a: 1, a: 2}]}}", "must have each key once, got 'a' twice, again in line 1"),
        ("a: !!python/object/apply:os.system ['true']", "must hold plain values, got '.*os.system' in line 1"),
        ("a: !!binary aGk=", "must hold plain values"),
        ("a: 2001-01-01", "must hold plain values"),
        ("a: 1\n1: 2", "must have texts as keys, got '1' in line 2"),
        ("on: 1", "must have texts as keys, got 'on' in line 1"),
        ("? [a]\n: 1", "must have texts as keys, got 'SequenceNode' in line 1"),
        ("a: [1, 2, yes]", "read in one way .*got 'yes' in line 1"),
        ("a:\n- 1:30", "read in one way .*got '1:30' in line 2"),
        ("a: 1_000", "read in one way .*got '1_000'"),
        ("a: 010", "read in one way .*got '010'"),
        ("a: 1e-3", "read in one way .*got '1e-3'"),
        ("a: .nan", "read in one way .*got '.nan'"),
        ("a: 1.0e+999", r"read in one way .*got '1.0e\+999'"),
        (f"a: {'9' * 5000}", "read in one way .*got '9{40}' in line 1"),
        ("a: " + "[" * 5000, "must be nested less deeply"),
        ("a: &a [*a]", "less than 10000 values, aliases included"),
        (f"a: {'x' * 2_000_000}", "must be at most 1000000 bytes long"),
        ("a: \x01", "must be YAML: unacceptable character"),
        ("a: 1\n---\nb: 1", "must be YAML: expected a single document"),
    ],
)
def test_bad_sets_are_named(house: Path, content: object, words: str) -> None:
    write(house, content)
    with pytest.raises(ParameterError, match=words):
        read_parameters("a", "01_small")


@pytest.mark.parametrize(
    ("first", "more"), [("[1]", "[{}]"), ("{b: 1}", "{{<<: [{}]}}")], ids=["lists", "merged mappings"]
)
def test_aliases_do_not_multiply_a_small_file(house: Path, first: str, more: str) -> None:
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{i}: &a{i} " + more.format(", ".join([f"*a{i - 1}"] * 9)) for i in range(1, 30)]
    write(house, "\n".join(lines))
    with pytest.raises(ParameterError, match="must hold less than 10000 values, aliases included, got more in line 5"):
        read_parameters("a", "01_small")


def test_what_quotes_and_aliases_say_is_read(house: Path) -> None:
    write(house, "small: {more: &m {a: '1:30', b: \"yes\", c: !!str 'x', d: True, e: ~, f: -1, g: 3.0e-4}, rate: 1}\n")
    expected = {"a": "1:30", "b": "yes", "c": "x", "d": True, "e": None, "f": -1, "g": 3e-4}
    assert read_parameters("a", "01_small")["more"] == expected


def test_a_merged_mapping_may_be_overridden(house: Path) -> None:
    write(house, "common: &all {width: 5, rate: 1}\nsmall: {<<: *all, width: 7}")
    assert read_parameters("a", "01_small") == read_defaults("01_small") | {"width": 7, "rate": 1}


def test_unknown_sets_and_notebooks_are_named(house: Path) -> None:
    write(house, {"small": {}})
    with pytest.raises(ParameterError, match=r"`set` must be one of \['a'\], got 'b'"):
        read_parameters("b", "01_small")
    with pytest.raises(ParameterError, match=r"`notebook` must be one of \['01_small'\], got '02_none'"):
        read_parameters("a", "02_none")


def test_a_parameters_cell_holds_literals_only(house: Path) -> None:
    (house / "01_small.py").write_text('# %% tags=["parameters"]\nset_name = "a"\nimport os\n')
    with pytest.raises(ParameterError, match="assignments of literals only"):
        read_defaults("01_small")
    for line in ("width = ", "width = print(1)", "width = [1", "width += 1"):
        (house / "01_small.py").write_text(f'# %% tags=["parameters"]\n{line}\n')
        with pytest.raises(ParameterError, match="must hold assignments of literals only"):
            read_defaults("01_small")
    (house / "01_small.py").write_text("# %%\nwidth = 3\n")
    with pytest.raises(ParameterError, match="must have a cell tagged 'parameters'"):
        read_defaults("01_small")


def test_a_variant_is_the_set_with_one_parameter_changed(house: Path) -> None:
    write(house, {"common": {"rate": 0.25}, "small": {"width": 7}})
    for change, expected in {
        "width=9": {"width": 9},
        "rate=1e-3": {"rate": 1e-3},
        "fast=False": {"fast": False},
        "sizes=3": {"sizes": [3]},
        "sizes=3,4": {"sizes": [3, 4]},
        "width=9@sizes=3,4": {"width": 9, "sizes": [3, 4]},
    }.items():
        name = f"a@{change}"
        assert jobs([name]) == [(name, "01_small")]
        assert read_parameters(name, "01_small") == read_parameters("a", "01_small") | expected | {"set_name": name}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a@", "`set` must be SET or SET@NAME=VALUE, with words, numbers or commas, got 'a@'"),
        ("a@width", "got 'a@width'"),
        ("a@width=../b", "got 'a@width=../b'"),
        ("b@width=3", r"`set` must be one of \['a'\], got 'b'"),
        ("a@widht=3", r"must change parameters of one of its notebooks, got 'a@widht=3'"),
        ("a@width=wide", "`width` of '01_small' must be of type int .*, got 'wide' in set 'a@width=wide'"),
        ("a@width=3.5", "`width` of '01_small' must be of type int"),
        ("a@sizes=3,x", "`sizes` of '01_small' must be of type list"),
    ],
)
def test_bad_variants_are_named(house: Path, name: str, words: str) -> None:
    write(house, {"small": {}})
    with pytest.raises(ParameterError, match=words):
        [read_parameters(*job) for job in jobs([name])]


def test_a_variant_has_the_notebooks_that_have_what_it_changes() -> None:
    found = [notebook for _, notebook in jobs(["digits-vit@seeds=3"])]
    assert found
    assert found == [n for n in notebook_names() if "seeds" in read_defaults(n) and n in read_set("digits-vit")]


def test_an_installation_without_notebooks_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "NOTEBOOKS", tmp_path / "notebooks")
    with pytest.raises(ParameterError, match="`notebook` needs a clone of the project"):
        read_defaults("01_whitening")
