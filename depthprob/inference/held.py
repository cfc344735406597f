"""What residuals ask of settings that a fit has held: score tests, with the depths' error that a wrong setting makes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..physics.focal_series import renderer
from ..physics.library import ColumnLibrary
from . import likelihood, local
from .arrow import ArrowFactor
from .likelihood import DARKEST, Estimate, Problem, from_vector, log_likelihood, to_vector

STEPS = {"focus_step": 0.01, "source_variance": 0.005}  # 1, Å^2; of the differences that stand for derivatives


class Asked(NamedTuple):
    """What the residuals ask of one setting.

    Attributes
    ----------
    change : float
        Of the setting, by one step of scoring; its error bar is `sd` where the setting is right.
    sd : float
    depth_moves : (C,)
        How far the depths [Å] would follow that change.
    """

    change: float
    sd: float
    depth_moves: np.ndarray

    @property
    def significance(self) -> float:
        """The score statistic: standard normal where the setting is right (Rao, Proc. Camb. Phil. Soc. 44, 50 (1948))."""
        return self.change / self.sd


def asked(estimate: Estimate, problem: Problem, libraries: Mapping[str, tuple[ColumnLibrary, float]]) -> dict[str, Asked]:
    """Score tests of every held setting: focus_step, source_variance [Å^2] if not free, and those that `libraries` were built for.

    A setting h beside the fitted parameters theta has the derivative e of the expected counts n by it, the information e^T W e with W = 1 / (n + v),
    and A = J^T W e in common with theta. One step of scoring in both moves h by (e - J C A)^T W r / (e^T W e - A^T C A), r the residuals and C the inverse
    Fisher information of theta, and theta by -C A times that. Priors are left out: the background's alone, where there is none, would ask for focus steps
    four standard deviations smaller. One evaluation and two gradients a setting; sums in float64 under x64.

    Parameters
    ----------
    libraries : name -> (library, step)
        The library with that setting moved by a small step; derivatives are differences.
    """
    large = isinstance(estimate.factor, ArrowFactor)
    fit = local if large else likelihood
    solve = local.factor_of(estimate.information, problem).solve if large else likelihood.covariance_of(estimate.information, problem).__matmul__
    rate = fit.rates(estimate.parameters, problem).astype(float)
    slopes = {}
    for name, step in STEPS.items():
        if name not in problem.free:
            there, back = (fit.rates(estimate.parameters | {name: estimate.parameters[name] + s}, problem) for s in (step, -step))
            slopes[name] = (there.astype(float) - back) / (2 * step)
    for name, (library, step) in libraries.items():
        draw = None if problem.draw is None else renderer(library, problem.series)
        slopes[name] = (fit.rates(estimate.parameters, dataclasses.replace(problem, library=library, draw=draw)) - rate) / step

    counts = np.asarray(problem.counts, float)
    weight = np.where(problem.mask, 1 / (np.maximum(rate, DARKEST) + float(problem.read_variance)), 0.0) / float(problem.dispersion)
    none, own = (_score(estimate, problem, c) for c in (rate, counts))
    fitted = solve(own)
    tests = {name: _test(slope, weight, counts - rate, lambda c: _score(estimate, problem, rate + c) - none, solve, fitted) for name, slope in slopes.items()}
    return {name: test._replace(depth_moves=test.depth_moves[: len(problem.n_atoms)]) for name, test in tests.items()}


def _test(slope: np.ndarray, weight: np.ndarray, residual: np.ndarray, score: Callable, solve: Callable, fitted: np.ndarray) -> Asked:
    """One setting's test; `score` is J^T W, `fitted` is C J^T W r."""
    unit = float(np.abs(slope).max() * weight[weight > 0].min()) or 1.0  # single precision is good for changes as large as the counts
    common = unit * score(slope / unit)
    solved = solve(common)
    own = float((slope**2 * weight).sum())
    information = own - float(common @ solved)
    if information <= 1e-9 * own:  # the fitted parameters do all that the setting does
        return Asked(0.0, np.inf, np.zeros_like(solved))
    change = (float((slope * weight * residual).sum()) - float(common @ fitted)) / information
    return Asked(change, information**-0.5, -change * solved)


def _score(estimate: Estimate, problem: Problem, counts: np.ndarray) -> np.ndarray:
    """Derivative of the log-likelihood of these counts by the free parameters (P,)."""
    problem = eqx.tree_at(lambda p: p.counts, problem, jnp.asarray(counts, jnp.float32))
    if isinstance(estimate.factor, ArrowFactor):
        score = local.evaluate(estimate.parameters, problem).score
        return np.concatenate([np.ravel(score[name]) for name in problem.free])
    return np.asarray(_slope(jnp.asarray(to_vector(estimate.parameters, problem)), problem), float)


@jax.jit
def _slope(vector: jax.Array, problem: Problem) -> jax.Array:
    return jax.grad(lambda v: log_likelihood(from_vector(v, problem), problem))(vector)
