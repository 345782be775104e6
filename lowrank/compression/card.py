"""Describe a compressed model as a model card: a README.md that the Hub reads, built from its record alone."""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank import __version__
from lowrank.compression.record_schema import CardRecord
from lowrank.factorization.methods import METHODS
from lowrank.io.checks import require
from lowrank.io.schemas import check_schema

PLACE = "path/to/this/folder"  # what a card loads, until it is pushed
TITLE = "lowrank: a reproducible report and library on low-rank compression of transformers"
PIFA = "Zhao et al., PIFA, arXiv:2501.19090, section 3"
NAME_ON_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")
COUNTS = ("rank", "parameters", "dense_parameters")


def collect_card(
    model: Any, former: Mapping[str, Any] | None, given: Mapping[str, Any] | bool
) -> dict[str, Any] | None:
    """Collect what a card says beside the record: the base model, its license, calibration data and quality.

    **Arguments**

    - `model`: the compressed model. Its configuration may tell which model of the Hub it was.
    - `former`: what the card said of the folder that the model was loaded from. Its quality is left out: the model may have
      changed.
    - `given`: what the caller says; it counts first. True for nothing, False for no card.

    **Returns** the fields of `CardRecord` that are known; None for no card.

    **Raises**

    - `ValueError`: an unknown field, or one of another type.
    """
    if given is False:
        return None
    given = {} if given is True else given
    known = list(CardRecord.model_fields)
    unknown = sorted(given.keys() - set(known))
    require(not unknown, "card", f"have keys among {known}", unknown)
    check_schema(dict(given), CardRecord, "card", "the call")
    kept = {key: value for key, value in (former or {}).items() if key != "quality"}
    return {key: value for key, value in {"base_model": _find_origin(model), **kept, **given}.items() if value}


