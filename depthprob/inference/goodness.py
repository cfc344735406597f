"""Goodness of fit: the residuals of a fit against what noise alone would leave, in all and near each column."""

from typing import NamedTuple

import equinox as eqx
import numpy as np

from .likelihood import Estimate, image_terms
from .problem import DARKEST, GLOBAL, PER_COLUMN, Problem, parameter_names, per_image, places


def leverages(estimate: Estimate, problem: Problem) -> np.ndarray:
    """What a fit takes off the expected deviance of each pixel (F, ny, nx), of a field with dense matrices; all together less than the number of parameters.

    J C J^T / (n + v), J the pixel's derivatives and C their covariance: with residuals r in standard deviations and H the matrix of these, the
    fitted rates move by H r, and E[(r - H r)^2 - r^2] = -2 H + H H^T, on the diagonal minus the leverage.
    """
    n_columns, n_foci = len(problem.n_atoms), len(problem.series.defocus)
    place = {item: k for k, item in enumerate(estimate.names)}
    columns = [(name, c) for name in PER_COLUMN for c in range(n_columns)]
    out = np.empty((n_foci, *problem.series.shape))
    for i in range(n_foci):
        terms = image_terms(estimate.parameters, problem, i)
        named = columns + [(name, i) for name in per_image(problem)] + [(name, 0) for name in GLOBAL]
        rows = [(row, place[item]) for row, item in enumerate(named) if item in place]
        chosen, at = np.array(rows).T
        moved = np.asarray(estimate.factor[at].T, np.float32) @ np.concatenate([np.asarray(t) for t in terms[:3]])[chosen]
        weight = (np.maximum(np.asarray(terms[3]), DARKEST) + float(problem.read_variance)) * float(problem.dispersion)
        out[i] = ((moved**2).sum(0) / weight).reshape(problem.series.shape)
    return out


class Dispersion(NamedTuple):
    """Variance of the counts over that of Poisson counts (and read noise), and the standard deviation of that estimate if the counts are Poisson's."""

    value: float | np.ndarray
    sd: float | np.ndarray


def dispersion_of(problem: Problem, rate: np.ndarray) -> Dispersion:
    """Dispersion from squared residuals to fitted expected counts `rate` (F, ny, nx).

    The weighted mean of 1 + ((N - n)^2 - N - v) / (n + v), whose mean is the dispersion and whose variance under Poisson noise is 2 + v / (n + v)^2.
    Subtracting N rather than its expectation keeps out, to first order, rates that are wrong: in the vacuum around a particle they may be twice
    what is counted, which would pass for half the variance. Weights n / (2 n + 1), without read noise, let dark pixels count for little. The P
    fitted parameters take away one degree of freedom each, where the signal is. Dean, J. Am. Stat. Assoc. 87, 451 (1992).
    """
    return _dispersion(*(sums.sum() for sums in _dispersion_sums(problem, rate)), len(parameter_names(problem)), np.sum(rate * np.asarray(problem.mask), dtype=float))


def image_dispersions(problem: Problem, rate: np.ndarray) -> Dispersion:
    """`dispersion_of` each image (F,), the fitted parameters shared out evenly; zero where no pixel is used."""
    used = np.asarray(problem.mask)
    return _dispersion(*_dispersion_sums(problem, rate), len(parameter_names(problem)) / len(used), np.sum(rate * used, axis=(1, 2), dtype=float))


def _dispersion(total, weights, squares, bright, fitted: float, signal) -> Dispersion:
    some = lambda amount: np.maximum(amount, DARKEST)
    return Dispersion(total / some(weights - fitted * bright / some(signal)), squares**0.5 / some(weights))


def _dispersion_sums(problem: Problem, rate: np.ndarray) -> np.ndarray:
    """Of each image (4, F): weighted squared residuals, weights, variance of the former under Poisson noise, and weighted signal."""
    variance, sums = float(problem.read_variance), []
    for counts, own, seen in zip(problem.counts, rate, np.asarray(problem.mask), strict=True):
        own = np.maximum(np.asarray(own, float), DARKEST)
        counts, level = np.asarray(counts, float), own + variance
        weight = np.where(seen, 1 / (2 + own / level**2), 0.0)
        excess = 1 + ((counts - own) ** 2 - counts - variance) / level
        sums.append([(weight * excess).sum(), weight.sum(), (weight**2 * (2 + variance / level**2)).sum(), (weight * own).sum()])
    return np.array(sums).T


