"""A library of isolated columns: the focal series of 1 to n_max atoms as a few images times smooth functions of defocus minus depth.

An isolated rigid column moved by d gives counts(f; d) = counts(f - d; 0), and its intensity is band-limited in defocus as well as
laterally, so one set of some fifteen images serves all atom numbers and all depths (singular value decomposition of the series).
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int
from scipy.special import j0

from ..errors import InputError
from ..storage import load_arrays, save_arrays
from .column_images import at_points, column_profiles, images_of_profiles, is_round, plane_wave_images
from .electron import wavelength
from .gram import ColumnGram, legendre_nodes
from .optics import Microscope

CLOSED_FORM_ERROR = 0.01  # Å of depth, generously: finer grids move those of one and of five atoms of gold by 0.0004 Å


class ColumnLibrary(eqx.Module):
    """Focal series of isolated columns, low-rank in (atom number, defocus - depth).

    Attributes
    ----------
    images : (R, Y, X) float
        Basis images, fraction of the beam, on pixels of `pixel` Å; the column sits at the corner pixel (0, 0), the images wrap around.
    coefficients : (n_max, K, R) float
        Cubic B-spline coefficients of the weights over defocus - depth + centre, on knots z_start + z_step * (i - 1).
    cross_section : (n_max,)
        Integral of the fraction over the image [Å^2].
    depth_error : (n_max,)
        Standard deviation of a depth fitted with this library [Å]: numerical, or Monte-Carlo from the spread of independent scramblings.
    centre : (n_max,)
        Centre of mass of each column in the frame of the sweep that made it [Å].
    """

    images: Float[Array, "rank y x"]
    coefficients: Float[Array, "n knot rank"]
    cross_section: np.ndarray
    depth_error: np.ndarray
    centre: np.ndarray
    pixel: float = eqx.field(static=True)
    z_start: float = eqx.field(static=True)
    z_step: float = eqx.field(static=True)
    element: str = eqx.field(static=True)
    spacing: float = eqx.field(static=True)
    source_fwhm: float = eqx.field(static=True)
    band_limit: float = eqx.field(static=True)

    @property
    def n_max(self) -> int:
        return self.coefficients.shape[0]

    @property
    def z_range(self) -> tuple[float, float]:
        end = self.z_start + self.z_step * (self.coefficients.shape[1] - 3)
        return self.z_start - float(self.centre[0]), end - float(self.centre[-1])

    @property
    def planes(self) -> np.ndarray:
        """Depths of the crossover below the frame of the sweep, at which coefficients interpolate [Å]."""
        return self.z_start + self.z_step * np.arange(self.coefficients.shape[1] - 2)

    @partial(jax.jit, inline=True)
    def weights(self, n: Int[Array, " column"], z: Float[Array, "column ..."]) -> Float[Array, "column ... rank"]:
        """Weights of the basis images for columns of n atoms at z = defocus - depth [Å], held constant outside `z_range`."""
        n_knots = self.coefficients.shape[1]
        centre = jnp.asarray(self.centre)[n - 1].reshape(n.shape + (1,) * (z.ndim - 1))
        t = jnp.clip((z + centre - self.z_start) / self.z_step, 0.0, n_knots - 3 - 1e-6)
        i = jnp.floor(t).astype(int)
        u = (t - i)[..., None]
        c = jnp.asarray(self.coefficients)
        row = (n - 1).reshape(n.shape + (1,) * (z.ndim - 1))
        b = ((1 - u) ** 3, 3 * u**3 - 6 * u**2 + 4, -3 * u**3 + 3 * u**2 + 3 * u + 1, u**3)
        return sum(b[j] * c[row, i + j] for j in range(4)) / 6

    def images_q(self, qx: Float[Array, " x"], qy: Float[Array, " y"]) -> Complex[Array, "rank y x"]:
        """Continuous Fourier transform of the basis images [Å^2] at frequencies qx, qy [1/Å], zero above the band limit."""
        images = np.asarray(self.images)
        y, x = (np.fft.fftfreq(m, 1 / m) * self.pixel for m in images.shape[1:])
        ex = np.exp(-2j * np.pi * np.outer(x, qx)) * self.pixel
        ey = np.exp(-2j * np.pi * np.outer(np.asarray(qy), y)) * self.pixel
        spectra = np.einsum("ay,ryx,xb->rab", ey, images, ex, optimize=True)
        inside = np.hypot(np.asarray(qy)[:, None], np.asarray(qx)) <= self.band_limit
        return np.where(inside, spectra, 0).astype(np.complex64)

    def series(self, n: int, z: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Images (Z, Y, X) of the column of n atoms at z = defocus - depth, at pixels x, y [Å] from the column; exact, by Fourier sum."""
        basis = at_points(np.asarray(self.images), self.pixel, x, y)
        z = np.atleast_1d(np.asarray(z, float))
        return np.tensordot(np.asarray(self.weights(np.array([n]), z[None]))[0], basis, 1)

    def save(self, path: str | Path, **beside) -> None:
        """Write as npz, whole or not at all, with whatever arrays shall stand beside."""
        _save(path, self, **beside)

    @classmethod
    def load(cls, path: str | Path) -> "ColumnLibrary":
        """Read what `save` wrote.

        Raises
        ------
        InputError
            Missing, damaged, of another version, or holding arrays that no library has.
        """
        library = _load(path, cls)
        rank, many = np.shape(library.images)[:1], np.shape(library.coefficients)[:1]
        shapes = {"images": (*rank, -1, -1), "coefficients": (*many, -1, *rank), "cross_section": many, "depth_error": many, "centre": many}
        shapes |= dict.fromkeys(("pixel", "z_start", "z_step", "spacing", "source_fwhm", "band_limit"), ())
        for name, shape in shapes.items():
            value = np.asarray(getattr(library, name))
            fits = value.ndim == len(shape) and value.size > 0 and all(want in (-1, n) for want, n in zip(shape, value.shape, strict=True))
            if not fits or value.dtype.kind not in "iuf" or np.isinf(value).any() or (name != "depth_error" and np.isnan(value).any()):
                raise InputError(f"{str(path)!r} is no column library: its {name} is {value.dtype}{value.shape}, or not all finite. Build it again.")
        if min(library.pixel, library.z_step, library.spacing, library.band_limit) <= 0 or library.coefficients.shape[1] < 4:
            raise InputError(f"{str(path)!r} is no column library: its pixels, steps of depth and spacing must be above zero, and its depths at least two. Build it again.")
        return library


