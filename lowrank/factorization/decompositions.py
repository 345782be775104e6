"""Leading directions of a weight in a weighted norm, from eigendecompositions of the smaller side."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lowrank.factorization.gram import eigh, wide_product

OBLIQUE = 1e-9  # how far columns that should be orthonormal may be from it


def multiply(matrix: Tensor, moments: Tensor | None) -> Tensor:
    """Return M G.

    **Arguments**

    - `matrix`: M, `(m, n)`.
    - `moments`: G, `(n, n)`, a diagonal `(n,)`, or None for the identity.
    """
    if moments is None:
        return matrix
    return matrix * moments if moments.dim() == 1 else matrix @ moments


def apply(root: Tensor | None, matrix: Tensor) -> Tensor:
    """Return H M.

    **Arguments**

    - `root`: H, see `root_of`; None for the identity.
    - `matrix`: M.
    """
    if root is None:
        return matrix
    return root @ matrix if root.dim() == 2 else root[:, None] * matrix


def solve(root: Tensor | None, basis: Tensor) -> Tensor:
    """Return H^-1 U.

    **Arguments**

    - `root`: H, see `root_of`; None for the identity.
    - `basis`: U.
    """
    if root is None:
        return basis
    return torch.linalg.solve_triangular(root, basis, upper=True) if root.dim() == 2 else basis / root[:, None]


def root_of(outputs: Tensor) -> Tensor:
    """Return H with H^T H = outputs: the roots of a diagonal, or an upper triangular matrix.

    **Arguments**

    - `outputs`: a diagonal `(m,)` > 0 or a positive definite matrix, `(m, m)`.

    **Raises**

    - `ValueError`: a diagonal with values <= 0; a matrix that is not positive definite.
    """
    if outputs.dim() == 1:
        if not bool((outputs > 0).all()):
            raise ValueError("`weighting.outputs` must be > 0 if inputs are weighted too, got a value <= 0.")
        return outputs.sqrt()
    root, failed = torch.linalg.cholesky_ex(outputs)
    if bool(failed):
        raise ValueError("`weighting.outputs` must be positive definite, got a matrix without Cholesky factor.")
    return root.T


def leading_plain(w: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factors of the plain truncation of W, and all singular values.

    **Arguments**

    - `w`: W, `(m, n)`, float64.
    - `rank`: int >= 0.
    """
    if rank == 0:
        return w[:, :0], w[:0], torch.linalg.svdvals(w)
    u, spectrum, _ = torch.linalg.svd(w, full_matrices=False)
    return u[:, :rank], u[:, :rank].T @ w, spectrum


