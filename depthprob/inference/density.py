"""The log-posterior of a large field as one compiled function with a gradient, as samplers ask for it again and again.

The model of `local`, every column in its window. Near a mode the windows stay where they are, which keeps the density smooth: `local` moves a window on
with its column pixel by pixel, and what it cuts off jumps each time.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..physics.focal_series import background_images, counts_per_fraction, displaced
from ..physics.windows import BATCH, WindowRenderer, painted_image
from . import drawing
from .problem import DARKEST, PER_IMAGE, Problem, field_of, from_vector, log_prior, places

ROOM = 0.5  # pixels that a column moves from the mode before its window follows


class _Class(eqx.Module):
    """Images that share one window size."""

    images: Int[Array, " image"]
    draw: WindowRenderer
    half: int = eqx.field(static=True)


class WindowedField(eqx.Module):
    """A large field's problem, and windows for parameters near a mode.

    Attributes
    ----------
    problem : Problem
    places : (F, C, 2)
        x, y of each column in each image at the mode [pixels].
    classes : tuple
    """

    problem: Problem
    places: Float[Array, "image column 2"]
    classes: tuple[_Class, ...]


def windowed(parameters: dict, problem: Problem) -> WindowedField:
    """For parameters near those given."""
    at = places(parameters, problem.series)
    windows = drawing.windows_about(parameters, problem, ROOM, drawing.CLASSES)  # however few columns: a sampler asks thousands of times
    return WindowedField(problem, jnp.asarray(at / problem.series.pixel_size), tuple(_Class(jnp.asarray(w.images), w.draw, w.half) for w in windows))


def log_posterior(vector: Float[Array, " p"], field: WindowedField) -> Float[Array, ""]:
    """Log-likelihood plus log-prior of the free parameters (P,), as `likelihood.objective` but for what windows cut off."""
    return jnp.sum(of_images(vector, field)[0]) + log_prior(from_vector(vector, field.problem), field.problem)


def of_images(vector: Float[Array, " p"], field: WindowedField) -> tuple[Float[Array, " image"], Float[Array, " image"]]:
    """Log-likelihood, in float64, and mean expected counts of each image."""
    parameters = from_vector(vector, field.problem)
    parts = [jax.lax.map(lambda i, own=own: _of_image(parameters, field, own, i), own.images) for own in field.classes]
    order = jnp.argsort(jnp.concatenate([own.images for own in field.classes]))
    likelihoods, means = (jnp.concatenate(part)[order] for part in zip(*parts, strict=True))
    return likelihoods / field.problem.dispersion, means


def _of_image(parameters: dict, field: WindowedField, own: _Class, i: Int[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    problem, series = field.problem, field.problem.series
    image = field_of({name: value[i][None] if name in PER_IMAGE else value for name, value in parameters.items()}, problem.n_atoms)
    px, size, side = series.pixel_size, np.array(series.shape[::-1]), 2 * own.half + 1
    at = displaced(image.positions, image.image_shifts, image.image_distortions, series)[0]
    pixel = jnp.floor(field.places[i]).astype(int) + jnp.round(at / px - field.places[i]).astype(int)
    offset = at - (pixel - own.half) * px
    corner = (jnp.mod(pixel, size) if series.periodic else pixel) - own.half + side  # on a canvas with `side` pixels around the image
    defocus = jnp.asarray(series.defocus)
    z = image.focus_offset + defocus.mean() + image.focus_step * (defocus[i] - defocus.mean()) - image.depths
    more = -len(at) % BATCH
    n, z, offset, corner = (jnp.pad(a, [(0, more)] + [(0, 0)] * (a.ndim - 1)) for a in (problem.n_atoms, z, offset, corner[:, ::-1]))
    shape = tuple(s + 2 * side for s in series.shape)
    canvas = painted_image(n, z, offset, corner, image.source_variance, problem.library, own.draw, shape, "source_variance" in problem.free)
    signal = _folded(canvas, side, series.shape) if series.periodic else canvas[side:-side, side:-side]
    rate = counts_per_fraction(series)[i] * (image.gain * signal + background_images(image, series)[0])
    rate = jnp.maximum(rate.astype(float), DARKEST)
    terms = (problem.counts[i] + problem.read_variance) * jnp.log(rate + problem.read_variance) - rate
    return jnp.sum(jnp.where(problem.mask[i], terms, 0.0)), rate.mean()


def _folded(canvas: Float[Array, "Y X"], pad: int, shape: tuple[int, int]) -> Float[Array, "y x"]:
    """The image within the padding, with what a periodic image finds beyond its edges."""
    rows, columns = (np.arange(-pad, n + pad) % n for n in shape)
    half = jnp.zeros((shape[0], canvas.shape[1]), canvas.dtype).at[rows].add(canvas)
    return jnp.zeros(shape, canvas.dtype).at[:, columns].add(half)