def library_from_gram(
    source: ColumnGram,
    microscope: Microscope,
    z_range: tuple[float, float],
    z_step: float = 5.0,
    tolerance: float = 2e-5,
    image_cell: float | None = None,
) -> ColumnLibrary:
    """Library of columns for one setting of the lens: any convergence angle up to the one G was built for, aberrations, source size.

    Parameters
    ----------
    z_range : (low, high)
        Range of defocus - depth [Å].
    tolerance : float
        Largest error of the low-rank form relative to the brightest pixel.
    """
    lam = float(wavelength(microscope.energy))
    aperture = float(microscope.convergence_angle) * 1e-3 / lam
    if aperture > source.aperture * (1 + 1e-6):
        raise ValueError(
            f"convergence_angle is {float(microscope.convergence_angle):g} mrad, but the Gram matrix holds angles up to "
            f"{source.aperture * lam * 1e3:g} mrad. Build it for the larger angle."
        )
    n_max = source.n_max
    centre = source.centre_of_mass
    first = z_range[0] + centre[0]
    plane = np.arange(first, z_range[1] + centre[-1] + z_step, z_step)
    widest = max(abs(z_range[0]), abs(z_range[1]))
    cell = image_cell or 2 * (1e-3 * float(microscope.convergence_angle) * widest + 7.0)
    size = int(np.ceil(4.1 * aperture * cell / 2)) * 2
    measure, area, to_images = _measurement(source, microscope, cell, size)
    images = measure(source.blocks.mean(0), plane)
    basis, weights = low_rank(images.reshape(n_max * len(plane), -1), tolerance, area)
    weights = weights.reshape(n_max, len(plane), -1)
    return ColumnLibrary(
        images=to_images(basis).astype(np.float32),
        coefficients=np.stack([natural_spline(w) for w in weights]),
        cross_section=images[:, np.argmin(abs(plane))] @ area,
        depth_error=depth_error(source, measure, images, area, plane),
        centre=centre,
        pixel=float(cell / size),
        z_start=float(plane[0]),
        z_step=float(z_step),
        element=source.element,
        spacing=source.spacing,
        source_fwhm=float(microscope.source_fwhm),
        band_limit=float(2 * aperture),
    )


def _measurement(source: ColumnGram, microscope: Microscope, cell: float, size: int):
    """How images are held while a library is made: (grams of 1 ... n_max atoms, plane) -> (gram, z, point); area of each point [Å^2]; points -> images.

    Points are radii about the column where lens, column and detector are round, else pixels, the column's centre of mass at pixel (0, 0).
    The source's width is in them.
    """
    modes = source.modes
    if source.is_whole or not is_round(microscope):
        q = np.fft.fftfreq(size, cell / size)
        to_centre = np.exp(2j * np.pi * (source.leaning[:, 1, None, None] * q[:, None] + source.leaning[:, 0, None, None] * q))[:, None]

        def measure(grams, plane):
            images = plane_wave_images(grams, modes, microscope, plane, cell, size)
            if any(source.tilt):
                images = np.fft.ifft2(np.fft.fft2(images) * to_centre).real
            return images.reshape(len(grams), len(plane), -1)

        return measure, np.full(size**2, (cell / size) ** 2), lambda basis: basis.reshape(-1, size, size)
    end = cell
    one = column_profiles(np.zeros((1, modes.order + 1, modes.block_size, modes.block_size)), modes, microscope, np.zeros(1), end)
    aperture = float(microscope.convergence_angle) * 1e-3 / float(wavelength(microscope.energy))
    q, w_q = legendre_nodes(2 * aperture, int(10 * aperture * end) + 40)
    s = float(microscope.source_fwhm) / np.sqrt(8 * np.log(2))
    kernel = j0(2 * np.pi * np.outer(one.r, q))
    blur = (kernel * one.area[:, None]) @ (np.exp(-2 * (np.pi * s * q) ** 2) * 2 * np.pi * q * w_q * kernel).T
    measure = lambda grams, plane: column_profiles(grams, modes, microscope, plane, end).values @ blur
    sharp = eqx.tree_at(lambda m: m.source_fwhm, microscope, 0.0)
    return measure, one.area, lambda basis: images_of_profiles(basis, one, sharp, cell, size)


