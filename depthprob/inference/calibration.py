"""Are error bars true? Simulation-based calibration: truths drawn from the prior, series simulated, fitted, and each truth ranked among its posterior's draws."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import kstest, ttest_1samp

from ..physics.focal_series import expected_counts
from .posterior import infer
from .problem import MEAN_SD, Problem, field_of, from_vector, to_vector


class Calibration(NamedTuple):
    """Ranks of true parameters among posterior draws.

    Attributes
    ----------
    ranks : dict of (fit, size) int
        Number of draws below the truth, for every free parameter.
    draws : int
        Of each posterior; ranks run from zero to it.
    places : dict of (fit, size) float
        (rank + v) / (draws + 1) with v uniform: uniform on (0, 1), exactly, where the posterior is right.
    failed : int
        Fits that did not converge; their ranks are kept.
    """

    ranks: dict
    draws: int
    places: dict
    failed: int

    def coverage(self, name: str, level: float) -> tuple[float, float]:
        """Share of truths within their central interval of this level, and its standard error from the scatter between fits."""
        share = (abs(self.places[name] - 0.5) < level / 2).mean(1)
        return float(share.mean()), float(share.std(ddof=1) / np.sqrt(len(share)))


def draw_truth(key: jax.Array, problem: Problem) -> dict:
    """Parameters drawn from the problem's prior, image shifts with mean zero.

    Raises
    ------
    ValueError
        If background is free with its Gamma prior, which is improper.
    """
    truth = dict(problem.start)
    for name in problem.free:
        if name not in problem.prior_sd:
            raise ValueError(f"The prior of {name} is improper and cannot be drawn from. Give make_problem a prior_sd for it.")
        key, own = jax.random.split(key)
        truth[name] = problem.centre[name] + problem.prior_sd[name] * jax.random.normal(own, problem.start[name].shape)
        if name in MEAN_SD:
            truth[name] -= jnp.mean(truth[name])
    return truth


def calibrate(
    problem: Problem,
    method: str,
    key: jax.Array,
    fits: int = 100,
    draws: int = 99,
    thin: int = 2,
    overdispersion: float = 1.0,
    mistake: Callable[[Problem], Problem] = lambda problem: problem,
    progress: Callable = lambda items, **_: items,
) -> Calibration:
    """Rank truths of so many simulated series among draws of their posteriors; Talts et al., arXiv:1804.06788.

    Parameters
    ----------
    problem : Problem
        Start, priors, series and what is free; its counts are replaced. Its priors should be such that every truth is a series worth fitting.
    thin : int
        NUTS makes so many draws for each that is ranked against, since neighbours in a chain are alike.
    overdispersion : float
        Variance of the simulated counts over their mean: counts are that times a Poisson number.
    mistake : function
        What the analysis gets wrong: applied to the problem with its simulated counts.
    """
    expected = jax.jit(lambda truth: expected_counts(field_of(truth, problem.n_atoms), problem.library, problem.series, problem.draw))
    thin = thin if method == "nuts" else 1
    ranks, failed = {name: [] for name in problem.free}, 0
    for own in progress(jax.random.split(key, fits), desc=method, unit="fit"):
        to_truth, to_counts, to_read, to_fit = jax.random.split(own, 4)
        truth = draw_truth(to_truth, problem)
        counts = overdispersion * jax.random.poisson(to_counts, jnp.maximum(expected(truth), 0.0) / overdispersion)
        counts = counts + jnp.sqrt(problem.read_variance) * jax.random.normal(to_read, counts.shape)
        posed = mistake(eqx.tree_at(lambda p: p.counts, problem, counts.astype(problem.counts.dtype)))
        result = infer(posed, method, to_fit, draws * thin, 1, progress_bar=False)
        failed += int(not result.diagnostics["converged"])
        below = (result.draws[0, ::thin] < to_vector(truth, problem)).sum(0)
        for name, values in from_vector(below, problem).items():
            if name in ranks:
                ranks[name].append(np.atleast_1d(values))
    ranks = {name: np.array(rows) for name, rows in ranks.items()}
    rng = np.random.default_rng(0)
    places = {name: (r + rng.uniform(size=r.shape)) / (draws + 1) for name, r in ranks.items()}
    return Calibration(ranks, draws, places, failed)


def uniformity(places: np.ndarray) -> float:
    """Probability of places (fit, size) so far from uniform if posteriors were right; below alpha in at most a share alpha of right models.

    The least of three, times three (Bonferroni): t-tests over fits, which owe nothing to each other, of the fit's mean place against the middle
    (bias) and of its mean distance from the middle, in halves, against a half (intervals too narrow or too wide); and Kolmogorov and
    Smirnov's test of every parameter over fits, itself the least times their number.
    """
    shape = min(kstest(column, "uniform").pvalue for column in places.T) * places.shape[1]
    bias = ttest_1samp(places.mean(1), 0.5).pvalue
    width = ttest_1samp(abs(2 * places - 1).mean(1), 0.5).pvalue
    return float(min(1.0, 3 * min(bias, width, shape)))
