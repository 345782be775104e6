"""Make the pages of the reference from signatures and docstrings, which are Markdown. No module is imported for this."""

import ast
import re
from pathlib import Path

from lowrank.io.dependencies import PACKAGE

Definition = ast.FunctionDef | ast.ClassDef


def module_name(path: Path) -> str:
    """Return the dotted name of a source file of this package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def public_modules() -> dict[str, Path]:
    """Return every public module and package, dotted name -> source file, sorted by name."""
    modules = {module_name(path): path for path in PACKAGE.rglob("*.py") if not path.stem.startswith("_")}
    packages = {module_name(path): path for path in PACKAGE.rglob("__init__.py")}
    return dict(sorted((modules | packages).items()))


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf8"))


def _documented(body: list[ast.stmt]) -> list[Definition]:
    """Return the public definitions of a module or class that have a docstring, in the order of the source."""
    definitions = [node for node in body if isinstance(node, Definition) and not node.name.startswith("_")]
    return [node for node in definitions if ast.get_docstring(node)]


def _decorators(node: Definition) -> set[str]:
    """Return the names of decorators, for example `dataclass` for `@dataclass(frozen=True)`."""
    return {ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list}


def _arguments(node: ast.FunctionDef, method: bool) -> str:
    arguments = node.args
    first = arguments.posonlyargs or arguments.args
    if method and first and "staticmethod" not in _decorators(node):
        first.pop(0)  # self or cls
    return f"({ast.unparse(arguments)})"


def _fields(node: ast.ClassDef) -> str:
    """Return the arguments of a class: the fields of a dataclass, or the arguments of `__init__`."""
    if "dataclass" in _decorators(node):
        fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
        return f"({', '.join(ast.unparse(field) for field in fields)})"
    constructors = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
    return _arguments(constructors[0], method=True) if constructors else ""


def _signature(node: Definition, within: str) -> tuple[str, str]:
    """Return the directive of Sphinx's Python domain and its argument; members are named with their class."""
    if isinstance(node, ast.ClassDef):
        return "class", within + node.name + _fields(node)
    returns = " -> " + ast.unparse(node.returns).strip("'") if node.returns else ""
    if _decorators(node) & {"property", "cached_property"}:
        return "property", within + node.name
    return "method" if within else "function", f"{within}{node.name}{_arguments(node, bool(within))}{returns}"


def format_entry(node: Definition, within: str = "") -> str:
    """Format one definition, and the members of a class after it, in MyST Markdown.

    **Arguments**

    - `node`: syntax tree of a function or class.
    - `within`: the class of a member and a dot. Default "": a definition of the module.
    """
    kind, signature = _signature(node, within)
    text = f"```````{{py:{kind}}} {signature}\n{ast.get_docstring(node)}\n```````"
    members = _documented(node.body) if isinstance(node, ast.ClassDef) else []
    return "\n\n".join([text, *(format_entry(member, f"{within}{node.name}.") for member in members)])


def _toctree(names: list[str]) -> str:
    titles = [f"{name.removeprefix(f'{PACKAGE.name}.')} <{name}>" for name in names]
    return "\n".join(["```{toctree}", ":hidden:", *titles, "```"]) if names else ""


def _linked(docstring: str, name: str, children: list[str]) -> str:
    """Turn the bullets of a package's table of contents into links to the pages of its modules."""

    def link(match: re.Match[str]) -> str:
        child = f"{name}.{match[1]}"
        return f"- [{match[1]}]({child}.md):" if child in children else match[0]

    return re.sub(r"^- `(\w+)`:", link, docstring, flags=re.MULTILINE)


def module_page(name: str, path: Path, children: list[str]) -> str:
    """Make the page of one module or package.

    **Arguments**

    - `name`: dotted name.
    - `path`: source file.
    - `children`: dotted names of the public modules and packages in a package, empty for a module.
    """
    tree = _parse(path)
    docstring = _linked(ast.get_docstring(tree) or "", name, children)
    entries = [format_entry(node) for node in _documented(tree.body)]
    parts = [f"# {name}", f"```{{py:module}} {name}\n```", docstring, _toctree(children), *entries]
    return "\n\n".join(part for part in parts if part) + "\n"


def public_names() -> dict[str, str]:
    """Return each name of `from lowrank import ...` -> the module that defines it."""
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: f"{PACKAGE.name}.{node.module}" for node in imports for alias in node.names}


def public_entries() -> str:
    """Format what users import from the package itself, sorted by name: signature, docstring, and a link to the module."""
    modules, parts = public_modules(), []
    for name, module in sorted(public_names().items(), key=lambda item: item[0].lower()):
        parts += [f"## {name}", f"In [{module}]({module}.md)."]
        for node in _documented(_parse(modules[module]).body):
            if node.name == name:
                parts += [f"```python\n{_signature(node, '')[1]}\n```", ast.get_docstring(node) or ""]
    return "\n\n".join(parts)


def write_reference(folder: Path) -> None:
    """Write a page per module, a page per package with its table of contents, and the list of packages.

    **Arguments**

    - `folder`: the folder to make.
    """
    folder.mkdir(parents=True)
    modules = public_modules()
    children = {name: [other for other in modules if other.rpartition(".")[0] == name] for name in modules}
    lines = []
    for name, path in modules.items():
        page = module_page(name, path, children[name])
        page += f"\n{public_entries()}\n" if name == PACKAGE.name else ""
        (folder / f"{name}.md").write_text(page, encoding="utf8")
        if name in children[PACKAGE.name]:
            summary = (ast.get_docstring(_parse(path)) or "").partition("\n\n")[0]
            lines.append(f"- [{name}]({name}.md): {' '.join(summary.split())}")
    introduction = (
        f"Every public function and class, from its docstring, by package of [{PACKAGE.name}]({PACKAGE.name}.md)."
    )
    parts = ["# Reference", introduction, "\n".join(lines), _toctree([PACKAGE.name])]
    (folder / "index.md").write_text("\n\n".join(parts) + "\n", encoding="utf8")
