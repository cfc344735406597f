"""Atoms per column from scattering cross-sections: against a simulated library, and by a Gaussian mixture with ICL."""

from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp

SCATTERS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.45)  # of cross-sections, in what one atom more adds
ODD = 0.05  # share of columns that are none of the library's, such as single atoms on their way over a support


class Counts(NamedTuple):
    """Atom numbers by a library.

    Attributes
    ----------
    n : (C,) int
    probability : (C, n_max)
        Of every atom number 1 ... n_max.
    scale : float
        Factor from library to measured cross-sections.
    """

    n: np.ndarray
    probability: np.ndarray
    scale: float


class Mixture(NamedTuple):
    """Atom numbers by a Gaussian mixture of equal widths.

    Attributes
    ----------
    n : (C,) int
        Rank of each column's component, from 1.
    components : int
        Number of components with the smallest ICL.
    icl : (K,)
        Integrated classification likelihood criterion of 1 ... K components.
    means : (components,)
    width : float
    """

    n: np.ndarray
    components: int
    icl: np.ndarray
    means: np.ndarray
    width: float


def count_by_library(cross_section: np.ndarray, sd: np.ndarray, library: np.ndarray, scale_sd: float = 0.0) -> Counts:
    """Atom numbers of the library cross-sections (n_max,) nearest to the measured ones (C,), with probabilities.

    A common factor near one may be fitted (`scale_sd` > 0: its prior sd); the sd of the comparison is the measured sd, and at least
    the scatter that the columns show about their nearest library values.

    The factor maximises its posterior with atom numbers summed over and the columns' scatter fitted beside it. Numbers are
    weighted by the gap between library values, so that a smaller factor, whose values lie closer, has no advantage by that alone.
    """
    scale = 1.0
    if scale_sd:
        factors = np.exp(np.linspace(-3, 3, 121) * scale_sd)
        gap = np.log(np.gradient(library)) if len(library) > 1 else np.zeros(1)
        scale = max(factors, key=lambda s: max(_log_density(cross_section, sd, s, t, library, gap) for t in SCATTERS) - (np.log(s) / scale_sd) ** 2 / 2)
    distance = cross_section[:, None] - scale * library
    nearest = np.min(abs(distance), 1)
    scatter = 1.4826 * np.median(nearest / cross_section)
    total = np.hypot(sd, min(scatter, 0.05) * cross_section)
    log_p = -0.5 * (distance / total[:, None]) ** 2
    return Counts(np.argmin(abs(distance), 1) + 1, np.exp(log_p - logsumexp(log_p, axis=1, keepdims=True)), float(scale))


def _log_density(cross_section: np.ndarray, sd: np.ndarray, scale: float, scatter: float, library: np.ndarray, log_gap: np.ndarray) -> float:
    """Log-density of all cross-sections under scaled library values, blurred by errors and by a scatter in median gaps; some are odd."""
    total = np.hypot(sd, scatter * scale * np.exp(np.median(log_gap)))[:, None]
    each = np.log(scale) + log_gap - np.log(np.sqrt(2 * np.pi) * total) - 0.5 * ((cross_section[:, None] - scale * library) / total) ** 2
    return float(np.logaddexp(np.log(1 - ODD) + logsumexp(each, axis=1), np.log(ODD)).sum())


def gaussian_mixture_counts(cross_section: np.ndarray, max_components: int = 15, starts: int = 4, iterations: int = 200) -> Mixture:
    """Gaussian mixture with a shared width for 1 ... max_components components, the number chosen by ICL.

    ICL = -2 log L + (2 K) log C + 2 * classification entropy (Biernacki et al., IEEE PAMI 22, 719 (2000)); Van Aert et al.,
    Phys. Rev. B 87, 064107 (2013) for its use in counting. Several starts from quantiles and even spacing.
    """
    x = np.sort(np.asarray(cross_section, float))
    order = np.argsort(np.argsort(cross_section))
    found, icl = [], []
    rng = np.random.default_rng(0)
    for k in range(1, max(1, min(max_components, len(x))) + 1):
        fits = []
        for start in range(starts):
            means = np.quantile(x, (np.arange(k) + 0.5) / k) if start == 0 else np.linspace(x[0], x[-1], k + 2)[1:-1] if start == 1 else np.sort(rng.choice(x, k, replace=False))
            fits.append(_expectation_maximisation(x, means, iterations))
        loglik, means, _, width, responsibility = max(fits, key=lambda f: f[0])
        entropy = -(responsibility * np.log(np.maximum(responsibility, 1e-300))).sum()
        icl.append(-2 * loglik + 2 * k * np.log(len(x)) + 2 * entropy)
        found.append((k, means, width, responsibility.argmax(1) + 1))
    components, means, width, n = found[int(np.argmin(icl))]
    return Mixture(n[order], components, np.array(icl), means, float(width))


def _expectation_maximisation(x, means, iterations):
    k = len(means)
    width = max((x[-1] - x[0]) / (4 * k), 1e-3 * abs(x).max())
    floor = 2e-3 * abs(x).max()  # two equal values would otherwise pull the width to zero
    weights = np.full(k, 1 / k)
    previous = -np.inf
    for _ in range(iterations):
        log_p = np.log(weights) - 0.5 * ((x[:, None] - means) / width) ** 2 - np.log(width * np.sqrt(2 * np.pi))
        total = logsumexp(log_p, axis=1)
        responsibility = np.exp(log_p - total[:, None])
        loglik = total.sum()
        if loglik - previous < 0.01:  # criteria of different numbers of components differ by far more
            break
        previous = loglik
        share = responsibility.sum(0) + 1e-12
        means, weights = responsibility.T @ x / share, share / share.sum()
        width = max(np.sqrt((responsibility * (x[:, None] - means) ** 2).sum() / len(x)), floor)
    order = np.argsort(means)
    return loglik, means[order], weights[order], width, responsibility[:, order]