def leading(matrix: Tensor, rank: int, inputs: Tensor | None, pairs: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return leading eigenvectors of M G M^T, the roots of its eigenvalues, descending, and its trace.

    Directions that G does not excite are ordered by the plain SVD of what the others leave of M.

    **Arguments**

    - `matrix`: M, `(m, n)`, float64.
    - `rank`: int >= 0, the number of eigenvectors.
    - `inputs`: G, a matrix, a diagonal or None for the identity.
    - `pairs`: how many eigenpairs to compute at least, None for all.
    """
    if matrix.shape[0] <= matrix.shape[1]:
        return leading_of(multiply(matrix, inputs) @ matrix.T, rank, pairs, lambda: matrix, overwrite=True)
    reflectors = torch.geqrf(matrix)  # M = Q R: work on the cheaper side, never form Q
    core = reflectors[0][: matrix.shape[1]].triu()
    basis, roots, energy = leading_of(multiply(core, inputs) @ core.T, rank, pairs, lambda: core, overwrite=True)
    if rank == 0:
        return matrix[:, :0], roots, energy
    padded = nn.functional.pad(basis, (0, 0, 0, matrix.shape[0] - matrix.shape[1]))
    return torch.ormqr(*reflectors, padded), roots, energy


def leading_of(
    image: Tensor, rank: int, pairs: int | None, matrix: Callable[[], Tensor], *, overwrite: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return leading eigenvectors of a matrix M G M^T that is known, the roots of its eigenvalues, and its trace.

    **Arguments**

    - `image`: M G M^T, `(m, m)`, float64.
    - `rank`: int >= 0, the number of eigenvectors.
    - `pairs`: how many eigenpairs to compute at least, None for all.
    - `matrix`: returns M; called only if there are directions that G does not excite.
    - `overwrite`: `image` may be destroyed. Default False.
    """
    energy, size = image.trace(), len(image)
    values, basis = eigh(image, pairs, overwrite=overwrite)
    excited = _excited(values, size)
    values[excited:] = 0.0  # rounding, not energy
    if excited < rank:
        basis = _fill(matrix, basis[:, :excited], rank)
    return basis[:, :rank], values.sqrt(), energy


def _excited(values: Tensor, size: int) -> int:
    """Return how many eigenvalues are more than rounding."""
    return int((values > values[0] * torch.finfo(values.dtype).eps * size).sum())


def _fill(matrix: Callable[[], Tensor], basis: Tensor, rank: int) -> Tensor:
    """Complete the basis to `rank` columns, by the leading left singular vectors of what it leaves of the matrix."""
    complement = torch.linalg.qr(basis, mode="complete").Q[:, basis.shape[1] :]
    rest = complement.T @ matrix()  # which is not kept
    _, vectors = eigh(rest @ rest.T, rank - basis.shape[1], overwrite=True)
    return torch.cat([basis, complement @ vectors], dim=1)


def leading_by_pullback(
    w: Tensor, rank: int, moments: Tensor, inputs: Tensor | None, pairs: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the factors of H W S, its spectrum and its energy from M = W^T H^T H W.

    Nothing of the size of the outputs is decomposed. With V, sigma^2 the leading eigenpairs of S^T M S, the columns of
    E = S V / sigma are orthonormal under M, B = W E and A = E^T M. What inputs do not excite is completed by the leading
    directions of H (W - B A).

    **Arguments**

    - `w`: W, `(m, n)`, any floating dtype.
    - `rank`: int >= 0.
    - `moments`: M, `(n, n)`, positive semidefinite.
    - `inputs`: S S^T, a matrix, a diagonal or None for the identity.
    - `pairs`: how many eigenpairs to compute at least, None for all.
    """
    root = None if inputs is None else _cholesky(inputs) if inputs.dim() == 2 else inputs.sqrt()  # S^T
    if root is None and inputs is not None:
        if (found := _leading_by_cholesky(w, rank, moments, inputs, pairs)) is not None:
            return found
        values, vectors = eigh(inputs)
        root = values.sqrt()[:, None] * vectors.T
    inner = moments if root is None else apply(root, apply(root, moments).T)
    energy = inner.trace()
    values, vectors = eigh(inner, pairs, overwrite=root is not None)
    excited = _excited(values, len(inner))
    del inner
    values[excited:] = 0.0
    kept = min(rank, excited)
    basis = vectors[:, :kept] / values[:kept].sqrt()
    basis = basis if root is None else root.T @ basis if root.dim() == 2 else root[:, None] * basis
    del root, vectors
    upper, failed = torch.linalg.cholesky_ex(basis.T @ moments @ basis, upper=True)
    if not bool(failed):  # rounding made E slightly oblique, which would cost accuracy in B A
        basis = torch.linalg.solve_triangular(upper, basis, upper=True, left=False)
    left, right = wide_product(w, basis), basis.T @ moments
    if kept < rank:
        _, rest = eigh(moments - right.T @ right, overwrite=True)
        rest = rest[:, : rank - kept]
        more = wide_product(w, rest) - left @ (right @ rest)
        left, right = torch.cat([left, more], dim=1), torch.cat([right, rest.T])
    return left, right, values.sqrt(), energy


def _leading_by_cholesky(
    w: Tensor, rank: int, moments: Tensor, inputs: Tensor, pairs: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Return what `leading_by_pullback` does from M = R^T R, for inputs without a Cholesky factor, as behind a layer norm.

    With U the leading eigenvectors of R G R^T, B = W R^-1 U and A = U^T R: one eigendecomposition, where a root of G would take
    another. None if M has no such factor either, or if it is too near to that for W R^-1 to be orthonormal in the norm H.
    """
    if (root := _cholesky(moments)) is None:
        return None
    basis, roots, energy = leading_of(multiply(root, inputs) @ root.T, rank, pairs, lambda: root, overwrite=True)
    columns = solve(root, basis)
    oblique = columns.T @ moments @ columns
    oblique.diagonal().sub_(1.0)
    if rank and float(oblique.abs().max()) > OBLIQUE:
        return None
    return wide_product(w, columns), basis.T @ root, roots, energy


def _cholesky(matrix: Tensor) -> Tensor | None:
    """Return the upper triangular R with R^T R = matrix; None if there is none."""
    factor, failed = torch.linalg.cholesky_ex(matrix, upper=True)
    return None if bool(failed) else factor
