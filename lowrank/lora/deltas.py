"""Spectra of the changes W_tuned - W_base that fine-tuning makes, from two checkpoints that are read one weight at a time."""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lowrank.factorization.gram import gram_triangle, slabs, squared_singular_values
from lowrank.factorization.moments import all_finite
from lowrank.factorization.precision import with_float64
from lowrank.factorization.spectra import effective_rank, rank_for_energy, retained_energy
from lowrank.io.arguments import check_arguments
from lowrank.io.weights import (
    LeftOutWarning,
    OpenWeights,
    Source,
    check_weight,
    match_modules,
    match_stacks,
    open_weights,
)
from lowrank.lora.noise import noise_edge
from lowrank.nn.targets import BLOCKS


@dataclass(frozen=True, eq=False)
class DeltaSpectrum:
    """Hold the spectrum of the change Delta of one weight.

    **Arguments**

    - `shape`: (out, in), kernels flattened to (out, in * kh * kw).
    - `sigma`: singular values of Delta, `(k,)`, descending, float64.
    - `total`: ||Delta||_F^2, exact.
    - `weight_norm`: ||W_base||_F.
    """

    shape: tuple[int, int]
    sigma: Float[Tensor, " k"]
    total: float
    weight_norm: float

    @property
    def status(self) -> str:
        """Return 'zero' if nothing changed, 'noise' if no singular value exceeds the noise edge, else 'signal'."""
        if self.total == 0:
            return "zero"
        return "signal" if self.signal_rank else "noise"

    @property
    def signal_rank(self) -> int:
        """Count the singular values that exceed the noise edge; their median gives the scale of the noise.

        If the median is zero, as of a change of low rank or of few rows, every value that is more than rounding counts.

        **Reference** Gavish and Donoho, The optimal hard threshold for singular values is 4/sqrt(3), 2014, for the scale;
        `lowrank.lora.noise` for the edge.
        """
        squares = self.sigma.double().square()
        rounding = torch.finfo(torch.float64).eps * max(self.shape) * squares.max()  # of the Gram matrix
        return int((squares > torch.maximum(noise_edge(self.shape) * squares.median(), rounding)).sum())

    def energy(self, rank: int) -> float:
        """Return the share of ||Delta||_F^2 in the largest singular values.

        **Arguments**

        - `rank`: number of singular values, >= 0.

        **Returns** a share in [0, 1]; 1 if Delta is zero.
        """
        return float(retained_energy(self.sigma, min(rank, len(self.sigma)))) if self.total else 1.0

    @property
    def row(self) -> dict[str, Any]:
        """Return sizes, norms, ranks and status, as a row of a table."""
        ranks = {f"rank_{int(100 * share)}": rank_for_energy(self.sigma, share) for share in (0.5, 0.9, 0.99)}
        size = {"out": self.shape[0], "in": self.shape[1], "norm": self.total**0.5, "weight_norm": self.weight_norm}
        rank = float(effective_rank(self.sigma))
        return size | ranks | {"effective_rank": rank, "signal_rank": self.signal_rank, "status": self.status}


@check_arguments
def delta_spectra(
    base: Source, tuned: Source, layers: Iterable[str] = BLOCKS, *, progress: bool = True
) -> dict[str, DeltaSpectrum]:
    """Compute the spectra of the changes of all weights that two checkpoints share.

    sigma^2 are the eigenvalues of the float64 Gram matrix on the short side. Memory: one weight of each checkpoint, and twice
    8 min(out, in)^2 bytes. A pair of 7B models needs about 1 GB.

    **Arguments**

    - `base`, `tuned`: each a folder with `model.safetensors` or its shards, a safetensors file, a Hub name, or a model in memory;
      any dtype.
    - `layers`: names or regular expressions of modules with a weight of two or more dimensions; by default those inside numbered
      blocks.
    - `progress`: show a progress bar.

    **Returns** module -> `DeltaSpectrum`, sorted by name.

    **Raises**

    - `FileNotFoundError`: no such checkpoint, or a missing shard.
    - `ValueError`: the architectures differ; a weight has another shape, is of packed bytes or not finite, by name; no weight
      in common.

    **Warns**

    - `LeftOutWarning`: weights that only one checkpoint has, and stacks of matrices, such as the experts of a mixture.
    """
    with _open_pair(base, tuned, layers) as (names, read):
        spectra = {}
        for name in tqdm(names, "spectra", unit="matrix", disable=not progress):
            spectra[name] = _compute_spectrum(*read(name), name)
        return spectra


