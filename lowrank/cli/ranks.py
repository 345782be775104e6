"""Choose LoRA ranks from the change that a fine-tuning made to each weight.

The file has exact ranks by module; `RankConfig.load(file).lora_config(model)` makes the configuration for peft of it. Two
weights are in memory at a time.

Examples:

    lowrank ranks facebook/opt-125m tuned --out ranks.json
    lowrank ranks base tuned --out ranks.json --parameters 500000 --per type
"""

import argparse
from collections.abc import Mapping
from typing import Any

from lowrank.cli.files import add_file, check_file
from lowrank.cli.options import add_json, add_progress

RULE = ("threshold", "min_rank", "max_rank", "smoothing", "powers_of_two", "per", "parameters")  # fields of `RankRule`


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lowrank ranks`."""
    parser.add_argument("base", metavar="BASE", help="folder with safetensors, safetensors file or Hub name")
    parser.add_argument("tuned", metavar="TUNED", help="the same, after fine-tuning")
    add_file(parser, "ranks.json")
    parser.add_argument(
        "--layers", nargs="+", metavar="PATTERN", help="names or regular expressions; default: all in blocks"
    )
    rule = parser.add_argument_group("rule")
    rule.add_argument("--threshold", type=float, default=0.9, help="share of the change to keep; default %(default)s")
    rule.add_argument("--min-rank", type=int, default=4, help="default %(default)s")
    rule.add_argument("--max-rank", type=int, default=128, help="default %(default)s")
    rule.add_argument("--smoothing", type=float, default=0.8, help="towards the mean of the type; default %(default)s")
    rule.add_argument("--powers-of-two", action="store_true", help="round ranks above 16")
    rule.add_argument("--per", default="module", help="module or type: one rank for all of a type; default %(default)s")
    rule.add_argument("--parameters", type=int, help="spend this many adapter parameters instead of the threshold")
    add_json(parser)
    add_progress(parser)


def run(options: argparse.Namespace) -> int:
    """Write the file, print its ranks by type of layer, and return the exit status."""
    check_file(options.out)
    from lowrank.cli.output import format_table, print_result, show_progress  # noqa: PLC0415
    from lowrank.io.weights import hash_source  # noqa: PLC0415
    from lowrank.lora.deltas import delta_spectra  # noqa: PLC0415
    from lowrank.lora.rank_config import RankConfig  # noqa: PLC0415
    from lowrank.lora.rank_rule import RankRule  # noqa: PLC0415

    rule = RankRule(**{name: getattr(options, name) for name in RULE})  # a wrong number ends it before anything is read
    layers = {"layers": options.layers} if options.layers else {}
    spectra = delta_spectra(options.base, options.tuned, **layers, progress=show_progress(options))
    hashes = {side: hash_source(getattr(options, side)) for side in ("base", "tuned")}
    config = RankConfig.from_spectra(spectra, rule, model=options.base, hashes=hashes)
    config.save(options.out)
    summary = {
        "modules": len(config.module_ranks),
        "unchanged": sorted(set(spectra) - set(config.modules)),
        "parameters": config.parameters,
        "share_of_weights": config.compression_ratio,
        "file": str(options.out),
    }
    rows = _rows_by_type(config)
    text = (
        f"{format_table(rows)}\n\n{summary['modules']} modules, {config.parameters:,} parameters of adapters, "
        f"{config.compression_ratio:.2%} of the weights that changed; {len(summary['unchanged'])} weights did not change\n"
        f"wrote {options.out}"
    )
    print_result(options, {"types": rows} | summary, text)
    return 0


def _rows_by_type(config: Any) -> list[Mapping[str, Any]]:
    """Return one row per type of layer: its modules, their ranks, and how much of their change the ranks keep."""
    from lowrank.lora.ranks import layer_type  # noqa: PLC0415

    members: dict[str, list[str]] = {}
    for name in config.module_ranks:
        members.setdefault(layer_type(name), []).append(name)
    return [
        {
            "type": kind,
            "modules": len(names),
            "least rank": min(config.module_ranks[name] for name in names),
            "median rank": config.layer_ranks[kind],
            "largest rank": max(config.module_ranks[name] for name in names),
            "least energy": min(config.modules[name]["energy"] for name in names),
        }
        for kind, names in sorted(members.items())
    ]
