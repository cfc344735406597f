"""The one forward function: expected counts of a field of columns as a function of its parameters.

A field is a sum of isolated columns. Every column is a dozen fixed images with weights that depend on defocus minus depth, so the
Fourier transform of an image is a matrix product, and the pixels are sampled from it exactly, whatever their size.
"""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .library import ColumnLibrary


class FocalSeries(eqx.Module):
    """How a series is recorded.

    Attributes
    ----------
    defocus : (focus,)
        Foci [Å]; positive is underfocus.
    pixel_size : float
        [Å].
    dose : (focus,)
        Per image [e/Å^2]; a scalar serves all.
    shape : (ny, nx)
    periodic : bool
        Whether the images wrap around at their edges, as simulated ones may.
    """

    defocus: np.ndarray
    pixel_size: float = eqx.field(static=True)
    dose: np.ndarray
    shape: tuple[int, int] = eqx.field(static=True)
    periodic: bool = eqx.field(static=True, default=False)


class Field(eqx.Module):
    """Columns and nuisances.

    Attributes
    ----------
    positions : (column, 2)
        x, y [Å] from the centre of pixel (0, 0).
    n_atoms : (column,) int
    depths : (column,)
        Mean z of the atoms [Å].
    background : (focus,)
        Fraction of the beam.
    gain : (focus,)
        Factor on the columns' signal in each image.
    image_shifts : (focus, 2)
        Displacement of the object in each image [Å].
    focus_offset : scalar
        True minus nominal defocus [Å].
    focus_step : scalar
        True over nominal focus differences, about the mean focus.
    source_variance : scalar
        Variance of the source image along one axis minus that of the library [Å^2]; negative for a smaller source.
    background_shape : (focus, 5), optional
        Coefficients of `smooth_functions` in the logarithm of each image's background; absent, it is constant.
    image_distortions : (focus, 2, 2), optional
        Affine distortion of the scan in each image: a column stands E (r - m) farther aside, m the middle of the field, rows of E for x and y.
    """

    positions: Float[Array, "column 2"]
    n_atoms: Int[Array, " column"]
    depths: Float[Array, " column"]
    background: Float[Array, " focus"]
    gain: Float[Array, " focus"]
    image_shifts: Float[Array, "focus 2"]
    focus_offset: Float[Array, ""] | float = 0.0
    focus_step: Float[Array, ""] | float = 1.0
    source_variance: Float[Array, ""] | float = 0.0
    background_shape: Float[Array, "focus 5"] | None = None
    image_distortions: Float[Array, "focus 2 2"] | None = None


class Renderer(NamedTuple):
    """What of a library and a series does not change with the parameters.

    Attributes
    ----------
    basis : (R, qy, qx) complex64
        Fourier coefficients of the basis images on the cell, qx >= 0 only (doubled), divided by the cell's area.
    qx, qy : (qx,), (qy,)
        [1/Å].
    to_y, to_x : (ny, qy), (qx, nx) complex64
        Fourier sums at the pixels.
    """

    basis: jax.Array
    qx: jax.Array
    qy: jax.Array
    to_y: jax.Array
    to_x: jax.Array


def renderer(library: ColumnLibrary, series: FocalSeries, tolerance: float = 1e-4) -> Renderer:
    """Fourier grid of a field: the field itself where it is periodic, else with a margin as wide as the widest probe.

    Frequencies whose coefficients stay under `tolerance` of the largest are left out.
    """
    ny, nx = series.shape
    px = series.pixel_size
    half = library.pixel * library.images.shape[1] / 2
    cells = [n * px if series.periodic else n * px + half for n in (nx, ny)]
    limits = [int(np.floor(library.band_limit * cell)) for cell in cells]
    qx, qy = np.arange(limits[0] + 1) / cells[0], np.arange(-limits[1], limits[1] + 1) / cells[1]
    spectra = np.asarray(library.images_q(qx, qy)) / (cells[0] * cells[1])
    size = abs(spectra).max(0)
    keep_x = np.flatnonzero(size.max(0) > tolerance * size.max())[-1] + 1
    rows = size.max(1) > tolerance * size.max()
    spectra = spectra[:, rows, :keep_x] * np.where(np.arange(keep_x) > 0, 2.0, 1.0)
    qx, qy = qx[:keep_x], qy[rows]
    return Renderer(
        jnp.asarray(spectra, jnp.complex64),
        jnp.asarray(qx, jnp.float32),
        jnp.asarray(qy, jnp.float32),
        jnp.asarray(np.exp(2j * np.pi * np.outer(np.arange(ny) * px, qy)), jnp.complex64),
        jnp.asarray(np.exp(2j * np.pi * np.outer(qx, np.arange(nx) * px)), jnp.complex64),
    )


