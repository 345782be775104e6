"""Compress a model, and write it to a folder.

The best combination that needs no training is the default. A model with a head weighs its outputs by what they predict,
a bare encoder by its hidden states; neither needs labels. Nothing is written before all is done.

Example:

    lowrank compress sentence-transformers/all-MiniLM-L6-v2 --data SetFit/sst2 --keep 0.6 --out small
    lowrank compress meta-llama/Llama-3.2-1B --data Salesforce/wikitext:wikitext-2-v1 --keep 0.8 --out small-llama
    lowrank compress meta-llama/Llama-3.2-1B-Instruct --data chats.jsonl --keep 0.8 --resume blocks --out small-chat
    lowrank compress timm:vit_base_patch16_224 --data uoft-cs/cifar10 --keep 0.5 --exclude '.*attn.*' --out small-vit
"""

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
from lowrank.cli.output import print_result, show_progress
from lowrank.io.checks import require
from lowrank.io.files import writing


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lowrank compress`."""
    add_model(parser)
    parser.add_argument("--keep", type=float, required=True, help="share of the layers' parameters to keep, in (0, 1]")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new or empty folder for the result")
    add_data(parser, splits=("train", "validation"), samples="256")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of samples; default: 0")
    group = parser.add_argument_group("how it is compressed; the defaults are the best combination that the data allow")
    group.add_argument("--method", help="two_sided, whitened, asvd, fwsvd, or svd, which needs no data")
    group.add_argument("--storage", help="pivoted or factors")
    group.add_argument(
        "--allocation", help="of ranks: spectrum, uniform, relative, first_dense, linear, depth or measured"
    )
    group.add_argument("--multiple", type=int, help="every rank is a multiple of this; default: 1")
    group.add_argument(
        "--include", nargs="+", metavar="NAME", help="layers, names or patterns; default: all inside blocks"
    )
    group.add_argument(
        "--exclude", nargs="+", metavar="NAME", default=[], help="layers to leave out, names or patterns"
    )
    group.add_argument("--retarget", action="store_true", help="let each layer repair what those in front have changed")
    group.add_argument(
        "--resume", type=Path, metavar="FOLDER", help="retarget, and keep finished blocks there to go on after a stop"
    )
    add_progress(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Compress the model, write it, print a table, and return the exit status."""
    check_folder(options.out)
    require(0 < options.keep <= 1, "keep", "be in (0, 1]", options.keep)
    require(options.data is not None or options.method == "svd", "data", "be given, unless the method is svd", None)
    choices = read_choices(options)
    with writing(options.out) as partial:  # at once: a folder that cannot be written is an error before the work
        partial.mkdir()
        named = load_model(options)
        source = None if options.data is None else read_source(options)
        batches = None if source is None else draw_batches(options, named, source)
        calibration = _describe_calibration(options, source, batches or [])
        result, seconds = _compress(named, batches, options, choices)
        save(named, partial, {"calibration": calibration} if calibration else True)
    content = {
        "model": options.model,
        "revision": options.revision,
        "out": str(options.out),
        "calibration": calibration,
        "seconds": round(seconds, 1),
        "configuration": asdict(result.configuration),
        "before": asdict(result.before),
        "after": asdict(result.after),
        "keep": {"targeted": result.keep_targeted, "model": result.keep_model, "bytes": result.keep_bytes},
        "layers": result.layers,
        "left_out": result.left_out,
    }
    print_result(options, content, f"{result}\n{_describe_run(content, named)}")
    return 0


def _compress(named: Any, batches: Any, options: argparse.Namespace, choices: dict[str, Any]) -> tuple[Any, float]:
    """Return the result of `compress`, and how many seconds it took."""
    from lowrank.compression.compress import compress  # noqa: PLC0415
    from lowrank.nn.surgery import unify_linears  # noqa: PLC0415

    unify_linears(named.model)  # GPT-2 has Conv1D for linear layers
    start = time.monotonic()
    result = compress(named.model, batches, options.keep, progress=show_progress(options), **choices)
    return result, time.monotonic() - start


def read_choices(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `compress` that the options give.

    **Arguments**

    - `options`: the options of the command.
    """
    from lowrank.compression.configuration import Configuration, Retargeting  # noqa: PLC0415
    from lowrank.nn.targets import BLOCKS  # noqa: PLC0415

    choices = given(options, "method", "storage", "allocation", "multiple", "retarget")
    if options.resume is not None:
        choices["retarget"] = Retargeting(folder=options.resume)
    Configuration(**choices)  # an unknown name is an error before the model is run
    if options.include or options.exclude:
        barred = f"(?!(?:{'|'.join(options.exclude)})$)" if options.exclude else ""
        choices["layers"] = [f"{barred}(?:{name})" if barred else name for name in options.include or BLOCKS]
    return choices


def _describe_calibration(options: argparse.Namespace, source: Any, batches: list[Any]) -> dict[str, Any]:
    """Return which data the statistics were collected on, JSON; empty without data."""
    from lowrank.nn.batches import count_samples  # noqa: PLC0415

    if source is None:
        return {}
    known = {"data": source.name, "split": str(source.rows.split), "revision": source.revision, "seed": options.seed}
    counted = {"samples": sum(map(count_samples, batches))}
    return {key: value for key, value in (known | counted).items() if value is not None}


def save(named: Any, folder: Path, card: Any = True) -> None:
    """Write a compressed model and its tokenizer or image processor to a folder.

    **Arguments**

    - `named`: the `NamedModel`.
    - `folder`: a new or empty folder.
    - `card`: what the model card says beside the record, see `save_compressed`.
    """
    from lowrank.compression.checkpoint import save_compressed  # noqa: PLC0415

    processor = named.processor if hasattr(named.processor, "save_pretrained") else None
    save_compressed(named.model, folder, processor=processor, card=card)


def _describe_run(content: dict[str, Any], named: Any) -> str:
    data = content["calibration"]
    read = f"{data['samples']} samples of {data['data']} ({data['split']})" if data else "no data"
    targets = "predictions" if named.objective else "hidden states"
    weighed = f", outputs weighed by {targets}" if content["configuration"]["method"] == "two_sided" else ""
    return f"calibrated on {read}{weighed}\n{content['seconds']} s, written to {content['out']}"
