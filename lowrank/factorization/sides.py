"""Which moments a method needs of a layer, on the side of the weight that they are collected on.

A method that reads G of the inputs gets the same factors from K = W G W^T of the outputs; one that reads F of the output
gradients gets them from M = W^T F W of the gradients sent back. Of each pair the smaller matrix is enough.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor

from lowrank.factorization.methods import METHODS, READS
from lowrank.factorization.moments import MOMENTS, LayerStatistics, read_moment
from lowrank.io.checks import require

SIDES = ("inputs", "outputs", "smaller")
OUTPUTS = ("output_gram", "output_mean", "input_square", "input_sketch")  # in place of G
OTHER_SIDE = {"gram": "output_gram", "gradient_gram": "input_gradient_gram"}
PULLBACK = ("input_gradient_gram", "gradient_square", "gradient_sketch")  # in place of F


def reads_of(methods: Iterable[str] | None) -> tuple[str, ...]:
    """Return the fields of full statistics that some methods read.

    **Arguments**

    - `methods`: keys of `METHODS`; None for all fields, as for a method that `READS` does not know.

    **Returns** names of fields of `LayerStatistics`.
    """
    names = list(READS if methods is None else methods)
    every = dict.fromkeys(field for fields in READS.values() for field in fields)
    return tuple(dict.fromkeys(field for name in names for field in READS.get(name, every)))


def fields_for(shape: Sequence[int], side: str, reads: Iterable[str], gradients: bool) -> tuple[str, ...]:
    """Return the fields to collect for a layer.

    **Arguments**

    - `shape`: (out, in) of its weight.
    - `side`: 'inputs' for G and F, 'outputs' for K and F, 'smaller' for K or G and for F or M, by the shape.
    - `reads`: fields of full statistics that are needed, see `reads_of`.
    - `gradients`: whether a loss gives gradients.

    **Returns** names of fields of `LayerStatistics`, the mean always among them.

    **Raises**

    - `ValueError`: an unknown side.
    """
    require(side in SIDES, "side", f"be one of {list(SIDES)}", side)
    out, inputs = shape
    fields = {"mean"}
    for field in reads:
        if field == "gram" and (side == "outputs" or (side == "smaller" and out < inputs)):
            fields |= {*OUTPUTS}
        elif field == "gram" and side == "smaller":
            fields |= {"gram", "input_square", "input_sketch"}  # layers that share an input collect the same of it
        elif field == "gradient_gram" and side == "smaller" and out > inputs:
            fields |= {*PULLBACK}
        else:
            fields.add(field)
    return tuple(name for name in MOMENTS if name in fields and (gradients or not needs_loss(name)))


def check_reads(statistics: LayerStatistics | None, method: str, weight: Tensor) -> None:
    """Check that statistics hold what a method reads of a layer, without computing with it.

    **Arguments**

    - `statistics`: of the layer, or None.
    - `method`: a key of `METHODS`; one that `READS` does not know is called.
    - `weight`: the weight of the layer, `(out, in)`.

    **Raises**

    - `ValueError`: a field that is missing, of another size or not finite; no tokens.
    """
    if method not in READS:
        METHODS[method](statistics, weight)
    for field in READS.get(method, ()):
        other = OTHER_SIDE.get(field, field)
        read_moment(statistics, field if getattr(statistics, other, None) is None else other, weight)


def needs_loss(field: str) -> bool:
    """Return True if a field is a moment of gradients.

    **Arguments**

    - `field`: a field of `LayerStatistics`.
    """
    return MOMENTS[field]["of"] in ("gradient", "pullback")
