"""Score every layer of a model by the spectrum of its weight.

Heavy-tailed spectra mark layers to leave alone. The file is read by `lowrank assign` and `lowrank prune`. One weight is in memory
at a time, so that models may be larger than the memory.

Example:

    lowrank score facebook/opt-125m --out scores.json
    lowrank score model.safetensors --out scores.json --metric stable_rank --prunable smaller --mapping layer_wise
"""

import argparse
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from lowrank.cli.files import add_file, check_file
from lowrank.cli.options import add_json, add_progress

CONFIG = ("window", "smallest", "prunable", "mapping", "sparsity", "epsilon", "missing")  # fields of `ScoringConfig`


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lowrank score`."""
    parser.add_argument("model", metavar="MODEL", help="folder with safetensors, safetensors file or Hub name")
    add_file(parser, "scores.json")
    parser.add_argument(
        "--metric", default="alpha_peak", help="of the spectrum; a wrong one lists all; default %(default)s"
    )
    parser.add_argument(
        "--layers", nargs="+", metavar="PATTERN", help="names or regular expressions; default: all in blocks"
    )
    parser.add_argument("--device", help="where weights are decomposed, such as cuda; default: the CPU")
    rule = parser.add_argument_group("from the metric to the score, 1 - share to prune")
    rule.add_argument("--sparsity", type=float, default=0.7, help="share of all weights to prune; default %(default)s")
    rule.add_argument("--epsilon", type=float, default=0.3, help="spread of the shares; default %(default)s")
    rule.add_argument("--mapping", default="block_wise", help="block_wise or layer_wise; default %(default)s")
    rule.add_argument("--prunable", help="prune more where the metric is larger or smaller; default: larger exponents")
    rule.add_argument(
        "--window", default="published", help="of alpha_peak: published or corrected; default %(default)s"
    )
    rule.add_argument("--smallest", type=float, default=0.0, help="fits keep larger eigenvalues; default %(default)s")
    rule.add_argument("--missing", default="error", help="error, or median for layers without it; default %(default)s")
    add_json(parser)
    add_progress(parser)


def run(options: argparse.Namespace) -> int:
    """Write the file, print the scores by block, and return the exit status."""
    check_file(options.out)
    from lowrank.cli.output import format_table, print_result, show_progress  # noqa: PLC0415
    from lowrank.selection.scoring import ScoringConfig, layer_scores  # noqa: PLC0415

    config = ScoringConfig(**{name: getattr(options, name) for name in CONFIG})
    layers = {"layers": options.layers} if options.layers else {}
    where = {"device": options.device, "progress": show_progress(options)}
    scores = layer_scores(options.model, options.metric, config, **layers, **where)
    scores.save(options.out)
    rows = _rows_by_block(scores.layers, options.metric)
    summary = {
        "layers": len(scores.layers),
        "parameters": sum(scores.costs),
        "share_of_model": scores.settings["share_of_model"],
        "left_out": scores.settings["left_out"],
        "file": str(options.out),
    }
    text = (
        f"{format_table(rows)}\n\n{summary['layers']} layers, {summary['parameters']:,} parameters, "
        f"{summary['share_of_model']:.1%} of the model\nwrote {options.out}"
    )
    print_result(options, {"blocks": rows} | summary, text)
    return 0


def _rows_by_block(layers: Sequence[Mapping[str, Any]], metric: str) -> list[dict[str, Any]]:
    blocks: dict[str, list[Mapping[str, Any]]] = {}
    for row in layers:
        blocks.setdefault(row["block"], []).append(row)
    return [
        {
            "block": block,
            "layers": len(rows),
            "parameters": sum(row["num_parameters"] for row in rows),
            metric: mean(found) if (found := [r["raw_metric"] for r in rows if r["raw_metric"] is not None]) else None,
            "score": mean(row["significance_score"] for row in rows),
        }
        for block, rows in blocks.items()
    ]
