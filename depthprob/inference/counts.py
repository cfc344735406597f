"""Atom counts: how a column grows with its atoms, and what its depth would have been, had it been taken for another number."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from ..physics.column_images import at_points
from ..physics.library import ColumnLibrary, natural_spline

REACH = 2  # atoms more and less


def growth(library: ColumnLibrary) -> ColumnLibrary:
    """What one atom more changes of a column's series, over the relative change of its cross-section: what a column is brighter by as it grows.

    Half the difference of the columns of an atom more and less about one centre of mass; the thickest's, of itself and the one before. No atoms have no signal.
    """
    sigma = np.concatenate([[0.0], library.cross_section])
    coefficients = []
    for n in range(1, library.n_max + 1):
        z = jnp.asarray(library.planes - library.centre[n - 1])[None]
        more, less = min(n + 1, library.n_max), n - 1
        gained = library.weights(jnp.array([more]), z)[0] - (library.weights(jnp.array([less]), z)[0] if less else 0.0)
        coefficients.append(natural_spline(np.asarray(gained, float) * sigma[n] / (sigma[more] - sigma[less])))
    return eqx.tree_at(lambda lib: lib.coefficients, library, np.stack(coefficients).astype(library.coefficients.dtype))


def depth_shifts(
    library: ColumnLibrary, defocus: np.ndarray, dose: np.ndarray, background: np.ndarray, depth: float = 0.0, half_field: float = 6.0, pixel: float = 0.4
) -> Float[np.ndarray, "n change"]:
    """Change of the fitted depth [Å] when a column of n atoms is taken for n + change atoms, change = -REACH ... REACH; nan where the library ends.

    Maximum likelihood by Fisher scoring on the expected series of an isolated column, with intensities and background as they are: in
    a field they are shared by all columns. Float64.

    Parameters
    ----------
    defocus, dose, background : (F,)
        Of the series [Å], [e/Å^2], fraction of the beam.
    depth : float
        Where in the series the columns lie [Å].
    """
    along = np.arange(-half_field, half_field + pixel / 2, pixel)
    basis = jnp.asarray(at_points(np.asarray(library.images, float), library.pixel, along, along).reshape(len(library.images), -1))
    scale = jnp.asarray(np.asarray(dose, float) * pixel**2)[:, None]
    background = jnp.asarray(background, float)[:, None]
    defocus = jnp.asarray(defocus, float)

    def series(n, depth):
        return scale * (library.weights(n[None], (defocus - depth)[None])[0] @ basis + background)

    @jax.jit
    def shift(n, taken_for):
        truth = series(n, depth)

        def step(at, _):
            rate, slope = jax.jvp(lambda d: series(taken_for, d), (at,), (jnp.ones_like(at),))
            move = jnp.sum((truth / rate - 1) * slope) / jnp.sum(slope**2 / rate)
            return at + jnp.clip(move, -5.0, 5.0), None

        return jax.lax.scan(step, jnp.asarray(depth, float), length=8)[0] - depth

    out = np.full((library.n_max, 2 * REACH + 1), np.nan)
    for n in range(1, library.n_max + 1):
        for change in range(-REACH, REACH + 1):
            if 1 <= n + change <= library.n_max:
                out[n - 1, change + REACH] = float(shift(jnp.array(n), jnp.array(n + change)))
    out[:, REACH] = 0.0  # the count itself, also where the foci see nothing of the depth
    return out


def _other_counts(n: int, probability: np.ndarray, moves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shifts [Å] of the counts a column of `n` atoms may have instead, itself among them, and their shares."""
    known = np.flatnonzero(np.isfinite(moves))
    share = probability[n - 1 + known - REACH]
    return moves[known], share / share.sum()


def mean_square_shift(
    n: Int[np.ndarray, " column"], probability: Float[np.ndarray, "column n_max"], shifts: Float[np.ndarray, "column change"]
) -> Float[np.ndarray, " column"]:
    """Mean square [Å^2] of what depths given counts `n` would move by, over the counts that each column may have instead."""
    pairs = (_other_counts(int(number), p, moves) for number, p, moves in zip(n, probability, shifts, strict=True))
    return np.array([np.sum(share * moves**2) for moves, share in pairs])


def marginal_draws(
    draws: Float[np.ndarray, "draw column"],
    n: Int[np.ndarray, " column"],
    probability: Float[np.ndarray, "column n_max"],
    shifts: Float[np.ndarray, "column change"],
    rng: np.random.Generator,
) -> Float[np.ndarray, "draw column"]:
    """Draws of depths given counts `n`, spread over the counts that each column may have instead, by `probability`."""
    out = draws.copy()
    for c, number in enumerate(n):
        moves, share = _other_counts(int(number), probability[c], shifts[c])
        out[:, c] += rng.choice(moves, len(draws), p=share)
    return out
