"""Posterior over the full stack: Laplace, the best normal and NUTS, preconditioned by the Fisher matrix, into ArviZ groups.

Sampled in whitened coordinates z, theta = mode + L z with L L^T the Laplace covariance, the posterior is close to a
standard normal whatever the units and correlations, and chains mix from the first draw.
"""

import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from scipy.special import gammaln
from tqdm import tqdm

from ..errors import InputError
from ..physics.focal_series import expected_counts
from ..storage import HDF5_OVERHEAD, atomic_write
from . import density, local
from .arrow import ArrowFactor
from .likelihood import Estimate, image_log_likelihoods, maximum
from .problem import AFFINE, GLOBAL, LARGE, PER_COLUMN, SMOOTH, Problem, field_of, from_vector, to_vector
from .sampling import WARMUP, Whitened, best_normal, nuts


class Posterior(NamedTuple):
    """What is known of the parameters.

    Attributes
    ----------
    estimate : Estimate
        The mode, with its Laplace covariance.
    draws : (chain, draw, P) float64 or None
        Free parameters in the order of `estimate.names`; for Laplace, draws of the normal; None for the mode alone.
    statistics : dict of (chain, draw) arrays
        NUTS: diverging, acceptance_rate, n_steps, energy.
    diagnostics : dict
        method, seconds, converged; NUTS: chains, samples, divergences, r_hat_max, ess_min; SVI: iterations and the last change.
    """

    estimate: Estimate
    draws: np.ndarray | None
    statistics: dict
    diagnostics: dict

    def of(self, name: str) -> np.ndarray:
        """Draws of one parameter (chain, draw, size)."""
        chosen = [i for i, (n, _) in enumerate(self.estimate.names) if n == name]
        return self.draws[..., chosen]


def infer(
    problem: Problem,
    method: str = "laplace",
    key: jax.Array | None = None,
    samples: int = 500,
    chains: int = 2,
    warmup: int = WARMUP,
    estimate: Estimate | None = None,
    progress_bar: bool = True,
    checkpoint: Path | None = None,
) -> Posterior:
    """Posterior of all free parameters.

    Parameters
    ----------
    method : {"mle", "laplace", "svi", "nuts"}
        The mode alone; the normal at the mode with the inverse of Fisher plus prior as covariance; the best normal in the sense of
        the evidence bound, started there; or the No-U-Turn sampler. At 1000 e/Å^2 an image Laplace's error bars are 2 % too small, its intervals of 50, 80 and
        95 % cover 0.49, 0.79 and 0.946 (9600 columns).
    key : PRNG key
        Randomness of draws.
    warmup : int
        Draws of each chain in which NUTS finds its step.
    checkpoint : path, optional
        Where NUTS keeps its state, and goes on from after an interruption (`sampling.nuts`).
    """
    start = time.perf_counter()
    key = jax.random.key(0) if key is None else key
    estimate = maximum(problem) if estimate is None else estimate
    mode, factor = to_vector(estimate.parameters, problem), estimate.factor
    large = isinstance(factor, ArrowFactor)
    if method == "svi" and large:
        raise InputError(f"method 'svi' fits fields of up to {LARGE} columns; this one has {len(problem.n_atoms)} and is drawn through windows. Take method = \"laplace\" or \"nuts\", or crop the stack.")
    draws, statistics, extra = None, {}, {}
    progress = partial(tqdm, disable=not progress_bar)
    if method == "laplace" and large:
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        draws = mode + factor.draw(rng, chains * samples).reshape(chains, samples, -1)
    elif method == "laplace":
        z = np.asarray(jax.random.normal(key, (chains, samples, len(mode))), float)
        draws = mode + z @ factor.T
    elif method == "nuts" and large:
        with jax.enable_x64(True):
            target = Whitened(density.windowed(estimate.parameters, problem), jnp.asarray(mode), factor.scale(), density.log_posterior)
            z, statistics, extra = nuts(target, key, samples, chains, warmup, checkpoint, progress, block=1)
        draws = mode + factor.coloured(z.reshape(-1, len(mode))).reshape(z.shape)
    elif method in ("nuts", "svi"):
        target = Whitened(problem, jnp.asarray(mode), jnp.asarray(factor))
        if method == "nuts":
            z, statistics, extra = nuts(target, key, samples, chains, warmup, checkpoint, progress)
        else:
            key_fit, key_draw = jax.random.split(key)
            mean, shape, extra = best_normal(target, key_fit, progress=progress)
            z = mean + np.asarray(jax.random.normal(key_draw, (chains, samples, len(mode))), float) @ shape.T
            extra["converged"] = estimate.converged and extra.pop("svi_converged")
        draws = mode + z @ factor.T
    seconds = round(time.perf_counter() - start, 1)
    return Posterior(estimate, draws, statistics, {"method": method, "seconds": seconds, "iterations": estimate.iterations, "converged": estimate.converged} | extra)


LOOKED = 100  # draws whose images are made
UNITS = {"depth": "angstrom", "x": "angstrom", "y": "angstrom", "gain": "1", "background": "fraction of the beam", "shift_x": "angstrom", "shift_y": "angstrom", "focus_offset": "angstrom", "focus_step": "1", "source_variance": "angstrom^2"} | dict.fromkeys((*SMOOTH, *AFFINE), "1")


