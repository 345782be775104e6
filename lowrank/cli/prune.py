"""Set the weights of lowest score in linear layers to zero, and write the model to a folder.

The share of each layer comes from a file of `lowrank score`, or is the same for all. Nothing is written before all is done. A
model of transformers is written as transformers does, so that anyone can load it.

Example:

    lowrank prune facebook/opt-125m --data Salesforce/wikitext:wikitext-2-v1 --sparsity 0.5 --out pruned
    lowrank prune facebook/opt-125m --data Salesforce/wikitext:wikitext-2-v1 --scores scores.json --out pruned
    lowrank prune facebook/opt-125m --method magnitude --pattern 2:4 --out pruned
"""

import argparse
from pathlib import Path
from typing import Any

from lowrank.cli.compress import save
from lowrank.cli.files import check_folder
from lowrank.cli.options import (
    add_data,
    add_json,
    add_model,
    add_progress,
    draw_batches,
    given,
    load_model,
    read_source,
)
from lowrank.io.checks import require


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lowrank prune`."""
    add_model(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new or empty folder for the result")
    parser.add_argument("--sparsity", type=float, help="share of the weights to prune, in [0, 1); with --scores in all")
    parser.add_argument("--scores", type=Path, metavar="FILE", help="of lowrank score: a share for each layer")
    parser.add_argument("--pattern", metavar="N:M", help="instead: N zeros among every M inputs, such as 2:4")
    parser.add_argument(
        "--method", default="wanda", help="wanda, or magnitude, which needs no data; default %(default)s"
    )
    parser.add_argument("--per", help="rank weights within each row or the whole matrix; default: row")
    parser.add_argument(
        "--include", nargs="+", metavar="NAME", help="layers, names or patterns; default: all in blocks"
    )
    add_data(parser, splits=("train", "validation"), samples="256")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of samples; default: 0")
    add_progress(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Prune the model, write it, print a table, and return the exit status."""
    check_folder(options.out)
    require(
        options.data is not None or options.method == "magnitude", "data", "be given for this method", options.method
    )
    chosen = read_choices(options)
    from lowrank.cli.output import format_table, print_result  # noqa: PLC0415
    from lowrank.compression.pruning import NEEDS_STATISTICS, prune  # noqa: PLC0415

    named = load_model(options)
    if options.scores is not None:
        chosen["ratios"] = _read_ratios(options, named.model)
        chosen["layers"] = list(chosen["ratios"])
    if options.method in NEEDS_STATISTICS:
        chosen["statistics"] = _collect(options, named, chosen)
    rows = prune(named.model, method=options.method, **chosen)
    _save(named, options.out)
    weights, pruned = (sum(row[key] for row in rows) for key in ("weights", "pruned"))
    share = sum(row["share_of_model"] for row in rows)
    content = {"model": options.model, "out": str(options.out), "weights": weights, "pruned": pruned, "layers": rows}
    columns = ("layer", "weights", "pruned", "sparsity")
    table = format_table([{key: row[key] for key in columns} for row in rows])
    text = (
        f"{pruned:,} of {weights:,} weights are zero ({pruned / weights:.1%}); the layers are {share:.1%} of the model"
    )
    print_result(options, content, f"{table}\n\n{text}\nwrote {options.out}")
    return 0


def read_choices(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `prune` that the options give, but for shares from a file of scores.

    **Arguments**

    - `options`: the options of the command.

    **Raises**

    - `ValueError`: none of `--sparsity`, `--scores` and `--pattern`, or two that exclude each other; no pattern.
    """
    ways = given(options, "sparsity", "scores", "pattern")
    single = len(ways) == 1 or set(ways) == {"sparsity", "scores"}
    require(single, "sparsity", "be given, or --scores, with or without it, or --pattern alone", sorted(ways))
    barred = options.scores is not None and options.include is not None
    require(not barred, "include", "be left out with --scores, which names the layers", options.include)
    chosen = given(options, "per")
    if options.include is not None:
        chosen["layers"] = options.include
    if options.pattern is not None:
        parts = options.pattern.split(":")
        require(len(parts) == 2 and all(map(str.isdecimal, parts)), "pattern", "be N:M, such as 2:4", options.pattern)
        return chosen | {"pattern": (int(parts[0]), int(parts[1]))}
    return chosen if options.scores is not None else chosen | {"ratios": options.sparsity}


def _read_ratios(options: argparse.Namespace, model: Any) -> dict[str, float]:
    """Return the shares of a file of scores, which must be those of this model."""
    from lowrank.selection.scores import Scores  # noqa: PLC0415

    scores = Scores.load(options.scores, model)
    return scores.ratios if options.sparsity is None else scores.ratios_at(options.sparsity)


def _collect(options: argparse.Namespace, named: Any, chosen: dict[str, Any]) -> Any:
    from lowrank.calibration.collect import collect_statistics  # noqa: PLC0415
    from lowrank.nn.targets import BLOCKS  # noqa: PLC0415

    batches = draw_batches(options, named, read_source(options))
    return collect_statistics(named.model, batches, chosen.get("layers", BLOCKS))


def _save(named: Any, folder: Path) -> None:
    """Write a dense model as its library does, any other as a compressed one, whole or not at all."""
    from lowrank.compression.stored_state import RECORD  # noqa: PLC0415
    from lowrank.io.files import writing  # noqa: PLC0415

    with writing(folder) as partial:
        if hasattr(named.model, "save_pretrained") and not hasattr(named.model, RECORD):
            named.model.save_pretrained(partial)
            if hasattr(named.processor, "save_pretrained"):
                named.processor.save_pretrained(partial)
        else:
            save(named, partial)
