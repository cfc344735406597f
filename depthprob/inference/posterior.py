"""NumPyro posterior over the full stack: Laplace and NUTS, preconditioned by the Fisher matrix, into ArviZ groups.

The model is stated in whitened coordinates z, theta = mode + L z with L L^T the Laplace covariance, so the posterior is close to a
standard normal whatever the units and correlations, and chains mix from the first draw.
"""

import time
from typing import NamedTuple

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import xarray as xr
from numpyro.infer import MCMC, NUTS

from ..errors import InputError
from ..physics.focal_series import expected_counts
from . import local
from .arrow import ArrowFactor
from .likelihood import GLOBAL, PER_COLUMN, Estimate, Problem, field_of, from_vector, log_posterior, maximum, to_vector

LARGE = 200  # columns beyond which fields are fitted window by window


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
        method, chains, samples, divergences, r_hat_max, ess_min, seconds.
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
    warmup: int = 40,
    estimate: Estimate | None = None,
    progress_bar: bool = True,
) -> Posterior:
    """Posterior of all free parameters.

    Parameters
    ----------
    method : {"mle", "laplace", "svi", "nuts"}
        The mode alone; the normal at the mode with the inverse of Fisher plus prior as covariance; the best normal in the sense of
        the evidence bound, started there; or the No-U-Turn sampler.
    key : PRNG key
        Randomness of draws.
    """
    start = time.perf_counter()
    key = jax.random.key(0) if key is None else key
    estimate = maximum(problem) if estimate is None else estimate
    if method in ("nuts", "svi") and isinstance(estimate.factor, ArrowFactor):
        raise InputError(
            f"method {method!r} samples fields of up to {LARGE} columns; this one has {len(problem.n_atoms)}. Take method = \"laplace\", or crop the stack."
        )
    mode = to_vector(estimate.parameters, problem)
    factor = estimate.factor
    draws, statistics, extra = None, {}, {}
    if method == "laplace" and isinstance(factor, ArrowFactor):
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        draws = mode + factor.draw(rng, chains * samples).reshape(chains, samples, -1)
    elif method == "laplace":
        z = np.asarray(jax.random.normal(key, (chains, samples, len(mode))), float)
        draws = mode + z @ factor.T
    elif method in ("nuts", "svi"):
        model = _whitened(problem, mode, factor)
        run = _nuts if method == "nuts" else _svi
        z, statistics, extra = run(model, len(mode), key, samples, chains, warmup, progress_bar)
        draws = mode + z @ factor.T
    seconds = round(time.perf_counter() - start, 1)
    return Posterior(estimate, draws, statistics, {"method": method, "seconds": seconds, "iterations": estimate.iterations, "converged": estimate.converged} | extra)


def _whitened(problem: Problem, mode: np.ndarray, factor: np.ndarray):
    """NumPyro model of the stack in coordinates where Laplace is a standard normal (the Jacobian is constant)."""
    centre, scale = jnp.asarray(mode), jnp.asarray(factor)

    def model():
        z = numpyro.sample("z", numpyro.distributions.ImproperUniform(numpyro.distributions.constraints.real_vector, (), (len(mode),)))
        numpyro.factor("log_posterior", log_posterior(from_vector(centre + scale @ z, problem), problem))

    return model


def _nuts(model, size, key, samples, chains, warmup, progress_bar):
    # the mass matrix is the identity by construction; only the step is adapted, which takes few draws
    kernel = NUTS(model, dense_mass=False, adapt_mass_matrix=False, step_size=0.4, target_accept_prob=0.7, max_tree_depth=4)
    mcmc = MCMC(kernel, num_warmup=warmup, num_samples=samples, num_chains=chains, chain_method="sequential", progress_bar=progress_bar)
    key_start, key_run = jax.random.split(key)
    start = {"z": jax.random.normal(key_start, (chains, size) if chains > 1 else (size,))}
    mcmc.run(key_run, init_params=start, extra_fields=("diverging", "accept_prob", "num_steps", "energy"))
    z = np.asarray(mcmc.get_samples(group_by_chain=True)["z"], float)
    fields = mcmc.get_extra_fields(group_by_chain=True)
    names = {"diverging": "diverging", "accept_prob": "acceptance_rate", "num_steps": "n_steps", "energy": "energy"}
    statistics = {names[k]: np.asarray(v) for k, v in fields.items() if k in names}
    r_hat = numpyro.diagnostics.split_gelman_rubin(z) if samples >= 4 else np.full(size, np.nan)
    ess = numpyro.diagnostics.effective_sample_size(z)
    extra = {
        "chains": chains,
        "samples": samples,
        "warmup": warmup,
        "divergences": int(statistics["diverging"].sum()),
        "r_hat_max": float(np.max(r_hat)),
        "ess_min": float(np.min(ess)),
        "ess_median": float(np.median(ess)),
        "gradients_per_draw": float(np.mean(statistics["n_steps"])),
    }
    return z, statistics, extra


def _svi(model, size, key, samples, chains, warmup, progress_bar):
    """Full-covariance normal guide in whitened coordinates, started at Laplace."""
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoMultivariateNormal

    guide = AutoMultivariateNormal(model, init_scale=1.0, init_loc_fn=numpyro.infer.init_to_value(values={"z": jnp.zeros(size)}))
    svi = SVI(model, guide, numpyro.optim.Adam(3e-3), Trace_ELBO(num_particles=2))
    key_run, key_draw = jax.random.split(key)
    result = svi.run(key_run, 8 * warmup, progress_bar=progress_bar)
    z = np.asarray(guide.sample_posterior(key_draw, result.params, sample_shape=(chains, samples))["z"], float)
    return z, {}, {"chains": chains, "samples": samples, "final_loss": float(result.losses[-1])}


UNITS = {"depth": "angstrom", "x": "angstrom", "y": "angstrom", "gain": "1", "background": "fraction of the beam", "shift_x": "angstrom", "shift_y": "angstrom", "focus_offset": "angstrom", "focus_step": "1", "source_variance": "angstrom^2"}


def to_arviz(posterior: Posterior, problem: Problem, relative: bool = False):
    """ArviZ groups with named dims and units: whatever the installed ArviZ uses (InferenceData, or DataTree since 1.0).

    posterior (draws of every free parameter; gain and background as themselves), sample_stats, posterior_predictive (mean counts of
    each image over draws, for at most 100 of them; of a large field at the mode), observed_data (mean counts of each image), constant_data. With `relative` each draw's depths have mean zero.
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
    chosen = flat[np.linspace(0, len(flat) - 1, min(100, len(flat))).astype(int)]
    if problem.draw is None:
        mean = np.tile(local.rates(posterior.estimate.parameters, problem).mean((1, 2), dtype=float), (len(chosen), 1))
    else:
        rate = jax.jit(lambda v: expected_counts(field_of(from_vector(v, problem), problem.n_atoms), problem.library, problem.series, problem.draw).mean((1, 2)))
        mean = np.asarray(jax.lax.map(rate, jnp.asarray(chosen)), float)
    n_pixels = np.prod(problem.series.shape)
    predicted = np.random.default_rng(0).poisson(mean * n_pixels) / n_pixels
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


def write_netcdf(tree, path) -> None:
    """netCDF that `az.from_netcdf` of 0.2x and 1.x reads."""
    tree.to_netcdf(str(path), engine="h5netcdf")
