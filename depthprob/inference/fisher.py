"""Fisher information that counts carry on the parameters of any model, and the Cramér-Rao bounds that follow from it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ..checks import nearest
from ..errors import InputError
from .problem import DARKEST

KNOWN = 1e-12  # eigenvalues below this part of the largest are rounding: derivatives in single precision leave 1e-13
TOGETHER = 64  # derivatives, at most
BLOCK = 2**24  # numbers of a block of derivatives in double precision


class Information(eqx.Module):
    """What a measurement tells of named parameters. Information of independent measurements adds: `one + other`.

    Methods take names of parameters, or what stands before the bracket for all entries of an array; none stands for all.

    Attributes
    ----------
    matrix : (p, p)
        Fisher information [1/(unit_i unit_j)], float64.
    names : (p,) of str
        Such as "depths[3]", "positions[3,0]", or "focus_offset".
    units : (p,) of str
    """

    matrix: np.ndarray
    names: tuple[str, ...] = eqx.field(static=True)
    units: tuple[str, ...] = eqx.field(static=True)

    def __check_init__(self):
        if np.shape(self.matrix) != (len(self.names),) * 2 or len(self.units) != len(self.names):
            raise InputError(f"a Fisher matrix of shape {np.shape(self.matrix)} has {len(self.names)} names and {len(self.units)} units; allowed is as many of either as rows and columns.")

    def __add__(self, other: "Information") -> "Information":
        if (self.names, self.units) != (other.names, other.units):
            raise InputError(f"information on {', '.join(self.names)} and on {', '.join(other.names)} cannot be added; allowed are the same parameters in the same units and order.")
        return Information(self.matrix + other.matrix, self.names, self.units)

    def sd(self, *which: str) -> Float[np.ndarray, " q"]:
        """Cramér-Rao bound on each parameter, all the others unknown too; infinite where a direction that nothing is known of moves it."""
        values, vectors, size = self._eigen()
        known = values > KNOWN * values[0]
        variance = (vectors[known] ** 2 / values[known, None]).sum(0) * size**2
        variance[(vectors[~known] ** 2).sum(0) > 1e-12] = np.inf
        return np.sqrt(variance)[self._places(which)]

    def sd_alone(self, *which: str) -> Float[np.ndarray, " q"]:
        """The bound on each parameter, all the others known."""
        with np.errstate(divide="ignore"):
            return np.diag(self.matrix)[self._places(which)] ** -0.5

    def sd_together(self, *which: str) -> float:
        """The bound on a displacement that these parameters have in common, their differences and all the others known."""
        chosen = self._places(which)
        with np.errstate(divide="ignore"):
            return float(np.maximum(self.matrix[np.ix_(chosen, chosen)].sum(), 0.0) ** -0.5)

    def profiled(self, *which: str) -> "Information":
        """Information on these parameters with all the others unknown: the Schur complement. Unknown directions of the others take nothing with them."""
        chosen = self._places(which)
        rest = np.setdiff1d(np.arange(len(self.names)), chosen)
        own, across = self.matrix[np.ix_(chosen, chosen)], self.matrix[np.ix_(rest, chosen)]
        size = _sizes(self.matrix[np.ix_(rest, rest)])
        inverse = np.linalg.pinv(self.matrix[np.ix_(rest, rest)] * np.outer(size, size), KNOWN, hermitian=True)
        across = across * size[:, None]
        return self._of(chosen, own - across.T @ inverse @ across)

    def known(self, *which: str) -> "Information":
        """Information on the others, if these parameters are known."""
        if not which:
            raise InputError("no parameter was named; allowed are one or more that are known.")
        rest = np.setdiff1d(np.arange(len(self.names)), self._places(which))
        return self._of(rest, self.matrix[np.ix_(rest, rest)])

    def with_prior(self, sd: Mapping[str, float]) -> "Information":
        """With what is known beforehand, normal with these standard deviations (van Trees' bound where the information hardly varies over them)."""
        precision = np.zeros(len(self.names))
        for name, value in sd.items():
            if not value > 0:
                raise InputError(f"the prior's standard deviation of {name} is {value!r}; allowed are numbers above 0.")
            precision[self._places((name,))] += float(value) ** -2
        return Information(self.matrix + np.diag(precision), self.names, self.units)

    def in_terms_of(self, names: Iterable[str], units: Iterable[str], jacobian: Float[np.ndarray, "p q"]) -> "Information":
        """Information on other parameters, of which these are functions with this Jacobian."""
        jacobian = np.asarray(jacobian, float)
        return Information(jacobian.T @ self.matrix @ jacobian, tuple(names), tuple(units))

    def eigenvalues(self) -> Float[np.ndarray, " p"]:
        """Largest first; of parameters in different units, each is measured in its own `sd_alone`."""
        return self._eigen()[0]

    def in_words(self) -> list[str]:
        """A line for each eigenvector, best known first: which parameters move together, which against each other, and how well that is known.

        Of parameters in different units, each is measured in its own `sd_alone`: a combination that is worth 50 times that is hardly known where each
        parameter is, if the others are.
        """
        values, vectors, _ = self._eigen()
        same = len(set(self.units)) == 1
        lines = []
        for value, vector in zip(values, vectors, strict=True):
            vector = vector * np.sign(vector[np.argmax(abs(vector))])
            strong = np.flatnonzero(abs(vector) >= 0.4 * abs(vector).max())
            with_it, against = ([self.names[i] for i in strong if vector[i] * sign > 0] for sign in (1, -1))
            who = _listed(with_it) + (f" against {_listed(against)}" if against else "")
            size = f"sd {abs(value) ** -0.5:.3g} {self.units[0] if same else 'times what each has alone'}" if value > KNOWN * values[0] else "nothing is known"
            lines.append(f"{who}: {size}")
        return lines

    def _eigen(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Eigenvalues, largest first, eigenvectors as rows, and the size that each parameter is measured in."""
        size = np.ones(len(self.names)) if len(set(self.units)) == 1 else _sizes(self.matrix)
        values, vectors = np.linalg.eigh(self.matrix * np.outer(size, size))
        return values[::-1], vectors[:, ::-1].T, size

    def _places(self, which: tuple[str, ...]) -> np.ndarray:
        found = [i for name in which for i, full in enumerate(self.names) if name in (full, full.partition("[")[0])]
        for name in which:
            if not any(name in (full, full.partition("[")[0]) for full in self.names):
                raise InputError(f"there is no parameter {name!r}. {nearest(name, dict.fromkeys(full.partition('[')[0] for full in self.names))}")
        return np.unique(found) if which else np.arange(len(self.names))

    def _of(self, chosen: np.ndarray, matrix: np.ndarray) -> "Information":
        return Information(matrix, tuple(self.names[i] for i in chosen), tuple(self.units[i] for i in chosen))


def _sizes(matrix: np.ndarray) -> np.ndarray:
    """Standard deviation of each parameter alone, one where nothing is known of it."""
    own = np.diag(matrix)
    return np.where(own > 0, own, 1.0) ** -0.5


def _listed(names: list[str]) -> str:
    """Names with a comma between, those of one array as "depths 0 3"."""
    arrays = {}
    for name in names:
        before, _, index = name.partition("[")
        arrays.setdefault(before, []).append(index.rstrip("]"))
    return ", ".join(" ".join([name, *indices]).rstrip() for name, indices in arrays.items())


def poisson_fisher(expected: Float[np.ndarray, "..."], derivatives: Float[np.ndarray, "p ..."], read_variance: float = 0.0) -> Float[np.ndarray, "p p"]:
    """Fisher matrix sum (dn_a)(dn_b) / n of independent Poisson counts, float64; eq. 8 of Alania et al. (2017).

    Read noise of variance v [e^2] enters as the shifted Poisson distribution does, n + v in place of n. A mean below `DARKEST` is taken for that: where counts
    cannot be negative, the derivative vanishes with the mean, and a pixel without any tells nothing to first order.
    """
    root = np.sqrt(np.maximum(np.asarray(expected, float).ravel(), DARKEST) + read_variance)
    slopes, matrix = np.asarray(derivatives).reshape(len(derivatives), -1), np.zeros((len(derivatives),) * 2)
    for pixels in np.array_split(np.arange(len(root)), max(1, slopes.size // BLOCK)):
        rows = np.asarray(slopes[:, pixels], float) / root[pixels]
        matrix += rows @ rows.T
    return matrix


def fisher_information(
    expected_counts: Callable[..., Float[Array, "..."]],
    parameters: PyTree,
    parts: Iterable[Any] | None = None,
    units: Mapping[str, str] | None = None,
    read_variance: float = 0.0,
    memory_limit: float = 4.0,
    progress: Callable = lambda items, **_: items,
) -> Information:
    """Fisher information of Poisson counts on every float of `parameters`, from exact derivatives of any model.

    For means n_k > 0 the score is sum_k (N_k / n_k - 1) dn_k, with Var N_k = n_k, so F_ij = sum_k (dn_k/dtheta_i)(dn_k/dtheta_j) / n_k (`poisson_fisher`).
    Derivatives are taken forwards, up to 64 together and fewer where the model compiled for so many needs more memory than allowed, in the precision of the model
    (`jax_enable_x64` for double); sums are float64. The derivatives of one part by all parameters are held at a time. What it takes is one evaluation of the model for each
    parameter: fields of hundreds of columns have `crlb`, which knows which of them overlap.

    Parameters
    ----------
    expected_counts : function
        From parameters to expected counts [e] of any shape; with `parts`, from parameters and one of them. Traced by JAX.
    parameters : pytree
        Named by what leads to each leaf: {"depths": ...} or a `Field` give "depths[0]", nested ones "lens.c3". Whole numbers in it are held.
    parts : iterable, optional
        Of numbers or arrays, one shape for all: the images of a series, say. Their information adds.
    units : mapping from name to unit, optional
        Of whole arrays, "depths" rather than "depths[0]".
    read_variance : float
        Of the detector [e^2].
    memory_limit : float
        For derivatives and the matrix [GB], and as much again for what the model takes on the way.

    Raises
    ------
    InputError
        Where expected counts are negative, or they or a derivative not finite; without parts or floats, for units of unknown parameters, a negative variance, and
        where the limit is too low for one part.
    """
    free, held = eqx.partition(parameters, eqx.is_inexact_array_like)
    free = jax.tree.map(jnp.asarray, free)
    flat, unravel = ravel_pytree(free)
    names, of_array = _names(free)
    units = dict(units or {})
    for name in units:
        if name not in of_array:
            raise InputError(f"units are given for {name!r}, which is no parameter. {nearest(name, dict.fromkeys(of_array))}")
    if not (read_variance >= 0 and memory_limit > 0):
        raise InputError(f"read_variance is {read_variance!r} and memory_limit {memory_limit!r}; allowed are a variance from 0 on and GB above 0.")
    if not names:
        raise InputError("the parameters hold no floating-point number, so nothing can be differentiated; allowed is any pytree with some.")

    def counts_and_slopes(flat, directions, part):
        counts = lambda theta: jnp.ravel(expected_counts(eqx.combine(unravel(theta), held), *part))
        return jax.vmap(lambda t: jax.jvp(counts, (flat,), (t,)), out_axes=(None, 0))(jax.nn.one_hot(directions, len(flat), dtype=flat.dtype))

    matrix, shape, together, compiled = np.zeros((len(names),) * 2), None, 0, None
    for piece in progress([()] if parts is None else parts, desc="Fisher information", unit="part"):
        part = () if parts is None else (jax.tree.map(jnp.asarray, piece),)
        there = jax.tree.map(lambda a: (a.shape, a.dtype), part)
        if compiled is None or there != shape:
            shape, (together, compiled) = there, _compiled_within(memory_limit, counts_and_slopes, flat, part)
        found = [compiled(flat, first + np.arange(together), part) for first in range(0, len(names), together)]
        expected, slopes = np.asarray(found[0][0], float), np.concatenate([np.asarray(s) for _, s in found])[: len(names)]
        _check(expected, slopes, names)
        matrix += poisson_fisher(expected, slopes, read_variance)
    if compiled is None:
        raise InputError("there are no parts; allowed is one or more, or None for a model in one piece. An iterator that was used up is the likely cause.")
    return Information(matrix, names, tuple(units.get(name, "") for name in of_array))


def _compiled_within(memory_limit: float, counts_and_slopes: Callable, flat: Array, part: PyTree) -> tuple[int, Callable]:
    """How many derivatives are taken together, so that what the model makes on the way to them stays within the limit [GB], and the function compiled for so many."""
    counts = jax.eval_shape(counts_and_slopes, flat, np.arange(1), part)[0]

    def refuse_beyond_limit(gigabytes: float, what: str) -> None:
        if gigabytes > memory_limit:
            raise InputError(f"memory_limit is {memory_limit:g} GB, and {what} take {gigabytes:.2g}. Raise it, or give the counts in smaller parts: single images, or pieces of them.")

    refuse_beyond_limit((8 * len(flat) + 2 * counts.dtype.itemsize * counts.size) * len(flat) * 1e-9, f"{len(flat)} derivatives of {counts.size} counts and their matrix")
    together = min(TOGETHER, len(flat))
    while True:
        compiled = jax.jit(counts_and_slopes).lower(flat, np.arange(together), part).compile()
        passing = getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0) * 1e-9
        refuse_beyond_limit(passing / together, "what the model makes on the way to one derivative")
        if passing <= memory_limit:
            return together, compiled
        together = max(1, min(together - 1, int(together * memory_limit / passing)))


def _names(tree: PyTree) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of every number in a pytree, in the order of `ravel_pytree`: its name, and its array's."""
    names, arrays = [], []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = jax.tree_util.keystr(path, simple=True, separator=".") or "parameter"
        names += [array + (f"[{','.join(map(str, index))}]" if index else "") for index in np.ndindex(leaf.shape)]
        arrays += [array] * leaf.size
    return tuple(names), tuple(arrays)


def _check(expected: np.ndarray, slopes: np.ndarray, names: tuple[str, ...]) -> None:
    if not np.isfinite(expected).all() or expected.min() < -1e-3 * abs(expected).max():
        wrong = "not finite" if not np.isfinite(expected).all() else f"as low as {expected.min():.3g}"
        raise InputError(f"expected counts are {wrong}; allowed are numbers from 0 on. Look at what the model gives for these parameters.")
    bad = np.flatnonzero(~np.isfinite(slopes).all(1))
    if len(bad):
        raise InputError(f"derivatives of the expected counts are not finite, by {names[bad[0]]}{f' and {len(bad) - 1} more' if len(bad) > 1 else ''}; allowed are finite ones. A root or logarithm of zero, or a distance of zero, often is the cause.")
