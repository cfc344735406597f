"""Atoms per column from scattering cross-sections: by a simulated library, by a Gaussian mixture with ICL, and by the hybrid of both.

Hidden Markov models (De wael et al., Ultramicroscopy 219, 113131 (2020)) count in time series whose columns gain and lose atoms from image to image. A focal
series is of one structure: its images have their counts in common, which the joint likelihood takes them for, and there is no chain to follow.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp

SCATTERS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.45)  # of cross-sections, in what one atom more adds
FAR = 6.0  # standard deviations, beyond which a library's cross-section is none of a column's
SHRINK = 1.0  # columns that every atom number has beside those counted: mean shares, had all shares been equally likely before; half as many made counts too sure
BINS = 1000  # of a mixture's first fits, and of all of a hybrid's; more columns than these are taken together with their neighbours there
ODD = 0.05  # share of columns that are none of the library's, such as single atoms on their way over a support


class Components(NamedTuple):
    """A Gaussian mixture.

    Attributes
    ----------
    means : (K,)
        Ascending [Å^2].
    weights : (K,)
        Shares of the columns, sum 1.
    width : float
        Standard deviation common to all components [Å^2], beside that of Poisson's counts where a dose is given.
    dose : float
        Electrons per Å^2 that measured the cross-sections; infinite where the width is taken as common.
    log_likelihood : float
    """

    means: np.ndarray
    weights: np.ndarray
    width: float
    dose: float
    log_likelihood: float

    @property
    def widths(self) -> np.ndarray:
        """Standard deviation of each component (K,): a cross-section V counts V * dose electrons, whose variance is as large."""
        return np.sqrt(self.width**2 + np.maximum(self.means, 0) / self.dose)

    def density(self, x: np.ndarray) -> np.ndarray:
        """Density of each component, times its weight, at `x` (N,): (N, K) [1/Å^2]."""
        z = (np.asarray(x, float)[:, None] - self.means) / self.widths
        return self.weights / (np.sqrt(2 * np.pi) * self.widths) * np.exp(-0.5 * z**2)


class Counts(NamedTuple):
    """Atom numbers by a library.

    Attributes
    ----------
    n : (C,) int
    probability : (C, n_max)
        Of every atom number 1 ... n_max.
    scale : float
        Factor from library to measured cross-sections.
    components : Components, optional
        Of the hybrid: one for each atom number, at the likeliest factor, their weights the mean probabilities.
    """

    n: np.ndarray
    probability: np.ndarray
    scale: float
    components: Components | None = None


class Mixture(NamedTuple):
    """Atom numbers by a Gaussian mixture.

    Attributes
    ----------
    n : (C,) int
        Rank of each column's component, from 1, and the offset.
    icl : (K,)
        Integrated classification likelihood criterion of 1 ... K components.
    fits : tuple of Components
        With 1 ... K components.
    components : int
        Number of components chosen: with the smallest ICL, or an operator's choice where a file brings it.
    offset : int
        Atoms in a column of the first component, less one.
    """

    n: np.ndarray
    icl: np.ndarray
    fits: tuple[Components, ...]
    components: int
    offset: int = 0


def count_by_library(cross_section: np.ndarray, sd: np.ndarray, library: np.ndarray, scale_sd: float = 0.0) -> Counts:
    """Atom numbers of the library cross-sections (n_max,) nearest to the measured ones (C,), with probabilities.

    A common factor near one may be fitted (`scale_sd` > 0: its prior sd); the sd of the comparison is the measured sd, and at least
    the scatter that the columns show about their nearest library values.

    The factor maximises its posterior with atom numbers summed over and the columns' scatter fitted beside it. Numbers are
    weighted by the gap between library values, so that a smaller factor, whose values lie closer, has no advantage by that alone.
    """
    scale = 1.0
    if scale_sd:
        logs = np.linspace(-3, 3, 121) * scale_sd
        gap = np.log(np.gradient(library)) if len(library) > 1 else np.zeros(1)
        density = [max(_log_densities_of_scale(cross_section, sd, np.exp(log), library, gap)) - (log / scale_sd) ** 2 / 2 for log in logs]
        scale = np.exp(_top(logs, np.array(density)))
    distance = cross_section[:, None] - scale * library
    nearest = np.min(abs(distance), 1)
    scatter = 1.4826 * np.median(nearest / cross_section)
    total = np.hypot(sd, min(scatter, 0.05) * cross_section)
    log_p = -0.5 * (distance / total[:, None]) ** 2
    return Counts(np.argmin(abs(distance), 1) + 1, np.exp(log_p - logsumexp(log_p, axis=1, keepdims=True)), float(scale))


def _top(x: np.ndarray, y: np.ndarray) -> float:
    """Where the parabola through the highest of y at equidistant x and its neighbours is highest."""
    k = np.clip(np.argmax(y), 1, len(x) - 2)
    slope, curvature = (y[k + 1] - y[k - 1]) / 2, y[k + 1] - 2 * y[k] + y[k - 1]
    return float(x[k] + (x[1] - x[0]) * np.clip(-slope / curvature if curvature < 0 else np.sign(slope), -1, 1))


def _log_densities_of_scale(cross_section: np.ndarray, sd: np.ndarray, scale: float, library: np.ndarray, log_gap: np.ndarray) -> list[float]:
    """Log-density of all cross-sections under scaled library values, blurred by errors and, for each of `SCATTERS`, by so many median gaps; some are odd.

    Of an ascending library those values within `FAR` standard deviations of each column.
    """
    scatters = np.array(SCATTERS) * scale * np.exp(np.median(log_gap))
    reach = 1 + int(np.fmin(np.ceil(FAR * np.hypot(sd.max(), scatters.max()) / (scale * np.exp(log_gap.min()))), len(library)))
    first = np.clip(np.searchsorted(scale * library, cross_section) - reach, 0, max(len(library) - 2 * reach, 0))
    near = first[:, None] + np.arange(min(2 * reach, len(library)))
    distance, log_gap = cross_section[:, None] - scale * library[near], log_gap[near] + np.log(scale)
    found = []
    for scatter in scatters:
        total = np.hypot(sd, scatter)[:, None]
        each = log_gap - np.log(np.sqrt(2 * np.pi) * total) - 0.5 * (distance / total) ** 2
        highest = each.max(1)
        known = highest + np.log(np.exp(each - highest[:, None]).sum(1))
        found.append(float(np.logaddexp(np.log(1 - ODD) + known, np.log(ODD)).sum()))
    return found


def _log_density(x: np.ndarray, means: np.ndarray, weights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Log of weight times normal density at x (N,) for each component: (N, K)."""
    return np.log(weights) - np.log(np.sqrt(2 * np.pi) * widths) - 0.5 * ((x[:, None] - means) / widths) ** 2


