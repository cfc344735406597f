"""Draws from a posterior in whitened coordinates z, theta = centre + scale z, where it is close to a standard normal: by NUTS, and by the best normal.

Everything compiled takes the problem as an argument, so that one compilation serves all problems of one shape.
"""

import hashlib
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jaxtyping import Array, Float
from numpyro.infer.hmc import hmc

from .. import processes
from ..devices import SPREAD, WHOLE, on_all, spread
from ..storage import load_checkpoint, save_checkpoint
from .arrow import ArrowScale
from .likelihood import objective

BLOCK = 10  # draws between two looks at the progress and two states written
WARMUP = 20  # draws, by default
TREE = 4  # doublings of a draw's path at most
ADAPTING = 19  # draws; from 20 on NumPyro begins anew with its step where a tenth of the warm-up is left, and may end with a far too large one
STEP = 1.75  # times P^(-1/4): a leapfrog's step that is accepted four times in five for a normal of P dimensions
FIELDS = {"diverging": "diverging", "accept_prob": "acceptance_rate", "num_steps": "n_steps", "energy": "energy"}


class Whitened(eqx.Module):
    """A posterior and the coordinates it is sampled in.

    Attributes
    ----------
    model : pytree
    centre : (P,)
    scale : (P, P) array or ArrowScale
    density : function
        Log density of parameters (P,) given the model.
    """

    model: Any
    centre: Float[Array, " p"]
    scale: Float[Array, "p p"] | ArrowScale
    density: Callable = eqx.field(static=True, default=objective)


def log_density(z: Float[Array, " p"], target: Whitened) -> Float[Array, ""]:
    """Log-posterior at whitened coordinates; the Jacobian is constant and left out."""
    return target.density(target.centre + target.scale @ z, target.model)


# NUTS ------------------------------------------------------------------------------------------------------------------------


@lru_cache
def _kernel(warmup: int, devices: int, length: int):
    """NumPyro's NUTS: start(key, z, target) of one chain and block(states, target), which makes `length` draws of a chain on each device, both compiled.

    The mass matrix is the identity by construction; only the step is adapted, about one that suits a normal (NumPyro searches about ten times its start).
    """
    start_kernel, step = hmc(potential_fn_gen=lambda target: lambda z: -log_density(z, target), algo="NUTS")

    @jax.jit
    def start(key, z, target):
        step = STEP * len(z) ** -0.25 / (10 if warmup else 1)
        adapting = min(warmup, ADAPTING)
        return start_kernel(z, adapting, step_size=step, adapt_mass_matrix=False, target_accept_prob=0.7, max_tree_depth=TREE, model_args=(target,), rng_key=key)

    def own(states, target):
        def one(state, _):
            state = step(state, (target,), {})
            return state, _recorded(state)

        alone = jax.tree.map(lambda a: a[0], states)
        return jax.tree.map(lambda a: a[None], jax.lax.scan(one, alone, length=length))

    return start, jax.jit(spread(own, (SPREAD, WHOLE), devices))


def _recorded(state) -> tuple:
    return state.z, *(getattr(state, name) for name in FIELDS)


class Chains(NamedTuple):
    """How far chains are: blocks made (chain,), NumPyro's states (chain, ...), and z and `FIELDS` of all draws (chain, draw, ...), those to come zero."""

    done: np.ndarray
    states: tuple
    draws: tuple[np.ndarray, ...]


