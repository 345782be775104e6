"""What fine-tuning changed: the spectra of W_tuned - W_base, from two checkpoints that are read one tensor at a time."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lowrank.factorization.gram import gram_matrix, slabs, squared_singular_values
from lowrank.factorization.moments import all_finite
from lowrank.factorization.spectra import effective_rank, rank_for_energy, retained_energy
from lowrank.io.weights import Source, named, opened
from lowrank.nn.targets import BLOCKS


@dataclass(frozen=True, eq=False)
class DeltaSpectrum:
    """The change of one weight.

    `shape`: (out, in), kernels flattened to (out, in * kh * kw). `sigma`: its singular values, `(k,)`, descending, float64.
    `total`: ||Delta||_F^2, exact. `weight_norm`: ||W_base||_F. `status`: 'zero' where nothing changed; 'noise' where no value
    stands out of what a matrix of independent entries would have; else 'signal'.
    """

    shape: tuple[int, int]
    sigma: Float[Tensor, " k"]
    total: float
    weight_norm: float

    @property
    def status(self) -> str:
        if self.total == 0:
            return "zero"
        return "signal" if self.signal_rank else "noise"

    @property
    def signal_rank(self) -> int:
        """How many singular values exceed the edge of the noise; the scale of the noise is read off their median.

        **Reference:** Gavish and Donoho, The optimal hard threshold for singular values is 4/sqrt(3), 2014, for the scale;
        Marchenko and Pastur for the edge, which is moved out by the width of its fluctuations.
        """
        return int((self.sigma.square() > noise_edge(self.shape) * self.sigma.square().median()).sum())

    def energy(self, rank: int) -> float:
        """The share of ||Delta||_F^2 in the `rank` largest values."""
        return float(retained_energy(self.sigma, min(rank, len(self.sigma)))) if self.total else 1.0

    @property
    def row(self) -> dict[str, Any]:
        """For a table: sizes and single figures."""
        ranks = {f"rank_{int(100 * share)}": rank_for_energy(self.sigma, share) for share in (0.5, 0.9, 0.99)}
        size = {"out": self.shape[0], "in": self.shape[1], "norm": self.total**0.5, "weight_norm": self.weight_norm}
        rank = float(effective_rank(self.sigma))
        return size | ranks | {"effective_rank": rank, "signal_rank": self.signal_rank, "status": self.status}


def noise_edge(shape: tuple[int, int]) -> float:
    """The largest sigma^2 that noise of independent entries has, over the median of its sigma^2: a matrix of this shape exceeds
    it about once in a thousand times."""
    short, long = sorted(shape)
    ratio = short / long
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    x = np.linspace(low, high, 20001)[1:-1]
    density = np.sqrt((high - x) * (x - low)) / x  # Marchenko and Pastur, up to a factor
    median = np.interp(0.5, np.cumsum(density) / density.sum(), x)
    # Tracy and Widom: the largest value fluctuates about the edge on the scale (1 + sqrt(ratio))^(4/3) ratio^(-1/6) / long^(2/3)
    width = (1 + ratio**0.5) ** (4 / 3) * ratio ** (-1 / 6) / long ** (2 / 3)
    return float((high + 4.0 * width) / median)


def delta_spectra(
    base: Source, tuned: Source, layers: Iterable[str] = BLOCKS, *, progress: bool = True
) -> dict[str, DeltaSpectrum]:
    """Spectra of the changes of all weights that two checkpoints share.

    One matrix of each is in memory at a time: sigma^2 are the eigenvalues of the float64 Gram matrix on the short side, summed
    over slabs of rows; memory: the two tensors, 8 min(out, in)^2 bytes twice, a slab. So a pair of 7B models needs about 1 GB.

    **Arguments:** `base`, `tuned`: a folder with `model.safetensors` or its shards, a single such file, a Hub name, or a model in
    memory; any dtype. `layers`: names or patterns of modules whose weights of two or more dimensions are meant; by default those
    inside numbered blocks. `progress`: a bar.

    **Returns:** module name -> `DeltaSpectrum`, in the order of names.

    **Raises:** `FileNotFoundError`: no such checkpoint, or a shard that its index names. `ValueError`: another architecture, a
    weight whose shape changed or that is not finite, by name; no weight in common.
    """
    with pair_of(base, tuned, layers) as (names, read):
        spectra = {}
        for name in tqdm(names, "spectra", unit="matrix", disable=not progress):
            spectra[name] = _spectrum(*read(name), name)
        return spectra


def delta_factors(
    base: Source, tuned: Source, ranks: Mapping[str, int], *, progress: bool = True
) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors of the changes, for a warm start: Delta ~ B A, B = U sqrt(S) `(out, r)`, A = sqrt(S) V^T `(r, in)`, float32.

    **Arguments:** as `delta_spectra`; `ranks`: module name -> rank; ranks of 0 are left out.

    **Raises:** as `delta_spectra`; a name that is not in both checkpoints.
    """
    wanted = {name: rank for name, rank in ranks.items() if rank > 0}
    with pair_of(base, tuned, [re.escape(name) for name in wanted]) as (names, read):
        if missing := sorted(wanted.keys() - set(names)):
            raise ValueError(f"`ranks` must name weights of both checkpoints, got {missing[0]!r}.")
        factors = {}
        for name in tqdm(names, "factors", unit="matrix", disable=not progress):
            before, after = read(name)
            u, sigma, vh = torch.linalg.svd((after.double() - before.double()).flatten(1), full_matrices=False)
            root, rank = sigma.sqrt(), wanted[name]
            factors[name] = ((u * root)[:, :rank].float(), (root[:, None] * vh)[:rank].float())
        return factors


def _spectrum(before: Tensor, after: Tensor, name: str) -> DeltaSpectrum:
    before, after = before.detach().flatten(1), after.detach().flatten(1)
    for what, tensor in (("base", before), ("tuned", after)):
        if not all_finite(tensor):
            raise ValueError(f"`{what}` must have finite weights, got NaN or infinity in {name!r}.")
    pairs = zip(slabs(before), slabs(after), strict=True)
    values = squared_singular_values(gram_matrix(b.double() - a.double() for a, b in pairs)).flip(0)
    weight = sum(float(piece.double().square().sum()) for piece in slabs(before)) ** 0.5
    return DeltaSpectrum((before.shape[0], before.shape[1]), values.sqrt().cpu(), float(values.sum()), weight)


@contextmanager
def pair_of(
    base: Source, tuned: Source, layers: Iterable[str]
) -> Iterator[tuple[list[str], Callable[[str], tuple[Tensor, Tensor]]]]:
    """Names of the modules that both have, and a function that reads the two weights of one."""
    with ExitStack() as stack:
        one, two = (stack.enter_context(opened(side, what)) for side, what in ((base, "base"), (tuned, "tuned")))
        kinds = one.architecture, two.architecture
        if None not in kinds and kinds[0] != kinds[1]:
            raise ValueError(f"`tuned` must have the architecture of `base`, {kinds[0]}, got {kinds[1]}.")
        names = sorted(named(one.shapes, layers) & named(two.shapes, layers))
        if not names:
            raise ValueError(
                f"`base` and `tuned` must have weights in common that `layers` names, got none of {len(one.shapes)} and "
                f"{len(two.shapes)} tensors."
            )
        for name in names:
            shapes = one.shapes[f"{name}.weight"], two.shapes[f"{name}.weight"]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"`tuned` must have the shapes of `base`: {name!r} has {shapes[1]}, `base` {shapes[0]}."
                )
        yield names, lambda name: (one.read(f"{name}.weight"), two.read(f"{name}.weight"))