def to_arviz(posterior: Posterior, problem: Problem, relative: bool = False):
    """ArviZ groups with named dims and units: whatever the installed ArviZ uses (InferenceData, or DataTree since 1.0).

    posterior (draws of every free parameter; gain and background as themselves), sample_stats, posterior_predictive (mean counts of
    each image over draws, for at most 100 of them), log_likelihood (of each image, for every draw of NUTS, or for 100 of a normal's, with which `az.loo` wants reff=1), of a
    large field after NUTS alone, else counts at the mode;
    observed_data (mean counts of each image), constant_data. With `relative` each draw's depths have mean zero.
    """
    draws = posterior.draws if posterior.draws is not None else to_vector(posterior.estimate.parameters, problem)[None, None]
    names = posterior.estimate.names
    groups, variables = {}, {}
    for name in dict.fromkeys(n for n, _ in names):
        values = draws[..., [i for i, (n, _) in enumerate(names) if n == name]]
        dim = "column" if name in PER_COLUMN else "image"
        if name in GLOBAL:
            variables[name] = (("chain", "draw"), values[..., 0], {"units": UNITS[name]})
            continue
        if name.startswith("log_"):
            name, values = name[4:], np.exp(values)
        if name == "depth" and relative:
            values = values - values.mean(-1, keepdims=True)
        variables[name] = (("chain", "draw", dim), values, {"units": UNITS[name]})
    coords = {
        "chain": np.arange(draws.shape[0]),
        "draw": np.arange(draws.shape[1]),
        "column": np.arange(len(problem.n_atoms)),
        "image": np.arange(len(problem.series.defocus)),
    }
    groups["posterior"] = xr.Dataset(variables, coords)
    if posterior.statistics:
        groups["sample_stats"] = xr.Dataset({k: (("chain", "draw"), v) for k, v in posterior.statistics.items()}, {k: coords[k] for k in ("chain", "draw")})
    flat = draws.reshape(-1, draws.shape[-1])
    picked = np.linspace(0, len(flat) - 1, min(LOOKED, len(flat))).astype(int)
    chosen = flat[picked]
    each = None
    if problem.draw is not None:
        if not posterior.statistics:  # independent draws, each as good as any
            coords["draw"] = np.linspace(0, draws.shape[1] - 1, min(draws.shape[1], max(1, LOOKED // draws.shape[0]))).astype(int)
        mean, each = np.asarray(_mean_counts(jnp.asarray(chosen), problem), float), _log_likelihoods(jnp.asarray(draws[:, coords["draw"]].reshape(-1, draws.shape[-1])), problem)
    elif posterior.statistics:
        with jax.enable_x64(True):
            each, mean = _images_of_large(jnp.asarray(flat), density.windowed(posterior.estimate.parameters, problem))
        mean = np.asarray(mean)[picked]
    else:
        mean = np.tile(local.rates(posterior.estimate.parameters, problem).mean((1, 2), dtype=float), (len(chosen), 1))
    if each is not None:
        values = (np.asarray(each) - _count_terms(problem)).reshape(draws.shape[0], len(coords["draw"]), -1)
        groups["log_likelihood"] = xr.Dataset({"mean_counts": (("chain", "draw", "image"), values)}, {k: coords[k] for k in ("chain", "draw", "image")})
    n_pixels = np.prod(problem.series.shape)
    rng, pulse = np.random.default_rng(0), float(problem.dispersion)
    predicted = pulse * rng.poisson(mean * n_pixels / pulse) / n_pixels + rng.normal(0, np.sqrt(pulse * float(problem.read_variance) / n_pixels), mean.shape)
    attributes = {"units": "e/pixel"}
    groups["posterior_predictive"] = xr.Dataset({"mean_counts": (("chain", "draw", "image"), predicted[None], attributes)}, {"chain": [0], "draw": np.arange(len(chosen)), "image": coords["image"]})
    groups["observed_data"] = xr.Dataset({"mean_counts": (("image",), np.asarray(problem.counts, float).mean((1, 2)), attributes)}, {"image": coords["image"]})
    groups["constant_data"] = xr.Dataset(
        {"defocus": (("image",), np.asarray(problem.series.defocus, float), {"units": "angstrom"}), "n_atoms": (("column",), np.asarray(problem.n_atoms))},
        {k: coords[k] for k in ("image", "column")},
    )
    if int(az.__version__.split(".")[0]) < 1:
        return az.InferenceData(**groups)
    return xr.DataTree.from_dict({f"/{k}": v for k, v in groups.items()})


@jax.jit
def _mean_counts(vectors: jax.Array, problem: Problem) -> jax.Array:
    """Mean expected counts of each image (draw, F)."""
    one = lambda v: expected_counts(field_of(from_vector(v, problem), problem.n_atoms), problem.library, problem.series, problem.draw).mean((1, 2))
    return jax.lax.map(one, vectors)


@jax.jit
def _images_of_large(vectors: jax.Array, field: density.WindowedField) -> tuple[jax.Array, jax.Array]:
    return jax.lax.map(lambda v: density.of_images(v, field), vectors)


@jax.jit
def _log_likelihoods(vectors: jax.Array, problem: Problem) -> jax.Array:
    return jax.lax.map(lambda v: image_log_likelihoods(from_vector(v, problem), problem), vectors)


def _count_terms(problem: Problem) -> np.ndarray:
    """What the likelihood leaves out, sum log Gamma(N + v + 1) + v over each image (F,)."""
    v, pulse = float(problem.read_variance), float(problem.dispersion)
    terms = gammaln(np.maximum(np.asarray(problem.counts, float) + v, -0.9) + 1) + v
    return np.where(problem.mask, terms, 0.0).sum((1, 2)) / pulse


def write_netcdf(tree, path) -> None:
    """netCDF that `az.from_netcdf` of 0.2x and 1.x reads."""
    with atomic_write(path, sum(group.nbytes for group in tree.values()) + HDF5_OVERHEAD) as temporary:
        tree.to_netcdf(str(temporary), engine="h5netcdf")