def low_rank(flat: np.ndarray, tolerance: float, area: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fewest rows `basis` and `weights` with |flat - weights @ basis| < tolerance * max |flat|; each basis row peaks at one.

    Singular vectors of the images under the inner product of the image plane, points weighing by their `area`.
    """
    weighted = flat.astype(np.float64) * np.sqrt(area)
    few = weighted.shape[0] < weighted.shape[1]
    values, vectors = np.linalg.eigh(weighted @ weighted.T if few else weighted.T @ weighted)
    vectors = vectors[:, ::-1]
    for rank in range(6, len(values) + 1):
        weights = vectors[:, :rank] if few else weighted @ vectors[:, :rank]
        basis = np.linalg.lstsq(weights, flat, rcond=None)[0]
        if abs(flat - weights @ basis).max() < tolerance * abs(flat).max():
            break
    scale = np.abs(basis).max(1)
    return basis / scale[:, None], weights * scale


def depth_error(source: ColumnGram, measure: Callable, images: np.ndarray, area: np.ndarray, plane: np.ndarray) -> np.ndarray:
    """Sd of the depth that this library gives, per atom number [Å]: its Monte-Carlo error, or `CLOSED_FORM_ERROR`.

    The step of a Poisson-weighted fit from each scrambling's images to the mean's (n, z, point), amplitude profiled out; sd of the steps
    over the root of the number of scramblings. Foci every 20 Å within 200 Å. `measure` and `area` as of `_measurement`.
    """
    scramblings = source.blocks.shape[0]
    if source.configurations == math.inf:
        return np.full(source.n_max, CLOSED_FORM_ERROR)
    if scramblings < 2:
        return np.full(source.n_max, np.nan)
    stride = max(1, round(20.0 / (plane[1] - plane[0])))
    chosen = np.flatnonzero(abs(plane) <= 200.0)[1:-1:stride]
    chosen = chosen[(chosen > 0) & (chosen < len(plane) - 1)]
    reference = images[:, chosen]
    slope = (images[:, chosen - 1] - images[:, chosen + 1]) / (plane[2] - plane[0])
    weight = area / np.maximum(reference, 1e-4 * reference.max())
    inner = lambda a, b: (a * b * weight).sum((1, 2), dtype=np.float64)
    ss, sa, aa = inner(slope, slope), inner(slope, reference), inner(reference, reference)
    steps = []
    for blocks in source.blocks:
        delta = measure(blocks, plane[chosen]) - reference
        steps.append((aa * inner(slope, delta) - sa * inner(reference, delta)) / (ss * aa - sa**2))
    return np.std(steps, axis=0, ddof=1) / np.sqrt(scramblings)


def natural_spline(values: np.ndarray) -> np.ndarray:
    """Uniform cubic B-spline coefficients (m + 2, ...) through values (m, ...), second derivative zero at the ends."""
    m = len(values)
    banded = np.zeros((m + 2, m + 2))
    banded[0, :3] = banded[-1, -3:] = (1, -2, 1)
    for i in range(m):
        banded[i + 1, i : i + 3] = np.array([1, 4, 1]) / 6
    padded = np.pad(values, [(1, 1)] + [(0, 0)] * (values.ndim - 1))
    return np.linalg.solve(banded, padded.reshape(m + 2, -1)).reshape(padded.shape)


def save_gram(path: str | Path, gram: ColumnGram) -> None:
    """Write a Gram matrix as npz, whole or not at all."""
    _save(path, gram)


def load_gram(path: str | Path) -> ColumnGram:
    """Read what `save_gram` wrote."""
    return _load(path, ColumnGram)


def arrays_of(module: ColumnGram | ColumnLibrary) -> dict[str, np.ndarray]:
    """Every field by name, as an array."""
    return {f.name: np.asarray(getattr(module, f.name)) for f in dataclasses.fields(module)}


def module_of(cls, arrays: dict[str, np.ndarray]):
    """What `arrays_of` gave, or the part of it that has no default."""
    static = lambda v: tuple(v.tolist()) if v.ndim else v.item()
    return cls(**{f.name: static(arrays[f.name]) if f.metadata.get("static") else arrays[f.name] for f in dataclasses.fields(cls) if f.name in arrays})


def _save(path, module, **beside) -> None:
    save_arrays(path, **arrays_of(module), **beside)


def _load(path, cls):
    saved = load_arrays(path)
    missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in saved]
    if missing:
        raise InputError(f"{str(path)!r} holds {sorted(saved)}, but no {', '.join(missing)}: it is no {cls.__name__}, or one of another version. Build it again.")
    return module_of(cls, saved)
