"""The Cramér-Rao bound: how well any estimator could know the depths of a field, before anything is measured."""

from collections.abc import Callable, Mapping

import numpy as np

from ..errors import InputError
from ..physics.focal_series import Field, FocalSeries
from ..physics.library import ColumnLibrary
from . import likelihood, local
from .arrow import bordered, plus_diagonal
from .problem import DARKEST, LARGE, make_problem, parameter_names


def crlb(
    field: Field,
    library: ColumnLibrary,
    series: FocalSeries,
    nuisances: tuple[str, ...] = ("positions", "background", "gain", "image_shifts"),
    read_variance: float = 0.0,
    prior_sd: Mapping[str, float] | None = None,
    beside: Mapping[str, np.ndarray] | None = None,
    progress: Callable = lambda items, **_: items,
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

    Raises
    ------
    InputError
        For atom numbers that the library does not know, and the depth of one column with a free focus offset of which nothing is known.
    """
    prior_sd, beside = prior_sd or {}, beside or {}
    fewest, most = int(np.min(field.n_atoms)), int(np.max(field.n_atoms))
    if fewest < 1 or most > library.n_max:
        raise InputError(f"the field's columns have {fewest} to {most} atoms; allowed are 1 to {library.n_max}, as many as the library knows. Look at n_atoms, or build a longer library.")
    relative = "focus_offset" in nuisances and "focus_offset" not in prior_sd
    if relative and len(field.n_atoms) == 1:
        raise InputError("an isolated column's depth and a free focus offset cannot be told apart; leave 'focus_offset' out of the nuisances, or give it a prior_sd.")
    free = tuple(name for name in nuisances if name != "focus_offset" or not relative)
    dense = len(field.n_atoms) <= LARGE
    reader = likelihood if dense else local
    problem = make_problem(np.zeros((len(series.defocus), *series.shape)), field, library, series, free, read_variance=read_variance, dense=dense)
    names = [name for name, _ in parameter_names(problem)] + list(beside)
    known = np.array([prior_sd.get(name, np.inf) for name in names]) ** -2.0
    rate = reader.rates(problem.start, problem)
    slopes = np.stack([np.asarray(slope, float) for slope in beside.values()]) if beside else np.zeros((0, *rate.shape))
    across = reader.information_along(problem.start, problem, slopes) if beside else np.zeros((len(names), 0))
    among = np.einsum("afyx,bfyx,fyx->ab", slopes, slopes, 1 / (np.maximum(rate.astype(float), DARKEST) + read_variance))
    if dense:
        fisher = np.block([[likelihood.fisher_and_score(problem.start, problem)[0], across], [across.T, among]])
        return likelihood.depth_bounds(fisher + np.diag(known), problem, relative)
    matrix = bordered(local.select(local.information(problem.start, problem, rate, progress), problem), across, among)
    return local.depth_bounds(plus_diagonal(matrix, known), problem, relative)