def gaussian_mixture_counts(cross_section: np.ndarray, max_components: int = 15, dose: float = np.inf) -> Mixture:
    """Gaussian mixture of 1 ... max_components components, the number chosen by ICL.

    The components share one width; with a finite `dose` [e/Å^2] Poisson's variance, mean / dose, comes to each, as in
    StatSTEM's dose-dependent mixture.

    ICL = -2 log L + (2 K) log C + 2 * classification entropy (Biernacki et al., IEEE PAMI 22, 719 (2000)); Van Aert et al.,
    Phys. Rev. B 87, 064107 (2013) for its use in counting. Starts: quantiles, even spacing, columns drawn at random,
    and the fit with one component less, its widest gap filled or its heaviest component split.
    """
    x = np.asarray(cross_section, float)
    each, binned = _moments(x), _moments(x, BINS)
    rng = np.random.default_rng(0)
    fits: list[Components] = []
    for k in range(1, max(1, min(max_components, len(x))) + 1):
        starts = [np.quantile(x, (np.arange(k) + 0.5) / k), np.linspace(x.min(), x.max(), k + 2)[1:-1]]
        starts += [rng.choice(x, k, replace=False) for _ in range(2)]
        if fits:
            means, width, heaviest = fits[-1].means, fits[-1].width, np.argmax(fits[-1].weights)
            edges = np.concatenate([[x.min()], means, [x.max()]])
            widest = np.argmax(np.diff(edges))
            starts.append(np.append(means, edges[widest : widest + 2].mean()))
            starts.append(np.append(np.delete(means, heaviest), means[heaviest] + width * np.array([-1, 1])))
        rough = max((_expectation_maximisation(binned, _begin(x, means, dose), 0.1) for means in starts), key=lambda f: f.log_likelihood)
        fits.append(_expectation_maximisation(each, _expectation_maximisation(binned, rough, 1e-3), 1e-3))
    icl = np.array([integrated_classification_likelihood(x, fit) for fit in fits])
    components = int(np.argmin(icl)) + 1
    return Mixture(probabilities(x, fits[components - 1]).argmax(1) + 1, icl, tuple(fits), components)


