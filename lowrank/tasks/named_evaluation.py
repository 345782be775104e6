"""Judge any model by name on any data set: perplexity of a language model, metrics of a classifier or a regression."""

from typing import Any

from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require
from lowrank.nn.batches import Batch, count_samples
from lowrank.tasks.calibration_data import choose_length, labelled_batches, read_text
from lowrank.tasks.evaluation import evaluate, perplexity
from lowrank.tasks.named_data import DataSource
from lowrank.tasks.named_model import NamedModel

METRICS_OF = {"classification": ("accuracy",), "regression": ("pearson", "spearman")}
WINDOW = 2048  # tokens, as in the published tables


@check_arguments
def evaluate_named(
    named: NamedModel,
    source: DataSource,
    samples: int | None = None,
    *,
    length: int | None = None,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """Measure a model on a data set.

    The perplexity of a causal language model is that of all rows as one text, cut into windows, see
    `lowrank.tasks.evaluation.perplexity`. Other models need a column of labels.

    **Arguments**

    - `named`: from `load_named`.
    - `source`: the rows.
    - `samples`: how many of the first windows or rows; default None, all.
    - `length`: tokens per window or row; default 2048 for a language model and 512 otherwise, or what the model takes if that
      is less.
    - `batch_size`: rows per batch. Default 8.

    **Returns** rows with `model`, `task`, `metric`, `value` and `samples`.

    **Raises**

    - `FileNotFoundError`, `ValueError`: as for `labelled_batches`; a model without a head; `samples` below 1.
    - `FloatingPointError`: outputs that are not finite.
    """
    rule = "have a head to be judged: a causal language model, a classifier or a regression"
    require(named.objective is not None, "model", rule, type(named.model).__name__)
    require(samples is None or samples >= 1, "samples", "be >= 1", samples)
    if named.objective == "language_modelling":
        tokens = read_text(named, source)
        window = (
            choose_length(named, length, WINDOW) if length else min(choose_length(named, None, WINDOW), len(tokens))
        )
        tokens = tokens if samples is None else tokens[: samples * window]
        values, count = {"perplexity": perplexity(named.model, tokens, window)}, len(tokens) // window
    else:
        counts: list[int] = []

        def counted(batch: Batch) -> Batch:
            counts.append(count_samples(batch))
            return batch

        batches = labelled_batches(named, source, samples, length=length, batch_size=batch_size)
        objective = str(named.objective)
        values = evaluate(named.model, map(counted, batches), objective, METRICS_OF[objective])
        count = sum(counts)
    return [
        {"model": named.name, "task": str(source), "metric": metric, "value": value, "samples": count}
        for metric, value in values.items()
    ]