def effective_draws(draws: np.ndarray) -> np.ndarray:
    """Number of independent draws (P,) that draws (chain, draw, P) are worth, at most N log10 N of N.

    NumPyro's is N over an autocorrelation time that comes out at or below zero where draws alternate; the limit is that of Vehtari et al., Bayesian Analysis 16, 667
    (2021).
    """
    number = draws.shape[0] * draws.shape[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        time = number / np.asarray(numpyro.diagnostics.effective_sample_size(draws))
    return number / np.fmax(time, 1 / np.log10(max(number, 10)))


def nuts(
    target: Whitened,
    key: jax.Array,
    samples: int,
    chains: int,
    warmup: int,
    checkpoint: Path | None = None,
    progress: Callable = lambda items, **_: items,
    block: int = BLOCK,
) -> tuple[np.ndarray, dict, dict]:
    """Draws (chain, draw, P), sample statistics (chain, draw) and diagnostics of NumPyro's No-U-Turn sampler, at a time as many chains as all processes have devices.

    Parameters
    ----------
    checkpoint : path, optional
        The samplers' states and the draws so far are kept there after every `block` draws. A run of the same posterior, key and settings goes on from
        them, on any number of devices, and ends, bit by bit, where an undisturbed one ends; a file of anything else, or a damaged one, is written over.
    """
    devices = processes.devices_for(chains)
    width = devices * jax.process_count()
    start, advance = _kernel(warmup, devices, block)
    blocks = -(-(warmup + samples) // block)
    keys = jax.random.split(key, 2 * chains).reshape(2, chains, *key.shape)
    begun = [start(jax.random.key_data(keys[0, c]), jax.random.normal(keys[1, c], target.centre.shape), target) for c in range(chains)]
    digest = _digest((target, begun), f"{numpyro.__version__} {jax.__version__} {warmup} {block} chain by chain")
    states = jax.tree.map(lambda *leaves: np.stack(leaves), *begun)
    made = Chains(np.zeros(chains, int), states, tuple(np.zeros((chains, blocks * block, *leaf.shape[1:]), leaf.dtype) for leaf in _recorded(states)))
    if checkpoint and processes.is_first():
        _read_checkpoint(checkpoint, digest, made)
    made = processes.of_first(made)
    resumed = int(made.done.sum())
    target = on_all(target, devices)
    turns = _turns(blocks - made.done, width)
    for now in progress(turns, desc="NUTS", unit="block", initial=resumed // width, total=resumed // width + len(turns)):
        own = partial(np.take, indices=processes.own_part(now, devices), axis=0)
        states, record = processes.gathered(advance(jax.tree.map(own, made.states), target))
        for row, c in enumerate(now):
            for kept, new in zip(jax.tree.leaves(made.states), jax.tree.leaves(states), strict=True):
                kept[c] = new[row]
            for kept, new in zip(made.draws, record, strict=True):
                kept[c, made.done[c] * block :][:block] = new[row]
            made.done[c] += 1
        if checkpoint and processes.is_first():
            _write_checkpoint(checkpoint, digest, made, made.done.max() * block)
    z, *others = (draws[:, warmup : warmup + samples] for draws in made.draws)
    z, statistics = z.astype(float), dict(zip(FIELDS.values(), others, strict=True))
    r_hat = numpyro.diagnostics.split_gelman_rubin(z) if samples >= 4 else np.full(z.shape[-1], np.nan)
    ess = effective_draws(z)
    return z, statistics, {
        "chains": chains,
        "samples": samples,
        "warmup": warmup,
        "resumed_at_draw": min(resumed * block, chains * (warmup + samples)),
        "divergences": int(statistics["diverging"].sum()),
        "r_hat_max": float(np.max(r_hat)),
        "ess_min": float(np.min(ess)),
        "ess_median": float(np.median(ess)),
        "gradients_per_draw": float(np.mean(statistics["n_steps"])),
    }  # fmt: skip


def gradients(samples: int, chains: int, warmup: int = WARMUP) -> int:
    """How many one device computes at most, one after another."""
    at_a_time = processes.devices_for(chains) * jax.process_count()
    return -(-chains // at_a_time) * (warmup + samples) * (2**TREE - 1)


def _turns(left: np.ndarray, width: int) -> list[list[int]]:
    """Which chains make a block, turn by turn, for chains that lack so many blocks and at most `width` at a time: the first ones first."""
    left, turns = left.copy(), []
    while left.any():
        turns.append(np.flatnonzero(left)[:width].tolist())
        left[turns[-1]] -= 1
    return turns


def _digest(tree, words: str) -> str:
    """Of every number in a pytree, and of words."""
    digest = hashlib.sha256(words.encode())
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _write_checkpoint(path: Path, digest: str, made: Chains, until: int) -> None:
    draws = {f"draws_{i}": draws[:, :until] for i, draws in enumerate(made.draws)}
    save_checkpoint(path, digest=digest, done=made.done, **draws, **{f"state_{i}": leaf for i, leaf in enumerate(jax.tree.leaves(made.states))})


def _read_checkpoint(path: Path, digest: str, made: Chains) -> None:
    """Put what a file of this run holds in the place of what is there."""
    saved = load_checkpoint(path)
    if str(saved.get("digest")) != digest:
        return
    made.done[:] = saved["done"]
    for i, draws in enumerate(made.draws):
        draws[:, : saved[f"draws_{i}"].shape[1]] = saved[f"draws_{i}"]
    for i, leaf in enumerate(jax.tree.leaves(made.states)):
        leaf[...] = saved[f"state_{i}"]


# The best normal -------------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="pairs")
def _natural_gradient(mean, factor, key, target: Whitened, pairs: int):
    """Mean of u = L^T grad log p + e and of u e^T over antithetic draws z = mean + L e; both vanish, draw by draw, where p is the normal itself."""
    e = jax.random.normal(key, (pairs, len(mean)), mean.dtype)
    e = jnp.concatenate([e, -e])
    slope = jax.grad(log_density)
    u = jax.lax.map(lambda e: factor.T @ slope(mean + factor @ e, target) + e, e)
    return u.mean(0), u.T @ e / len(e)


def best_normal(
    target: Whitened, key: jax.Array, pairs: int = 8, least: int = 32, most: int = 256, close: float = 0.02, progress: Callable = lambda items, **_: items
) -> tuple[np.ndarray, np.ndarray, dict]:
    """Mean (P,) and factor (P, P) of the normal that is nearest the posterior in the sense of the evidence bound, and diagnostics.

    Stochastic variational inference with natural gradients: of the mean L E[u], of the covariance L E[u e^T] L^T with u as in
    `_natural_gradient` (Stein's lemma turns Hessians into gradients; Hoffman et al., J. Mach. Learn. Res. 14, 1303 (2013); Opper and Archambeau,
    Neural Comput. 21, 786 (2009)). Near a normal u is small for every draw, so few draws do. Steps shrink as 2 / (t + 8), which averages over iterations.

    Parameters
    ----------
    pairs : int
        Antithetic draws of one iteration.
    least, most : int
        Iterations; between them it stops when, since half as many, no mean has moved by more than `close` standard deviations
        and no standard deviation by more than that part of itself.
    """
    size = len(target.centre)
    mean, factor = np.zeros(size), np.eye(size)
    history, moved, t = {}, np.inf, 0
    keys = jax.random.split(key, most)
    for t in progress(range(1, most + 1), desc="SVI", unit="step"):
        by_mean, by_covariance = (np.asarray(a, float) for a in _natural_gradient(jnp.asarray(mean), jnp.asarray(factor), keys[t - 1], target, pairs))
        rate = 2 / (t + 8)
        turn = rate / 4 * (by_covariance + by_covariance.T)
        mean = mean + rate * factor @ np.clip(by_mean, -1.0, 1.0)
        turn = turn * min(1.0, 0.5 / max(np.linalg.norm(turn, 2), 1e-30))
        factor = factor @ (np.eye(size) + turn + turn @ turn / 2)  # exp(turn), nearly: the covariance stays positive
        sd = np.sqrt((factor**2).sum(1))
        history[t] = mean, sd
        if t >= least and t % 2 == 0:
            before = history[t // 2]
            moved = float(max(np.max(abs(mean - before[0]) / sd), np.max(abs(sd / before[1] - 1))))
            if moved < close:
                break
    return mean, factor, {"svi_iterations": t, "svi_gradients": 2 * pairs * t, "svi_last_change_sd": moved, "svi_converged": moved < close}