def count_by_hybrid(cross_section: np.ndarray, library: np.ndarray, dose: float = np.inf, scale_sd: float = 0.05) -> Counts:
    """Atom numbers by a mixture whose means are the library's cross-sections (n_max,) times one factor near one, of prior sd `scale_sd`.

    Shares of the atom numbers and the width are fitted as in a mixture, so that no sd need be known; the library says which
    component is how many atoms, and keeps too many or too few from being fitted. De wael et al., Ultramicroscopy 177, 69 (2017).
    Probabilities are means over the factor's posterior, and the shares shrunk a little towards equal ones: at low dose the factor is
    hardly measured, and the likeliest one alone would be too sure of its counts.
    """
    x = np.asarray(cross_section, float)
    logs = np.linspace(-2.5, 2.5, 61) * scale_sd
    fits, binned = [_begin(x, library, dose)], _moments(x, BINS)
    for log in logs:  # each from the last one's shares and width
        fits.append(_expectation_maximisation(binned, fits[-1]._replace(means=np.exp(log) * library), 0.01, SHRINK))
    fits = fits[1:]
    log_p = np.array([fit.log_likelihood for fit in fits]) - 0.5 * (logs / scale_sd) ** 2
    weight = np.exp(log_p - logsumexp(log_p))
    probability = sum(w * probabilities(x, fit) for w, fit in zip(weight, fits, strict=True))
    best = int(np.argmax(weight))
    return Counts(probability.argmax(1) + 1, probability, float(np.exp(logs[best])), fits[best]._replace(weights=probability.mean(0)))


def probabilities(cross_section: np.ndarray, fit: Components) -> np.ndarray:
    """Probability (C, K) of each column to belong to each component."""
    log_p = _log_density(np.asarray(cross_section, float), fit.means, fit.weights, fit.widths)
    return np.exp(log_p - logsumexp(log_p, axis=1, keepdims=True))


def integrated_classification_likelihood(cross_section: np.ndarray, fit: Components) -> float:
    """-2 log L + (number of parameters) log C + 2 * classification entropy: K means, K - 1 shares and one width."""
    p = probabilities(cross_section, fit)
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum()
    return float(-2 * fit.log_likelihood + 2 * len(fit.means) * np.log(len(p)) + 2 * entropy)


def expected_confusion(n: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Expected number of columns (n_max, n_max) by counted (row) and true (column) number of atoms 1 ... n_max.

    As right as the probabilities (C, n_max) are. The share off the diagonal of a row is the chance that such a count is wrong.
    """
    counted = np.arange(1, probability.shape[1] + 1)[:, None] == np.asarray(n)
    return counted.astype(float) @ probability


def _begin(x: np.ndarray, means: np.ndarray, dose: float) -> Components:
    return Components(means, np.full(len(means), 1 / len(means)), np.ptp(x) / (4 * len(means)), dose, -np.inf)


def _moments(x: np.ndarray, bins: int | None = None) -> np.ndarray:
    """Number, sum and sum of squares (3, B) of the values x (N,) in each of so many bins of equal width, empty ones left out; of each value, where there are no more of them or no bins."""
    powers = np.stack([np.ones_like(x), x, x**2])
    if bins is None or len(x) <= bins:
        return powers
    of = np.minimum((x - x.min()) / max(np.ptp(x), 1e-30) * bins, bins - 1).astype(int)
    sums = np.stack([np.bincount(of, power, bins) for power in powers])
    return sums[:, sums[0] > 0]


def _expectation_maximisation(sums: np.ndarray, fit: Components, tolerance: float, shrink: float | None = None, iterations: int = 500) -> Components:
    """Components from starting ones and `_moments` of the values, those of a bin belonging to components as their mean does, until the log-likelihood grows by less than `tolerance`; with `shrink` the means stay, and each share is that of so many more columns.

    The common variance s of components of variance v_k = s + mean_k / dose takes Fisher's scoring step: the mean of each component's
    excess over Poisson's variance, weighted by (its columns) / v_k^2, which without a dose is the usual maximisation.
    """
    number, x = sums[0], sums[1] / sums[0]
    powers = np.stack([np.ones_like(x), x, x**2], 1)
    floor = 2e-3 * abs(x).max()  # two equal values would otherwise pull the width to zero
    fit = fit._replace(width=max(fit.width, floor), log_likelihood=-np.inf)
    for _ in range(iterations):
        means, variance = fit.means, fit.widths**2
        log_p = powers @ np.stack([np.log(fit.weights) - 0.5 * np.log(2 * np.pi * variance) - 0.5 * means**2 / variance, means / variance, -0.5 / variance])
        highest = log_p.max(1)
        p = np.exp(log_p - highest[:, None])
        total = p.sum(1)
        log_likelihood = float(number @ (highest + np.log(total)))
        settled = abs(log_likelihood - fit.log_likelihood) < tolerance
        fit = fit._replace(log_likelihood=log_likelihood)
        if settled:
            break
        share, first, second = (sums / total) @ p
        share = share + 1e-12
        if shrink is None:
            means = first / share
        trust = share / variance**2
        excess = (second - 2 * means * first) / share + means**2 - np.maximum(means, 0) / fit.dose
        width = np.sqrt(max(trust @ excess / trust.sum(), floor**2))
        weights = share + (shrink or 0.0)
        fit = fit._replace(means=means, weights=weights / weights.sum(), width=float(width))
    order = np.argsort(fit.means) if shrink is None else np.arange(len(fit.means))
    return fit._replace(means=fit.means[order], weights=fit.weights[order])