def _find_origin(model: Any) -> str | None:
    """Return the name on the Hub that transformers has loaded a model from; timm names models of random weights too."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    is_local = not isinstance(name, str) or not NAME_ON_HUB.fullmatch(name) or Path(name).exists()
    return None if is_local else name


def format_card(record: Mapping[str, Any]) -> str:
    """Format the record of a compressed model as a model card: front matter in YAML, then Markdown.

    **Arguments**

    - `record`: the content of `lowrank.json`, see `save_compressed`.

    **Returns** the text of README.md. Every number in it is from the record.
    """
    about = record.get("card") or {}
    name = about.get("base_model") or _name_architecture(record)
    rows = [row for row in record["layers"].values() if all(type(row.get(key)) is int for key in COUNTS)]
    sections = {
        f"# {_inline(name)}, compressed by low rank": _describe(record, rows),
        "## Load": _show_loading(record),
        "## Calibration data": _list(about.get("calibration") or {}) or "Not recorded.",
        "## Quality": _tabulate_quality(about.get("quality") or {}) or "Not recorded.",
        "## Cite": _cite(rows),
    }
    body = "\n\n".join(f"{heading}\n\n{text}" for heading, text in sections.items())
    return f"---\n{_front_matter(record, about, rows)}\n---\n\n{body}\n"


def _front_matter(record: Mapping[str, Any], about: Mapping[str, Any], rows: list[Mapping[str, Any]]) -> str:
    from huggingface_hub import ModelCardData  # noqa: PLC0415

    methods = sorted({str(row["method"]) for row in rows if "method" in row})
    data = str((about.get("calibration") or {}).get("data"))
    on_hub = "/" in data and NAME_ON_HUB.fullmatch(data)
    return ModelCardData(
        base_model=about.get("base_model"),
        datasets=[data] if on_hub else None,
        library_name="lowrank",
        license=about.get("license"),
        tags=[
            "lowrank",
            "low-rank",
            "compression",
            *(record["base"] or {}).keys() & {"transformers", "timm"},
            *methods,
        ],
    ).to_yaml()


def _name_architecture(record: Mapping[str, Any]) -> str:
    base = record["base"] or {}
    return str(base.get("transformers") or base.get("timm") or "A model")


def _describe(record: Mapping[str, Any], rows: list[Mapping[str, Any]]) -> str:
    """Return the table of how the model was compressed, and how large it is."""
    base = record["base"] or {}
    library = next((key for key in ("transformers", "timm") if key in base), "not of transformers or timm")
    values = {"architecture": f"{_name_architecture(record)} ({library})"}
    parameters = record["parameters"]
    if rows:
        low = [row for row in rows if row["storage"] != "dense"]
        before, after = (sum(row[key] for row in rows) for key in ("dense_parameters", "parameters"))
        dense = parameters - after + before
        ranks = [row["rank"] for row in low]
        centred = ", inputs centred" if any(row.get("centre") for row in low) else ""
        values |= {
            "method": _join(row.get("method") for row in rows) + centred,
            "storage": _join(row["storage"] for row in low) or "dense",
            "targeted layers": f"{len(rows)}, of which {len(low)} have a low rank"
            + (f", {min(ranks)} to {max(ranks)}" if ranks else ""),
            "parameters of the targeted layers": _share(after, before),
            "parameters of the model": _share(parameters, dense),
            "targeted layers' share of the dense model": f"{before / dense:.1%}",
        }
    else:
        values["parameters of the model"] = f"{parameters:,}"
    if record.get("bytes"):
        values["bytes of all tensors"] = f"{record['bytes']:,}"
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {_inline(value)} |" for key, value in values.items())])


def _share(after: int, before: int) -> str:
    return f"{after:,} of {before:,} ({after / before:.1%})"


def _join(values: Any) -> str:
    return ", ".join(sorted({str(value) for value in values if value}))


def _show_loading(record: Mapping[str, Any]) -> str:
    base = record["base"] or {}
    dense = "" if base else ", architecture=dense"
    lines = [
        "```python",
        "from lowrank import load_compressed",
        "",
        f'model = load_compressed("{PLACE}"{dense})',
        "```",
    ]
    if not base:
        lines += ["", "`dense` is the dense model; its weights do not matter."]
    elif "transformers" in base:
        lines += ["", "After `import lowrank`, `from_pretrained` of transformers loads it too."]
    return "\n".join(lines)


def _list(values: Mapping[str, Any]) -> str:
    return "\n".join(f"- {_inline(key)}: {_inline(value)}" for key, value in values.items())


def _tabulate_quality(quality: Mapping[str, Any]) -> str:
    """Return a table with a row for each metric, and a column for each model that it was measured on."""
    rows = {name: value if isinstance(value, Mapping) else {"compressed": value} for name, value in quality.items()}
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    if not columns:
        return ""
    head = [f"| metric | {' | '.join(map(_inline, columns))} |", "|---|" + "---|" * len(columns)]
    cells = {name: [f"{row[key]:.6g}" if key in row else "" for key in columns] for name, row in rows.items()}
    return "\n".join([*head, *(f"| {_inline(name)} | {' | '.join(row)} |" for name, row in cells.items())])


def _cite(rows: list[Mapping[str, Any]]) -> str:
    methods = sorted({row["method"] for row in rows if row.get("method") in METHODS})
    papers = [f"- `{name}`: {found}" for name in methods if (found := _find_reference(METHODS[name]))]
    papers += [f"- `pivoted` storage: {PIFA}."] if any(row["storage"] == "pivoted" for row in rows) else []
    return "\n".join([f"The lowrank authors. {TITLE}. Version {__version__}.", *([""] if papers else []), *papers])


def _find_reference(method: Any) -> str:
    """Return the papers that the docstring of a method names; Python can be run without docstrings."""
    found = re.search(r"\*\*Reference\*\* (.*?)(?:\n\n|$)", inspect.getdoc(method) or "", re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def _inline(value: Any) -> str:
    """Return a value as a piece of one line of Markdown."""
    return " ".join(str(value).split()).replace("|", r"\|")