def over_dispersed(problem: Problem, rate: np.ndarray) -> Problem:
    """The problem with its dispersion inferred from a fit's expected counts, and never below one: electrons are counted."""
    return eqx.tree_at(lambda p: p.dispersion, problem, max(1.0, dispersion_of(problem, rate).value))


def goodness_of_fit(parameters: dict, problem: Problem, rate: np.ndarray, leverage: np.ndarray | None = None, radius: float = 1.2) -> np.ndarray:
    """Misfit near each column to expected counts `rate` (F, ny, nx), standardised by its own null mean and variance (C,): about N(0, 1).

    Poisson deviance; counts are far below one in many pixels, so mean and variance of each pixel's deviance are sums over the Poisson
    distribution of its rate rather than those of chi-square. With read noise or dispersion Pearson's statistic, whose moments are exact; of
    over-dispersed counts those of a number of pulses, each of as many electrons as the dispersion. A fit follows its noise: without the
    `leverage` (F, ny, nx) of its pixels what is left looks too good, by about 0.1.
    """
    pulse = float(problem.dispersion)
    variance = float(problem.read_variance) / pulse
    (ny, nx), px = problem.series.shape, problem.series.pixel_size
    total, spread = np.zeros(len(problem.n_atoms)), np.zeros(len(problem.n_atoms))
    half = int(np.ceil(radius / px)) + 1
    near = np.arange(-half, half + 1)
    null = None if variance or pulse != 1 else null_table(float(rate.max()))
    in_images = places(parameters, problem.series)
    for i in range(len(rate)):
        own = np.maximum(np.asarray(rate[i], float), DARKEST) / pulse
        counts, used = np.asarray(problem.counts[i], float) / pulse, np.asarray(problem.mask[i])
        excess, var = _pearson(counts, own, variance) if null is None else _deviance(counts, own, null)
        excess = excess if leverage is None else excess + leverage[i]
        at = in_images[i]
        nearest = np.round(at / px).astype(int)
        x, y = nearest[:, :1] + near, nearest[:, 1:] + near
        inside = ((x * px - at[:, :1])[:, None] ** 2 + (y * px - at[:, 1:])[:, :, None] ** 2) < radius**2
        if not problem.series.periodic:
            inside &= ((x >= 0) & (x < nx))[:, None] & ((y >= 0) & (y < ny))[:, :, None]
        pick = (np.mod(y, ny)[:, :, None], np.mod(x, nx)[:, None])
        inside &= used[pick]
        total += np.where(inside, excess[pick], 0).sum((1, 2))
        spread += np.where(inside, var[pick], 0).sum((1, 2))
    return np.divide(total, np.sqrt(spread), out=np.full(len(total), np.nan), where=spread > 0)


def _deviance(counts: np.ndarray, rate: np.ndarray, null: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Poisson deviance of each pixel minus its mean, and its variance; `null` as `null_table` makes it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        deviance = 2 * (np.where(counts > 0, counts * np.log(counts / rate), 0.0) - counts + rate)
    return deviance - np.interp(np.log(rate), null[0], null[1]), np.interp(np.log(rate), null[0], null[2])


def null_table(largest: float) -> np.ndarray:
    """Logarithm of rates up to the largest, and mean and variance of the deviance at each (3, m)."""
    grid = np.geomspace(DARKEST, max(largest, 1.0) * 1.01, 200)
    return np.array([(np.log(r), *_null_deviance(r)) for r in grid]).T


def _pearson(counts: np.ndarray, rate: np.ndarray, read_variance: float) -> tuple[np.ndarray, np.ndarray]:
    """(N - n)^2 / (n + v) of each pixel minus its mean of one, and its variance 2 + n / (n + v)^2, for Poisson counts plus normal noise."""
    total = rate + read_variance
    return (counts - rate) ** 2 / total - 1, 2 + rate / total**2


def _null_deviance(rate: float) -> tuple[float, float]:
    """Mean and variance of 2 (N log(N / rate) - N + rate) for N ~ Poisson(rate)."""
    from scipy.stats import poisson

    n = np.arange(int(rate + 12 * np.sqrt(rate) + 20))
    p = poisson.pmf(n, rate)
    d = 2 * (np.where(n > 0, n * np.log(np.maximum(n, 1) / rate), 0.0) - n + rate)
    mean = (p * d).sum()
    return mean, (p * (d - mean) ** 2).sum()
