"""What residuals ask of settings that a fit has held: score tests, with the depths' error that a wrong setting makes."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..physics.focal_series import renderer
from ..physics.library import ColumnLibrary
from . import likelihood, local
from .arrow import ArrowFactor
from .likelihood import DARKEST, Estimate, Problem, from_vector, log_likelihood, prior_slope, to_vector

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
    and A = J^T W e in common with theta. One step of scoring in both moves h by (e^T W r - A^T C g) / (e^T W e - A^T C A), r the residuals, C the
    covariance of theta and g its slope of the log-posterior, zero but for where the fit was ended; and theta by -C A times that.
    One evaluation and one gradient a setting; sums in float64 under x64.

    Parameters
    ----------
    libraries : name -> (library, step)
        The library with that setting moved by a small step; derivatives are differences.
    """
    fit = local if isinstance(estimate.factor, ArrowFactor) else likelihood
    rate = fit.rates(estimate.parameters, problem).astype(float)
    out = {}
    for name, step in STEPS.items():
        if name not in problem.free:
            there, back = (fit.rates(estimate.parameters | {name: estimate.parameters[name] + s}, problem) for s in (step, -step))
            out[name] = _test(estimate, problem, rate, (there.astype(float) - back) / (2 * step))
    for name, (library, step) in libraries.items():
        draw = None if problem.draw is None else renderer(library, problem.series)
        moved = fit.rates(estimate.parameters, dataclasses.replace(problem, library=library, draw=draw))
        out[name] = _test(estimate, problem, rate, (moved - rate) / step)
    return out


def _test(estimate: Estimate, problem: Problem, rate: np.ndarray, slope: np.ndarray) -> Asked:
    weight = np.where(problem.mask, 1 / (np.maximum(rate, DARKEST) + float(problem.read_variance)), 0.0) / float(problem.dispersion)
    own = _score(estimate, problem, np.asarray(problem.counts)) + np.asarray(prior_slope(to_vector(estimate.parameters, problem), problem))
    # the score of counts that exceed the expected by `slope`, in units that keep single precision good, is J^T W e
    unit = float(np.abs(slope).max()) / float(rate.max()) or 1.0
    common = unit * (_score(estimate, problem, rate + slope / unit) - _score(estimate, problem, rate))
    solved = estimate.factor.solve(common) if isinstance(estimate.factor, ArrowFactor) else estimate.factor @ (estimate.factor.T @ common)
    information = float((slope**2 * weight).sum() - common @ solved)
    if information <= 1e-9 * float((slope**2 * weight).sum()):  # the fitted parameters do all that the setting does
        return Asked(0.0, np.inf, np.zeros(len(problem.n_atoms)))
    change = (float((slope * weight * (np.asarray(problem.counts, float) - rate)).sum()) - own @ solved) / information
    return Asked(change, information**-0.5, -change * solved[: len(problem.n_atoms)])


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
