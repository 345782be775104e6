"""The pages of the reference, made of signatures and docstrings, which are Markdown. Nothing is imported for them."""

import ast
from pathlib import Path

from lowrank.io.dependencies import PACKAGE

Definition = ast.FunctionDef | ast.ClassDef


def module_name(path: Path) -> str:
    """The dotted name of a source file of this package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def public_modules() -> dict[str, Path]:
    """Every module of this package that has anything to say, by dotted name."""
    found = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if not path.stem.startswith("_")}
    packages = {module_name(path): path for path in PACKAGE.rglob("__init__.py")}
    return dict(sorted((found | packages).items()))


def _documented(body: list[ast.stmt]) -> list[Definition]:
    """The public definitions of a module or class that have a docstring, in the order of the source."""
    found = [node for node in body if isinstance(node, Definition) and not node.name.startswith("_")]
    return [node for node in found if ast.get_docstring(node)]


def _decorators(node: Definition) -> set[str]:
    """`dataclass` for `@dataclass(frozen=True)`."""
    return {ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list}


def _arguments(node: ast.FunctionDef, method: bool) -> str:
    arguments = node.args
    first = arguments.posonlyargs or arguments.args
    if method and first and "staticmethod" not in _decorators(node):
        first.pop(0)  # self or cls
    return f"({ast.unparse(arguments)})"


def _fields(node: ast.ClassDef) -> str:
    """What a class is made from: the fields of a dataclass, else the arguments of its `__init__`."""
    if "dataclass" in _decorators(node):
        fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
        return f"({', '.join(ast.unparse(field) for field in fields)})"
    made = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
    return _arguments(made[0], method=True) if made else ""


def _signature(node: Definition, within: str) -> tuple[str, str]:
    """The directive of Sphinx's Python domain and its argument, names of members with their class."""
    if isinstance(node, ast.ClassDef):
        return "class", within + node.name + _fields(node)
    returns = " -> " + ast.unparse(node.returns).strip("'") if node.returns else ""
    if _decorators(node) & {"property", "cached_property"}:
        return "property", within + node.name
    return "method" if within else "function", f"{within}{node.name}{_arguments(node, bool(within))}{returns}"


def entry(node: Definition, within: str = "") -> str:
    """One definition in MyST Markdown, then the members of a class."""
    kind, signature = _signature(node, within)
    text = f"```````{{py:{kind}}} {signature}\n{ast.get_docstring(node)}\n```````"
    members = _documented(node.body) if isinstance(node, ast.ClassDef) else []
    return "\n\n".join([text, *(entry(member, f"{within}{node.name}.") for member in members)])


def module_page(name: str, path: Path) -> str:
    """The page of one module."""
    tree = ast.parse(path.read_text(encoding="utf8"))
    parts = [f"# {name}", f"```{{py:module}} {name}\n```", ast.get_docstring(tree) or ""]
    return "\n\n".join([*parts, *(entry(node) for node in _documented(tree.body))]) + "\n"


def write_reference(folder: Path) -> None:
    """Writes a page per module and the list of them all."""
    folder.mkdir(parents=True)
    modules = public_modules()
    lines = []
    for name, path in modules.items():
        (folder / f"{name}.md").write_text(module_page(name, path), encoding="utf8")
        summary = (ast.get_docstring(ast.parse(path.read_text(encoding="utf8"))) or "").partition("\n\n")[0]
        lines.append(f"- [{name}]({name}.md): {' '.join(summary.split())}")
    toctree = "\n".join(["```{toctree}", ":hidden:", *modules, "```"])
    page = "\n\n".join(
        ["# Reference", "Every public function and class, from its docstring.", "\n".join(lines), toctree]
    )
    (folder / "index.md").write_text(page + "\n", encoding="utf8")
