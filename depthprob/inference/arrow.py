"""Precision matrices of large fields: columns that overlap only near ones, and nuisances that touch all.

Columns are sorted into strips at least as wide as two overlapping windows, so that only neighbouring strips couple: a block-tridiagonal
matrix, bordered by the few nuisances. (A periodic field, folded flat, has strips on both layers.) Cholesky factor, solutions, every marginal variance (by block-wise selected inversion, Takahashi's recursion)
and draws cost a time linear in the field's length and cubic in its width. Float64.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy.linalg import cholesky, solve_triangular
from scipy.linalg.lapack import dtrtri


class ArrowMatrix(NamedTuple):
    """Symmetric [[A, B], [B^T, D]] with A block-tridiagonal over strips.

    Attributes
    ----------
    order : (m,) int
        Place in the full vector of each row of A, strip by strip.
    diagonal : list over strips of (m_s, m_s)
    lower : list over strips but the last of (m_{s+1}, m_s)
    border : (m, k)
        Rows in strip order.
    corner : (k, k)
    """

    order: np.ndarray
    diagonal: list
    lower: list
    border: np.ndarray
    corner: np.ndarray

    @property
    def size(self) -> int:
        return len(self.order) + len(self.corner)

    def starts(self) -> np.ndarray:
        """First row of each strip, and the end."""
        return np.cumsum([0] + [len(d) for d in self.diagonal])

    def dense(self) -> np.ndarray:
        """In the order of the full vector; for tests and small fields."""
        m, at = len(self.order), self.starts()
        full = np.zeros((self.size, self.size))
        strips = np.zeros((m, m))
        for s, block in enumerate(self.diagonal):
            strips[at[s] : at[s + 1], at[s] : at[s + 1]] = block
        for s, block in enumerate(self.lower):
            strips[at[s + 1] : at[s + 2], at[s] : at[s + 1]] = block
            strips[at[s] : at[s + 1], at[s + 1] : at[s + 2]] = block.T
        full[np.ix_(self.order, self.order)] = strips
        full[self.order, m:] = self.border
        full[m:, self.order] = self.border.T
        full[m:, m:] = self.corner
        return full

    def groups(self, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Blocks (n, p, p) of A, and rows (n, p, k) of B, of n groups of p places in the full vector that share a strip."""
        rows = np.empty(len(self.order), int)
        rows[self.order] = np.arange(len(self.order))
        rows, at = rows[members], self.starts()
        strip = np.searchsorted(at, rows[:, 0], side="right") - 1
        return np.stack([self.diagonal[s][np.ix_(r - at[s], r - at[s])] for r, s in zip(rows, strip, strict=True)]), self.border[rows]


def plus_diagonal(matrix: ArrowMatrix, extra: np.ndarray, corner: np.ndarray | float = 0.0) -> ArrowMatrix:
    """With `extra` (size,) added to the diagonal, in the order of the full vector, and `corner` (k, k) to the nuisances' block."""
    at, own = matrix.starts(), extra[matrix.order]
    diagonal = [block + np.diag(own[a:b]) for block, a, b in zip(matrix.diagonal, at[:-1], at[1:], strict=True)]
    return matrix._replace(diagonal=diagonal, corner=matrix.corner + corner + np.diag(extra[len(matrix.order) :]))


def bordered(matrix: ArrowMatrix, across: np.ndarray, corner: np.ndarray) -> ArrowMatrix:
    """With k more rows and columns behind: `across` (size, k) in the order of the full vector, and their own block (k, k)."""
    m = len(matrix.order)
    corner = np.block([[matrix.corner, across[m:]], [across[m:].T, corner]])
    return matrix._replace(border=np.hstack([matrix.border, across[matrix.order]]), corner=corner)


