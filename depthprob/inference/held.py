"""What residuals ask of settings that a fit has held: score tests, with the depths' error that a wrong setting makes."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ..physics.focal_series import counts_per_fraction, renderer, smooth_functions
from ..physics.library import ColumnLibrary
from . import likelihood, local
from .arrow import ArrowFactor
from .likelihood import Estimate
from .problem import DARKEST, SMOOTH, Problem

POWERS = (1, 2, 3)  # of the number of atoms, by which wrong counts brighten columns
ROUNDING = 1e-6  # of a setting's information, below which what the fitted parameters leave of it is rounding: float32 images leave 2e-8, of either sign
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
    explained : float
        Share of the misfit (Pearson's, beyond three standard deviations of what noise makes) that goes with that change; one where there is no more misfit.
    """

    change: float
    sd: float
    depth_moves: np.ndarray
    explained: float = 1.0

    @property
    def significance(self) -> float:
        """The score statistic: standard normal where the setting is right (Rao, Proc. Camb. Phil. Soc. 44, 50 (1948))."""
        return self.change / self.sd


def asked(estimate: Estimate, problem: Problem, libraries: Mapping[str, tuple[ColumnLibrary, float]]) -> dict[str, Asked]:
    """Score tests of every held setting: focus_step, source_variance [Å^2] if not free, those that `libraries` were built for, and "background" where it is constant and seen.

    A setting h beside the fitted parameters theta has the derivative e of the expected counts n by it, the information e^T W e with W = 1 / (n + v),
    and A = J^T W e in common with theta. One step of scoring in both moves h by (e - J C A)^T W r / (e^T W e - A^T C A), r the residuals and C the inverse
    Fisher information of theta, and theta by -C A times that. Priors are left out: the background's alone, where there is none, would ask for focus steps
    four standard deviations smaller. Sums in float64.

    What is asked of a constant background is how it varies over the field, the same in all images: the relative standard deviation of the `smooth_functions` that residuals
    ask for together, and for its significance the square root of their chi-square: of five, 2.1 +- 0.7 where it is constant.

    Counts of atoms may be wrong where a setting is, and take up its brightness: a cubic in the number of atoms, by which columns are brighter than their counts, is
    taken out of every test as well. (Without it B told as 0.3 Å^2 where 0.63 is right asks for 0.37, for 12 of 28 columns have an atom too many, with it for 0.54.)

    Parameters
    ----------
    libraries : name -> (library, step)
        The library with that setting moved by a small step; derivatives are differences.
    """
    large = isinstance(estimate.factor, ArrowFactor)
    fit = local if large else likelihood
    solve = local.factor_of(estimate.information, problem).solve if large else likelihood.covariance_of(estimate.information, problem).__matmul__
    rate = fit.rates(estimate.parameters, problem)
    slopes = {}  # float32, as the rates: those of thousands of columns fill memory
    for name, step in STEPS.items():
        if name not in problem.free:
            there, back = (fit.rates(estimate.parameters | {name: estimate.parameters[name] + s}, problem) for s in (step, -step))
            slopes[name] = (there - back) / np.float32(2 * step)
    for name, (library, step) in libraries.items():
        draw = None if problem.draw is None else renderer(library, problem.series)
        slopes[name] = (fit.rates(estimate.parameters, dataclasses.replace(problem, library=library, draw=draw)) - rate) / np.float32(step)

    settings = list(slopes)
    uneven = [] if SMOOTH[0] in problem.free else list(SMOOTH)
    if uneven:
        dark = np.asarray(counts_per_fraction(problem.series) * np.exp(estimate.parameters["log_background"])[:, None, None], np.float32)
        slopes |= {name: dark * shape for name, shape in zip(uneven, smooth_functions(problem.series.shape), strict=True)}
    atoms = np.arange(1, problem.library.n_max + 1)[:, None, None] / problem.library.n_max
    for power in POWERS:
        brighter = dataclasses.replace(problem.library, coefficients=problem.library.coefficients * (1 + 0.01 * atoms**power))
        slopes[f"brightness {power}"] = (fit.rates(estimate.parameters, dataclasses.replace(problem, library=brighter)) - rate) / np.float32(0.01)

    residual = np.asarray(problem.counts) - rate
    weight = np.where(problem.mask, 1 / (np.maximum(rate.astype(float), DARKEST) + float(problem.read_variance)), 0.0) / float(problem.dispersion)
    misfit = (weight * np.square(residual, dtype=float)).sum() - problem.mask.sum()
    misfit -= 3 * float(np.where(problem.mask, 2 + rate * weight**2, 0.0).sum()) ** 0.5
    own, *common = fit.information_along(estimate.parameters, problem, np.stack([residual, *slopes.values()])).T
    solved = np.stack([solve(a) for a in common], 1)
    alone, score = np.zeros((len(slopes),) * 2), -solved.T @ own
    for image, (w, r) in enumerate(zip(weight, residual, strict=True)):
        rows = np.stack([slope[image].ravel() for slope in slopes.values()]).astype(float)
        alone += (rows * w.ravel()) @ rows.T
        score += rows @ (w * r).ravel()
    information = alone - np.array(common) @ solved
    many = len(settings) + len(uneven)
    taken = np.linalg.pinv(information[many:, many:], 1e-9, hermitian=True) @ information[many:]
    score, information, solved = score - taken.T @ score[many:], information - information[:, many:] @ taken, solved - solved[:, many:] @ taken
    out = {}
    for i, name in enumerate(settings):
        if information[i, i] <= ROUNDING * alone[i, i]:  # the fitted parameters do all that the setting does
            out[name] = Asked(0.0, np.inf, np.zeros(len(problem.n_atoms)))
        else:
            change = float(score[i] / information[i, i])
            out[name] = Asked(change, float(information[i, i] ** -0.5), -change * solved[: len(problem.n_atoms), i], float(min(1.0, change * score[i] / max(misfit, 1e-9))))
    if uneven:
        own = slice(len(settings), many)
        shares = np.linalg.pinv(information[own, own], 1e-9, hermitian=True) @ score[own]
        square = float(shares @ score[own])
        varies = float(np.tensordot(shares, smooth_functions(problem.series.shape), 1).std())
        if square > 0:
            out["background"] = Asked(varies, varies / square**0.5, -solved[: len(problem.n_atoms), own] @ shares, float(min(1.0, square / max(misfit, 1e-9))))
    return out