def phases(draw: Renderer, positions: Float[Array, "n 2"]) -> tuple[Array, Array]:
    """exp(-2 pi i q.r) as factors (n, qy), (n, qx), complex64."""
    wave = lambda q, r: jnp.exp(-2j * jnp.pi * (q * r[:, None]).astype(jnp.float32)).astype(jnp.complex64)
    return wave(draw.qy, positions[:, 1]), wave(draw.qx, positions[:, 0])


def q_squared(draw: Renderer) -> Float[Array, "qy qx"]:
    """[1/Å^2]."""
    return draw.qy[:, None] ** 2 + draw.qx**2


def widening(draw: Renderer, source_variance: Float[Array, ""] | float) -> Float[Array, "qy qx"]:
    """Factor on the spectra, exp(-2 pi^2 q^2 v), that widens the library's source image by variance v [Å^2]."""
    return jnp.exp(-2 * jnp.pi**2 * q_squared(draw) * source_variance).astype(jnp.float32)


def to_pixels(draw: Renderer, spectra: Array) -> Array:
    """Images (..., y, x) of Fourier coefficients (..., qy, qx), float32."""
    rows = draw.to_y @ spectra
    return rows.real @ draw.to_x.real - rows.imag @ draw.to_x.imag


def defocus_minus_depth(field: Field, series: FocalSeries) -> Float[Array, "column focus"]:
    """z at which each column is seen in each image [Å]."""
    defocus = jnp.asarray(series.defocus)
    mean = jnp.mean(defocus)
    defocus = field.focus_offset + mean + field.focus_step * (defocus - mean)
    return defocus[None] - field.depths[:, None]


def displaced(positions: Array, shifts: Array, distortions: Array | None, series: FocalSeries) -> Array:
    """x, y of columns (C, 2) in images with shifts (..., 2) and, optionally, distortions (..., 2, 2): (..., C, 2) [Å]. NumPy or JAX.

    An object that moves while it is scanned, by d during a frame of height h, stands displaced by d y / h: a shear along x, a stretch along y. Spots keep
    their shape, which an affine scan would distort as well: by a hundredth of their width where it is one of the field's.
    """
    places = positions + shifts[..., None, :]
    if distortions is None:
        return places
    return places + from_middle(positions, series) @ distortions.swapaxes(-1, -2)


def from_middle(positions: Array, series: FocalSeries) -> Array:
    """x, y (C, 2) from the middle of the field [Å]."""
    return positions - (np.array(series.shape[::-1]) - 1) * series.pixel_size / 2


def column_signal(field: Field, library: ColumnLibrary, series: FocalSeries, draw: Renderer) -> Float[Array, "focus y x"]:
    """Fraction of the beam scattered by the columns, float32, without gain and background."""
    weights = library.weights(field.n_atoms, defocus_minus_depth(field, series)).astype(jnp.float32)
    if field.image_distortions is not None:
        places = displaced(field.positions, field.image_shifts, field.image_distortions, series)
        spectra = jax.lax.map(jax.checkpoint(lambda at: _spectra(*at, draw)[0]), (weights.swapaxes(0, 1)[:, :, None], places))
        return to_pixels(draw, spectra * widening(draw, field.source_variance))
    spectra = _spectra(weights, field.positions, draw) * widening(draw, field.source_variance)
    shift_y, shift_x = phases(draw, field.image_shifts)
    return to_pixels(draw, spectra * shift_y[:, :, None] * shift_x[:, None, :])


