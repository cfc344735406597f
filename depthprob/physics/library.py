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
from scipy.stats import norm, qmc

from .. import processes
from ..devices import SPREAD, WHOLE, on_all, spread
from ..errors import InputError
from ..storage import load_arrays, load_checkpoint, save_arrays, save_checkpoint
from .column_images import at_points, column_profiles, images_of_profiles, is_round, plane_wave_images
from .detector import AnnularDetector
from .electron import wavelength
from .gram import (
    ColumnGram,
    Sweep,
    default_cell,
    default_reach,
    default_sampling,
    has_full_symmetry,
    laguerre_gauss_modes,
    legendre_nodes,
    mirrored,
    prepare_sweep,
    required_sampling,
    sweep_column,
    sweep_whole,
)
from .optics import Microscope
from .specimen import Column, rms_from_debye_waller_b

LARGEST = 2e9  # bytes of Gram matrices that are no blocks
CLOSED_FORM_ERROR = 0.01  # Å of depth, generously: finer grids move those of one and of five atoms of gold by 0.0004 Å
CHEAP_ANGLE, CHEAP_CELL = 0.78, 0.71  # band limit over outer angle, and cell over accurate cell, of the cheap sweep


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


def thermal_draws(n_atoms: int, debye_waller_b: float, configurations: int, seed: int) -> np.ndarray:
    """Scrambled Sobol draws of the lateral displacements, (configuration, atom, 2) in Å; Gaussian of rms sqrt(B / 8 pi^2) per axis.

    The atoms nearest the detector vary first: the leading Sobol dimensions are the best distributed.
    """
    sobol = qmc.Sobol(2 * n_atoms, scramble=True, rng=np.random.default_rng(seed))
    uniform = sobol.random(configurations)
    u = float(rms_from_debye_waller_b(debye_waller_b))
    return u * norm.ppf(np.clip(uniform, 1e-12, 1 - 1e-12)).reshape(configurations, n_atoms, 2)


def build_gram(
    column: Column,
    energy: float,
    convergence_angle: float,
    detector: AnnularDetector,
    configurations: int = 16,
    scramblings: int = 8,
    seed: int = 0,
    parametrization: str = "lobato",
    checkpoint: str | Path | None = None,
    progress: Callable = lambda items, **_: items,
    sampling: float | None = None,
    reach: float | None = None,
    cell: float | None = None,
    corrections: int | None = None,
) -> ColumnGram:
    """Gram matrices of isolated columns of 1 to column.n_atoms atoms by frozen-phonon multislice.

    Parameters
    ----------
    column : Column
        Its n_atoms is the largest atom number of the library.
    configurations, scramblings : int
        Thermal configurations in a scrambling, and independent scramblings (at least 8 for a depth error one can trust).
    checkpoint : path, optional
        Sums are kept here every few configurations; a rerun with the same settings goes on from it.
    progress : callable
        Wraps the iteration over configurations, for instance `tqdm.tqdm`.
    corrections : int, optional
        Configurations of each scrambling that are swept at full accuracy, an eighth of them by default; all of them for no control variate.

    Notes
    -----
    Two-level Monte Carlo (Giles, Acta Numerica 24, 259 (2015)): a sweep on a smaller cell with a coarser grid costs an eighth and
    follows the same displacements almost as well, so G = mean over all configurations of the cheap sweep + mean over a few of
    accurate minus cheap. For 12 gold atoms one accurate configuration scatters a fitted depth by 1.0 Å, the difference by 0.1 to 0.2 Å.
    """
    aperture = float(convergence_angle) * 1e-3 / float(wavelength(energy))
    reach = reach or default_reach(column, convergence_angle)
    corrections = min(corrections or max(1, configurations // 8), configurations)
    modes = laguerre_gauss_modes(reach, aperture)
    is_whole = not has_full_symmetry(column, detector)
    if is_whole:
        _check_size(column, len(modes.l), scramblings)
    sampling = sampling or default_sampling(energy, detector.outermost, convergence_angle)
    cell = cell or default_cell(column, energy, aperture, reach)
    # scramblings take turns, so that what is done when interrupted is balanced
    order = [(s, c) for c in range(configurations) for s in range(scramblings)]
    devices = processes.devices_for(len(order))
    width = devices * jax.process_count()
    prepare = lambda sampling, cell: on_all(_traced(prepare_sweep(column, energy, aperture, detector, reach, parametrization, sampling, cell)), devices)
    accurate = prepare(sampling, cell)
    cheap = prepare(max(sampling, required_sampling(energy, CHEAP_ANGLE * detector.outermost)), CHEAP_CELL * cell)
    one = sweep_whole if is_whole else partial(sweep_column, modes=modes)
    each = jax.jit(spread(lambda u, sweep: one(u[0], sweep)[None], (SPREAD, WHOLE), devices))
    size = (len(modes.l),) * 2 if is_whole else (modes.order + 1, *(modes.block_size,) * 2)
    sums = np.zeros((scramblings, column.n_atoms, *size), np.complex128)
    settings = repr((column, energy, convergence_angle, detector.record, configurations, corrections, seed, parametrization, sampling, reach, cell))
    done = 0
    saved = load_checkpoint(checkpoint) if processes.is_first() else {}
    if str(saved.get("settings")) == settings:
        sums, done = saved["sums"], saved["done"]
    sums, done = processes.of_first((sums, done))
    draws = [thermal_draws(column.n_atoms, column.debye_waller_b, configurations, seed * 1000 + i) for i in range(scramblings)]
    for i in progress(range(int(done), len(order), width), desc="column library", unit="configuration", unit_scale=width):
        now = order[i : i + width]
        u = np.array([draws[s][c] + column.leaning for s, c in processes.own_part(now, devices)], np.float32)
        by_cheap = processes.gathered(each(u, cheap)) if corrections < configurations else np.zeros(width)
        by_accurate = processes.gathered(each(u, accurate)) if now[0][1] < corrections else by_cheap
        for (s, c), blocks, better in zip(now, by_cheap, by_accurate, strict=False):
            sums[s] += blocks / configurations
            if c < corrections:
                sums[s] += (better - blocks) / corrections
        end = i + len(now)
        if checkpoint and processes.is_first() and (end // 8 > i // 8 or end == len(order)):
            save_checkpoint(checkpoint, sums=sums, done=end, settings=settings)
    if is_whole and detector.is_round:
        sums = mirrored(sums, modes, column.tilt)
    return ColumnGram.of(sums, column, energy, aperture, detector, reach, configurations, parametrization)


def _check_size(column: Column, n_modes: int, scramblings: int) -> None:
    """Refuse columns whose whole Gram matrices are more than `LARGEST`."""
    need = 16 * scramblings * column.n_atoms * n_modes**2
    if need > LARGEST:
        raise InputError(
            f"columns of up to {column.n_atoms} atoms, tilted or with a detector that is not round, need {scramblings * column.n_atoms} Gram matrices of "
            f"{n_modes} waves without symmetry, {need / 1e9:.1f} GB; allowed are {LARGEST / 1e9:g} GB. Ask for fewer atoms, or for tilt [0, 0] and a round sensitivity."
        )


def _traced(sweep: Sweep) -> Sweep:
    """With the detector's pixels as an array that jit traces, so that sweeps of one shape share a compilation."""
    return sweep._replace(detected=jnp.asarray(sweep.detected))


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
