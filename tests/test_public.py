"""The public face: what `import lowrank` costs, that every name is there and documented in one form."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch

import lowrank
from lowrank.io.dependencies import PACKAGE, ROOT, sources
from lowrank.nn.batches import compute_logits

MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name not in ("__init__.py", "__main__.py")
]
VERBS = set((Path(__file__).parent / "verbs.txt").read_text(encoding="utf8").split())
MOST_ARGUMENTS = 8
LOADERS = "lowrank.tasks."  # `load` of a task: its arguments are the options that a set file names

STARTUP = """
import sys, time
start = time.perf_counter()
import lowrank
print(time.perf_counter() - start, [name for name in ("torch", "numpy", "transformers") if name in sys.modules])
"""


def public_members(name: str) -> dict[str, Any]:
    """Functions, classes and methods of a module that are its own and have no leading underscore."""
    module = importlib.import_module(name)
    members: dict[str, Any] = {}
    for key, value in vars(module).items():
        if key.startswith("_") or getattr(value, "__module__", None) != name:
            continue
        if inspect.isclass(value):
            members[key] = value
            for attribute, method in vars(value).items():
                function = method.fget if isinstance(method, property) else getattr(method, "__func__", method)
                private = attribute.startswith("_") or attribute in (
                    *getattr(value, "__dataclass_fields__", ()),
                    "forward",
                )
                if isinstance(function, FunctionType) and not private:
                    members[f"{key}.{attribute}"] = function
        elif callable(value):
            members[key] = value
    return members


def arguments_of(value: Any) -> list[str]:
    """Names of the arguments of a function, or of the constructor of a class."""
    wrapped = inspect.unwrap(value)
    if getattr(wrapped, "_is_protocol", False):
        return []
    if inspect.isclass(wrapped) and not ("__init__" in vars(wrapped) or hasattr(wrapped, "_fields")):
        return []
    names = inspect.signature(wrapped).parameters.values()
    return [p.name for p in names if p.name not in ("self", "cls") and not p.name.startswith("_")]


def test_importing_costs_next_to_nothing() -> None:
    runs = [
        subprocess.run([sys.executable, "-c", STARTUP], capture_output=True, text=True, check=True) for _ in range(5)
    ]
    seconds, loaded = zip(*(run.stdout.split(maxsplit=1) for run in runs), strict=True)
    assert set(loaded) == {"[]\n"}
    assert min(map(float, seconds)) < 0.05


def test_there_are_about_thirty_public_names_and_all_load() -> None:
    assert 25 <= len(lowrank.__all__) <= 40
    for name in lowrank.__all__:
        assert getattr(lowrank, name) is not None
    with pytest.raises(AttributeError):
        lowrank.no_such_name  # noqa: B018


def test_a_page_lists_the_public_names() -> None:
    page = (ROOT / "docs" / "library.md").read_text(encoding="utf8")
    missing = [name for name in lowrank.__all__ if not re.search(rf"`{name}\b", page)]
    assert missing == []


def test_a_public_name_counts_as_the_module_that_holds_it(tmp_path: Path) -> None:
    (notebook := tmp_path / "notebook.py").write_text("from lowrank import allocate_ranks\n", encoding="utf8")
    names = {path.relative_to(PACKAGE).as_posix() for path in sources(notebook) if path.is_relative_to(PACKAGE)}
    assert "factorization/rank_allocation.py" in names
    assert not {name for name in names if name.startswith(("training/", "compression/", "pi3/"))}


@pytest.mark.parametrize("name", MODULES)
def test_public_docstrings_have_one_form(name: str) -> None:
    for member, value in public_members(name).items():
        docstring = inspect.getdoc(value) or ""
        where = f"{name}.{member}"
        first = docstring.partition("\n")[0]
        assert first.endswith("."), f"{where}: the first line must be a sentence, got {first!r}"
        assert first.split()[0].rstrip(",") in VERBS, (
            f"{where}: the first word must be a verb of tests/verbs.txt, got {first!r}"
        )
        arguments = arguments_of(value)
        if len(arguments) > 1 or "**Arguments**" in docstring:
            bullets = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^- (.*?):", docstring, flags=re.MULTILINE))))
            assert set(arguments) <= bullets, f"{where}: no bullet for {sorted(set(arguments) - bullets)}"


@pytest.mark.parametrize("name", MODULES)
def test_functions_take_few_arguments(name: str) -> None:
    tree = ast.parse(Path(importlib.import_module(name).__file__ or "").read_text(encoding="utf8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not (name.startswith(LOADERS) and node.name == "load"):
            arguments = [a.arg for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]
            count = len([a for a in arguments if a not in ("self", "cls")])
            assert count <= MOST_ARGUMENTS, f"{name}.{node.name} takes {count} arguments: use a config object"


README = (ROOT / "README.md").read_text(encoding="utf8")
EXAMPLE = re.search(r"## Use the library\n\n```python\n(.*?)```", README, flags=re.DOTALL)
FAMILIES = {
    "bert": "model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64))",
    "llama": (
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=30000)\n"
        "model = LlamaForCausalLM(LlamaConfig(**sizes))"
    ),
    "timm vit": "import timm\nmodel = timm.create_model('test_vit', num_classes=5)",
}
IMAGES = "batches = [(torch.randn(4, 3, 160, 160), torch.zeros(4)) for _ in range(2)]"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:layer .* calibration tokens for:UserWarning")
def test_the_eight_lines_of_the_readme_serve_every_family(family: str, tmp_path: Path, monkeypatch, capsys) -> None:
    assert EXAMPLE
    lines = [line for line in EXAMPLE[1].splitlines() if line]
    assert len(lines) == 8
    assert len([line for line in lines if line.startswith("from lowrank")]) == 1
    swapped = {"model": f"{FAMILIES[family]}.eval()", "batches": IMAGES if family == "timm vit" else ""}
    script = [swapped.get(line.split(" = ")[0]) or line for line in lines]
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    exec(compile("\n".join(script), "the example", "exec"), namespace)
    assert "whole model" in capsys.readouterr().out
    batch = namespace["batches"][0]
    with torch.no_grad():
        before, after = (compute_logits(namespace[name], batch) for name in ("model", "again"))
    assert torch.equal(before, after)
