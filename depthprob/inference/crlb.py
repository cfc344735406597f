"""The Cramér-Rao bound: how well any estimator could know the depths of a field, before anything is measured."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..errors import InputError
from ..physics.focal_series import Field, FocalSeries
from ..physics.library import ColumnLibrary
from . import likelihood, local
from .arrow import ArrowMatrix, bordered, plus_diagonal
from .problem import DARKEST, LARGE, PER_COLUMN, Problem, free_parameters, make_problem, parameter_names

NUISANCES = ("positions", "background", "gain", "image_shifts")


class FieldInformation(NamedTuple):
    """Fisher information of a focal series on the depths of a field and nuisances; what is free is chosen afterwards, by `depth_bounds`.

    Attributes
    ----------
    problem : Problem
        All nuisances free.
    matrix : (P, P) or ArrowMatrix
        Over the problem's free parameters, or, of more than `LARGE` columns, over all of columns and images.
    beside : tuple of str
        Names of further unknowns.
    across, among : (P, K), (K, K)
        Information between the problem's free parameters and those, and on those.
    """

    problem: Problem
    matrix: np.ndarray | ArrowMatrix
    beside: tuple[str, ...]
    across: np.ndarray
    among: np.ndarray

    def depth_bounds(self, nuisances: tuple[str, ...], prior_sd: Mapping[str, float] | None = None, others_known: bool = False) -> np.ndarray:
        """As `crlb`, with these of the nuisances unknown, and the others known."""
        prior_sd = prior_sd or {}
        adrift = "focus_offset" in nuisances and "focus_offset" not in prior_sd
        if adrift and len(self.problem.n_atoms) == 1:
            raise InputError("an isolated column's depth and a free focus offset cannot be told apart; leave 'focus_offset' out of the nuisances, or give it a prior_sd.")
        relative = adrift and not others_known
        problem = replace(self.problem, free=free_parameters(tuple(n for n in nuisances if n not in self.beside and not (relative and n == "focus_offset"))))
        unknown = np.array([name in problem.free for name, _ in parameter_names(self.problem)])
        further = np.array([name in nuisances for name in self.beside], bool)
        across, among = self.across[np.ix_(unknown, further)], self.among[np.ix_(further, further)]
        names = [name for name, _ in parameter_names(problem)] + [name for name in self.beside if name in nuisances]
        known = np.array([prior_sd.get(name, np.inf) for name in names]) ** -2.0
        if isinstance(self.matrix, ArrowMatrix):
            matrix = plus_diagonal(bordered(local.select(self.matrix, problem), across, among), known)
            return _of_each(matrix, problem) if others_known else local.depth_bounds(matrix, problem, relative)
        fisher = np.block([[self.matrix[np.ix_(unknown, unknown)], across], [across.T, among]]) + np.diag(known)
        if not others_known:
            return likelihood.depth_bounds(fisher, problem, relative)
        columns = sum(name in PER_COLUMN for name in names)
        own, rest = slice(columns), slice(columns, None)
        return _of_each(ArrowMatrix(np.arange(columns), [fisher[own, own]], [], fisher[own, rest], fisher[rest, rest]), problem)


def _of_each(matrix: ArrowMatrix, problem: Problem) -> np.ndarray:
    """Bound on the depth of each column (C,), what other columns have of their own known, nuisances not."""
    n = len(problem.n_atoms)
    own, across = matrix.groups(np.arange(n)[:, None] + n * np.arange(len(matrix.order) // n))
    gauge = local.gauge(problem)
    among = matrix.corner + np.pad(gauge, (0, len(matrix.corner) - len(gauge)))
    scale = np.sqrt(np.maximum(np.diag(among), 1e-30))
    across = across / scale
    explained = across @ np.linalg.pinv(among / np.outer(scale, scale), rcond=1e-12, hermitian=True) @ across.swapaxes(1, 2)
    return np.sqrt(np.linalg.inv(own - explained)[:, 0, 0])


def field_information(
    field: Field,
    library: ColumnLibrary,
    series: FocalSeries,
    nuisances: tuple[str, ...] = NUISANCES,
    read_variance: float = 0.0,
    beside: Mapping[str, np.ndarray] | None = None,
    progress: Callable = lambda items, **_: items,
) -> FieldInformation:
    """Information on all depths and the nuisances, of which `FieldInformation.depth_bounds` may take any part; arguments as of `crlb`."""
    beside = beside or {}
    fewest, most = int(np.min(field.n_atoms)), int(np.max(field.n_atoms))
    if fewest < 1 or most > library.n_max:
        raise InputError(f"the field's columns have {fewest} to {most} atoms; allowed are 1 to {library.n_max}, as many as the library knows. Look at n_atoms, or build a longer library.")
    dense = len(field.n_atoms) <= LARGE
    reader = likelihood if dense else local
    free = tuple(name for name in nuisances if name not in beside)
    problem = make_problem(np.zeros((len(series.defocus), *series.shape)), field, library, series, free, read_variance=read_variance, dense=dense)
    rate = reader.rates(problem.start, problem)
    slopes = np.stack([np.asarray(slope, float) for slope in beside.values()]) if beside else np.zeros((0, *rate.shape))
    across = reader.information_along(problem.start, problem, slopes) if beside else np.zeros((len(parameter_names(problem)), 0))
    among = np.einsum("afyx,bfyx,fyx->ab", slopes, slopes, 1 / (np.maximum(rate.astype(float), DARKEST) + read_variance))
    matrix = likelihood.fisher_and_score(problem.start, problem)[0] if dense else local.information(problem.start, problem, rate, progress)
    return FieldInformation(problem, matrix, tuple(beside), across, among)


def crlb(
    field: Field,
    library: ColumnLibrary,
    series: FocalSeries,
    nuisances: tuple[str, ...] = NUISANCES,
    read_variance: float = 0.0,
    prior_sd: Mapping[str, float] | None = None,
    beside: Mapping[str, np.ndarray] | None = None,
    progress: Callable = lambda items, **_: items,
    others_known: bool = False,
) -> np.ndarray:
    """Cramér-Rao bound on the depth of each column (C,) [Å] in a field, all depths and the nuisances unknown; Alania et al. (2017), eqs. 8 to 10.

    Nuisances are those of the config's `free`; with "focus_offset", and no prior on it, the bounds are of depths relative to the field's mean. Of more than
    `LARGE` columns only those that overlap have anything in common: cost grows linearly with them, and bounds come out up to 2 % low (`local.DIM`).

    Parameters
    ----------
    prior_sd : name -> sd, optional
        Of what is known beforehand, by the names of `PARAMETERS` and `beside`; no others count. Their precisions add to the Fisher information at the given
        values: van Trees' bound for normal priors over which that information hardly varies.
    beside : name -> (F, ny, nx), optional
        Derivatives of the expected counts by further unknowns, as `counts_by_focal_variance`, or differences of libraries.
    others_known : bool
        Whether the bound of each column is that with depths, and positions, of all others known. What they scatter is there all the same.

    Raises
    ------
    InputError
        For atom numbers that the library does not know, and the depth of one column with a free focus offset of which nothing is known.
    """
    beside = beside or {}
    information = field_information(field, library, series, nuisances, read_variance, beside, progress)
    return information.depth_bounds((*nuisances, *beside), prior_sd, others_known)