def delta_factors(
    base: Source, tuned: Source, ranks: Mapping[str, int], *, progress: bool = True
) -> dict[str, tuple[Tensor, Tensor]]:
    """Factorise the changes for a warm start: Delta ~ B A with B = U sqrt(S) and A = sqrt(S) V^T.

    **Arguments**

    - `base`, `tuned`: as in `delta_spectra`.
    - `ranks`: module -> rank; modules of rank 0 are left out.
    - `progress`: show a progress bar.

    **Returns** module -> (B `(out, r)`, A `(r, in)`), float32.

    **Raises**

    - `FileNotFoundError`, `ValueError`: as `delta_spectra`; a module that is not in both checkpoints.
    """
    positive = {name: rank for name, rank in ranks.items() if rank > 0}
    with _open_pair(base, tuned, [re.escape(name) for name in positive]) as (names, read):
        if missing := sorted(positive.keys() - set(names)):
            raise ValueError(f"`ranks` must name weights of both checkpoints, got {missing[0]!r}.")
        factors = {}
        for name in tqdm(names, "factors", unit="matrix", disable=not progress):
            before, after = (with_float64(side.detach()) for side in read(name))
            check_weight(before, name, "base")
            check_weight(after, name, "tuned")
            u, sigma, vh = torch.linalg.svd((after.double() - before.double()).flatten(1), full_matrices=False)
            root, rank = sigma.sqrt(), positive[name]
            factors[name] = ((u * root)[:, :rank].float(), (root[:, None] * vh)[:rank].float())
        return factors


def _compute_spectrum(before: Tensor, after: Tensor, name: str) -> DeltaSpectrum:
    before, after = (with_float64(side.detach()).flatten(1) for side in (before, after))
    for argument, tensor in (("base", before), ("tuned", after)):
        check_weight(tensor, name, argument)
        if not all_finite(tensor):
            raise ValueError(f"`{argument}` must have finite weights, got NaN or infinity in {name!r}.")
    pairs = zip(slabs(before), slabs(after), strict=True)
    values = squared_singular_values(gram_triangle(b.double() - a.double() for a, b in pairs)).flip(0)
    weight = sum(float(piece.double().square().sum()) for piece in slabs(before)) ** 0.5
    return DeltaSpectrum((before.shape[0], before.shape[1]), values.sqrt().cpu(), float(values.sum()), weight)


@contextmanager
def _open_pair(
    base: Source, tuned: Source, layers: Iterable[str]
) -> Iterator[tuple[list[str], Callable[[str], tuple[Tensor, Tensor]]]]:
    """Yield the names of the modules that both checkpoints have, and a function that reads the two weights of one."""
    with ExitStack() as stack:
        one = stack.enter_context(open_weights(base, "base"))
        two = stack.enter_context(open_weights(tuned, "tuned"))
        entries = list(layers)
        first, second = (match_modules(weights.shapes, entries) for weights in (one, two))
        names = sorted(first & second)
        _check_pair(one, two, names)
        shapes = {name: s for name, s in (one.shapes | two.shapes).items() if name.removesuffix(".weight") not in names}
        _warn_of_others(sorted(first ^ second), match_stacks(shapes, entries))
        yield names, lambda name: (one.read(f"{name}.weight"), two.read(f"{name}.weight"))


def _warn_of_others(single: list[str], stacks: Mapping[str, tuple[int, ...]]) -> None:
    """Warn of weights that have no partner in the other checkpoint, or no matrix of their own."""
    left_out = [f"{name!r}, which only one of them has" for name in single[:1]]
    left_out += [f"{name!r}, a stack of matrices {shape}" for name, shape in list(stacks.items())[:1]]
    if left_out:
        text = f"`base` and `tuned` have {len(single) + len(stacks)} weights that are left out, such as {', '.join(left_out)}."
        warnings.warn(text, LeftOutWarning, stacklevel=4)


def _check_pair(base: OpenWeights, tuned: OpenWeights, names: list[str]) -> None:
    if None not in (base.architecture, tuned.architecture) and base.architecture != tuned.architecture:
        raise ValueError(
            f"`tuned` must have the architecture of `base`, {base.architecture}, got {tuned.architecture}."
        )
    if not names:
        raise ValueError(
            f"`base` and `tuned` must have weights in common that `layers` names, got none of {len(base.shapes)} and "
            f"{len(tuned.shapes)} tensors."
        )
    for name in names:
        shape, other = base.shapes[f"{name}.weight"], tuned.shapes[f"{name}.weight"]
        if shape != other:
            raise ValueError(f"`tuned` must have the shapes of `base`: {name!r} has {other}, `base` {shape}.")