class ArrowFactor:
    """Cholesky factor of a positive definite `ArrowMatrix`.

    Raises
    ------
    numpy.linalg.LinAlgError
        If the matrix is not positive definite.
    """

    def __init__(self, matrix: ArrowMatrix):
        self.order, self.at = matrix.order, matrix.starts()
        self.factors, self.below = [], []
        block = matrix.diagonal[0]
        for s in range(len(matrix.diagonal)):
            factor = cholesky(block, lower=True, check_finite=False)
            self.factors.append(factor)
            if s < len(matrix.lower):
                below = solve_triangular(factor, matrix.lower[s].T, lower=True, check_finite=False).T
                self.below.append(below)
                block = matrix.diagonal[s + 1] - below @ below.T
        self.border = self._forward(matrix.border)  # L^-1 B
        self.corner = cholesky(matrix.corner - self.border.T @ self.border, lower=True)

    def _strip(self, s: int) -> slice:
        return slice(self.at[s], self.at[s + 1])

    def _forward(self, right: np.ndarray) -> np.ndarray:
        out = np.array(right, float)
        for s, factor in enumerate(self.factors):
            if s:
                out[self._strip(s)] -= self.below[s - 1] @ out[self._strip(s - 1)]
            out[self._strip(s)] = solve_triangular(factor, out[self._strip(s)], lower=True, check_finite=False)
        return out

    def _backward(self, right: np.ndarray) -> np.ndarray:
        out = np.array(right, float)
        for s in reversed(range(len(self.factors))):
            if s < len(self.below):
                out[self._strip(s)] -= self.below[s].T @ out[self._strip(s + 1)]
            out[self._strip(s)] = solve_triangular(self.factors[s], out[self._strip(s)], lower=True, trans="T", check_finite=False)
        return out

    def solve(self, right: np.ndarray) -> np.ndarray:
        """Inverse times a vector (size,) in the order of the full vector."""
        m = len(self.order)
        y = self._forward(right[self.order])
        tail = solve_triangular(self.corner, right[m:] - self.border.T @ y, lower=True)
        return self._finish(y, tail)

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Normal draws (n, size) with this precision."""
        return self.coloured(rng.standard_normal((len(self.order) + len(self.corner), n)).T)

    def coloured(self, z: np.ndarray) -> np.ndarray:
        """Numbers (n, size) with this precision, of independent standard normal ones."""
        return self._finish(z.T[: len(self.order)], z.T[len(self.order) :]).T

    def _finish(self, y: np.ndarray, tail: np.ndarray) -> np.ndarray:
        """Solve L^T x = (y, tail), back in the order of the full vector."""
        m = len(self.order)
        out = np.empty((m + len(self.corner), *y.shape[1:]))
        out[m:] = solve_triangular(self.corner, tail, lower=True, trans="T")
        out[self.order] = self._backward(y - self.border @ out[m:])
        return out

    def scale(self) -> "ArrowScale":
        inverse = lambda factor: jnp.asarray(_inverse(factor).T)
        below = [jnp.asarray(block.T) for block in self.below]
        return ArrowScale(jnp.asarray(self.order), [inverse(f) for f in self.factors], below, jnp.asarray(self.border), inverse(self.corner))

    def variances(self) -> np.ndarray:
        """Diagonal of the inverse (size,)."""
        m, last = len(self.order), len(self.factors) - 1
        inner = np.empty(m)
        below = None  # the next strip's block of the inverse
        for s in range(last, -1, -1):
            inverse = _inverse(self.factors[s])
            block = inverse.T @ inverse
            if s < last:
                gain = solve_triangular(self.factors[s], self.below[s].T, lower=True, trans="T", check_finite=False)  # (L_{s+1,s} L_ss^-1)^T
                block += gain @ below @ gain.T
            below = block
            inner[self._strip(s)] = np.diag(block)
        corner = np.linalg.inv(self.corner)
        solved = self._backward(self.border)  # A^-1 B
        out = np.empty(m + len(self.corner))
        out[self.order] = inner + ((solved @ corner.T) ** 2).sum(1)
        out[m:] = (corner**2).sum(0)
        return out


def _inverse(lower: np.ndarray) -> np.ndarray:
    return dtrtri(lower, lower=1)[0]


class ArrowScale(NamedTuple):
    """`ArrowFactor.coloured` for compiled functions: a pytree, with `scale @ z` for one z (size,).

    Attributes
    ----------
    order : (m,) int
    inverse : list over strips of (m_s, m_s)
        Of the transposed factors.
    below : list over strips but the last of (m_s, m_{s+1})
        Transposed blocks below them.
    border : (m, k)
    corner : (k, k)
        Inverse of the transposed factor.
    """

    order: Array
    inverse: list
    below: list
    border: Array
    corner: Array

    def __matmul__(self, z: Array) -> Array:
        """L^-T z, in the order of the full vector."""
        m = len(self.order)
        tail = self.corner @ z[m:]
        right, parts = z[:m] - self.border @ tail, []
        for inverse, below in zip(self.inverse[::-1], [None, *self.below[::-1]], strict=True):
            right, own = jnp.split(right, [len(right) - len(inverse)])
            parts.append(inverse @ (own if below is None else own - below @ parts[-1]))
        return jnp.concatenate([jnp.zeros(m, z.dtype).at[self.order].set(jnp.concatenate(parts[::-1])), tail])


def strips(along: np.ndarray, width: float, period: float | None = None) -> list[np.ndarray]:
    """Indices of columns in strips at least `width` wide of a coordinate (C,); of one that is periodic, in pairs of strips, at x and period - x."""
    if period is not None:
        along = abs(np.mod(along + period / 2, period) - period / 2)
    ranked = np.argsort(along, kind="stable")
    edges = np.arange(along.min(), along.max() + width, width)[1:]
    return [part for part in np.split(ranked, np.searchsorted(along[ranked], edges)) if len(part)]
