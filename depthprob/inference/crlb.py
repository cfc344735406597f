"""The Cramér-Rao bound: how well any estimator could know the depths of a field, before anything is measured."""

from collections.abc import Mapping

import numpy as np

from ..errors import InputError
from ..physics.focal_series import Field, FocalSeries
from ..physics.library import ColumnLibrary
from .likelihood import depth_bounds, fisher_and_score, information_along, rates
from .problem import DARKEST, make_problem, parameter_names


def crlb(
    field: Field,
    library: ColumnLibrary,
    series: FocalSeries,
    nuisances: tuple[str, ...] = ("positions", "background", "gain", "image_shifts"),
    read_variance: float = 0.0,
    prior_sd: Mapping[str, float] | None = None,
    beside: Mapping[str, np.ndarray] | None = None,
) -> np.ndarray:
    """Cramér-Rao bound on the depth of each column (C,) [Å] in a field, all depths and the nuisances unknown; Alania et al. (2017), eqs. 8 to 10.

    Nuisances are those of the config's `free`; with "focus_offset", and no prior on it, the bounds are of depths relative to the field's mean. Memory grows with
    the square of the number of columns.

    Parameters
    ----------
    prior_sd : name -> sd, optional
        Of what is known beforehand, by the names of `PARAMETERS` and `beside`; no others count. Their precisions add to the Fisher information at the given
        values: van Trees' bound for normal priors over which that information hardly varies.
    beside : name -> (F, ny, nx), optional
        Derivatives of the expected counts by further unknowns, as `counts_by_focal_variance`, or differences of libraries.
    """
    prior_sd, beside = prior_sd or {}, beside or {}
    relative = "focus_offset" in nuisances and "focus_offset" not in prior_sd
    if relative and len(field.n_atoms) == 1:
        raise InputError("an isolated column's depth and a free focus offset cannot be told apart; leave 'focus_offset' out of the nuisances, or give it a prior_sd.")
    free = tuple(name for name in nuisances if name != "focus_offset" or not relative)
    problem = make_problem(np.zeros((len(series.defocus), *series.shape)), field, library, series, free, read_variance=read_variance)
    fisher = fisher_and_score(problem.start, problem)[0]
    if beside:
        slopes = np.stack([np.asarray(slope, float) for slope in beside.values()])
        weight = 1 / (np.maximum(rates(problem.start, problem).astype(float), DARKEST) + read_variance)
        across = information_along(problem.start, problem, slopes)
        fisher = np.block([[fisher, across], [across.T, np.einsum("afyx,bfyx,fyx->ab", slopes, slopes, weight)]])
    names = [name for name, _ in parameter_names(problem)] + list(beside)
    known = np.array([prior_sd.get(name, np.inf) for name in names]) ** -2.0
    return depth_bounds(fisher + np.diag(known), problem, relative)
