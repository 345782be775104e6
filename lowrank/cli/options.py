"""Options that several commands share. Defaults are those of the functions that read them: what is not given is not passed."""

import argparse
from typing import Any


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`: print the result as JSON, and nothing else, on stdout."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_progress(parser: argparse.ArgumentParser) -> None:
    """Add `--no-progress`, which `lowrank.cli.output.show_progress` reads."""
    parser.add_argument("--no-progress", action="store_true", help="show no bars; without a terminal there are none")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the model and how it is loaded, which `load_model` reads."""
    parser.add_argument("model", metavar="MODEL", help="name on the Hub, folder, or timm:NAME")
    group = parser.add_argument_group("how the model is loaded")
    group.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    group.add_argument("--processor", metavar="NAME", help="tokenizer or image processor from elsewhere than MODEL")
    group.add_argument("--dtype", help="float32, bfloat16, ...; default: as the weights are stored")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: the GPU if there is one")


def load_model(options: argparse.Namespace) -> Any:
    """Return the `NamedModel` that the options of `add_model` name.

    **Arguments**

    - `options`: the options of a command.
    """
    from lowrank.tasks.named_model import load_named  # noqa: PLC0415

    return load_named(options.model, **given(options, "revision", "processor", "dtype", "device"))


def add_data(parser: argparse.ArgumentParser, splits: tuple[str, ...], samples: str) -> None:
    """Add the data and which part of it is read, which `read_source` and `given` read.

    **Arguments**

    - `parser`: of the command.
    - `splits`: the split to read if none is named: the first that the data set has.
    - `samples`: which samples are read by default, for the help.
    """
    parser.set_defaults(usual_splits=splits)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        metavar="NAME[:CONFIG]",
        help="data set of the Hub, folder, or file: .txt, .json, .jsonl, .csv, .parquet; texts, chats or images",
    )
    group.add_argument("--split", help=f"such as train[:1000]; default: {', else '.join(splits)}, or the only one")
    group.add_argument(
        "--column", nargs="+", metavar="NAME", help="column to read, two for pairs; default: found by name"
    )
    group.add_argument("--data-revision", metavar="REVISION", help="branch, tag or commit of the data set on the Hub")
    group.add_argument("--samples", type=int, help=f"how many samples; default: {samples}")
    group.add_argument(
        "--length", type=int, help="tokens per sample; default: 512, or what the model takes if it is less"
    )
    group.add_argument("--batch-size", type=int, help="samples per batch; default: 8")


def read_source(options: argparse.Namespace) -> Any:
    """Return the `DataSource` that the options of `add_data` name.

    **Arguments**

    - `options`: the options of a command, with `data`.
    """
    from lowrank.tasks.named_data import DataSource  # noqa: PLC0415

    return DataSource(
        options.data,
        split=options.split or options.usual_splits,
        columns=tuple(options.column or ()),
        label=getattr(options, "label", None),
        revision=options.data_revision,
    )


def draw_batches(options: argparse.Namespace, named: Any, source: Any) -> list[Any]:
    """Draw calibration batches for a model.

    **Arguments**

    - `options`: the options of a command, with those of `add_data` and `seed`.
    - `named`: the `NamedModel`.
    - `source`: the `DataSource`.
    """
    from lowrank.tasks.calibration_data import calibration_batches  # noqa: PLC0415

    return calibration_batches(named, source, **given(options, "samples", "length", "batch_size", "seed"))


def given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the options that the user has given, name -> value; a flag counts as given if it is set.

    **Arguments**

    - `options`: the options of a command.
    - `names`: which of them.
    """
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None and value is not False}