def _spectra(weights: Float[Array, "column focus R"], positions: Float[Array, "column 2"], draw: Renderer) -> Array:
    """Fourier coefficients (focus, qy, qx) of columns at the same places in every image."""
    along_y, along_x = phases(draw, positions)
    spots = (along_y[:, :, None] * along_x[:, None, :]).reshape(len(along_y), -1)
    n_columns, n_foci, rank = weights.shape
    flat = weights.reshape(n_columns, -1).T  # (focus * R, column), real: two real products, not a complex one
    sums = ((flat @ spots.real) + 1j * (flat @ spots.imag)).reshape(n_foci, rank, *draw.basis.shape[1:])
    return jnp.einsum("frab,rab->fab", sums, draw.basis)


def smooth_functions(shape: tuple[int, int]) -> np.ndarray:
    """Legendre polynomials x, y, P2(x), x y, P2(y) over an image (5, ny, nx), x and y from -1 to 1; float32."""
    y, x = (np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape)
    x, y = np.broadcast_arrays(x, y[:, None])
    return np.stack([x, y, (3 * x**2 - 1) / 2, x * y, (3 * y**2 - 1) / 2]).astype(np.float32)


def background_images(field: Field, series: FocalSeries) -> Float[Array, "focus y x"]:
    """Background of every image, fraction of the beam: (focus, 1, 1) where it is constant; smooth and positive, as of a support film, otherwise."""
    level = field.background[:, None, None]
    if field.background_shape is None:
        return level
    return level * jnp.exp(jnp.tensordot(field.background_shape, smooth_functions(series.shape), 1).astype(jnp.float32))


def counts_per_fraction(series: FocalSeries) -> Float[Array, "focus 1 1"]:
    """Electrons on a pixel in each image (focus, 1, 1)."""
    dose = jnp.broadcast_to(jnp.asarray(series.dose), jnp.shape(series.defocus))
    return (dose * series.pixel_size**2)[:, None, None]


def expected_counts(
    field: Field, library: ColumnLibrary, series: FocalSeries, draw: Renderer | None = None
) -> Float[Array, "focus y x"]:
    """Expected counts [e/pixel] of a field, point-sampled at the pixels; differentiable in every float of `field`.

    dose * pixel area * (gain_f * sum_c I_{n_c}(r - r_c - s_f; defocus_f - depth_c) + background_f); waves and products in float32.

    Parameters
    ----------
    draw : Renderer, optional
        `renderer(library, series)`, when it is called more than once.
    """
    draw = renderer(library, series) if draw is None else draw
    signal = column_signal(field, library, series, draw)
    fraction = field.gain[:, None, None] * signal + background_images(field, series)
    return counts_per_fraction(series) * fraction


def counts_by_focal_variance(field: Field, library: ColumnLibrary, series: FocalSeries) -> Float[Array, "focus y x"]:
    """Derivative of the expected counts by the variance of the focal spread [e/pixel/Å^2].

    A spread of variance v averages over normal offsets of the focus. As heat in time, such a mean flows: its derivative by v is half
    the second derivative by the offset, which the splines of the library give.
    """
    draw = renderer(library, series)

    def counts(offset):
        return expected_counts(dataclasses.replace(field, focus_offset=offset), library, series, draw)

    slope = lambda offset: jax.jvp(counts, (offset,), (jnp.ones_like(offset),))[1]
    offset = jnp.asarray(field.focus_offset, float)
    return jax.jvp(slope, (offset,), (jnp.ones_like(offset),))[1] / 2


def sample_counts(
    key: jax.Array, field: Field, library: ColumnLibrary, series: FocalSeries
) -> Int[Array, "focus y x"]:
    """Poisson counts of a field."""
    return jax.random.poisson(key, jnp.maximum(expected_counts(field, library, series), 0.0))
