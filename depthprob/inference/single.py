"""Library maximum likelihood, or least squares, for columns one by one, thousands at a time; and any estimator compared with the bound.

Each column is fitted in a patch of its own, which holds no other: what isolated columns are for when an estimator is studied. Columns
of a crystal overlap, and belong into `likelihood` or `local`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..physics.focal_series import FocalSeries
from ..physics.library import ColumnLibrary
from .gaussian_peak import fit_gaussian_peaks
from .likelihood import BACKGROUND_SHAPE, DARKEST, PRIOR_SD, _null_table

STEPS = 8  # tabulated positions per pixel; between them a second-order expansion, good to 1e-3 of the brightest pixel
FREE = ("depth", "x", "y", "log_gain", "log_background")
LARGEST_STEP = (10.0, 0.15, 0.15, 0.3, 1.5)
NEAR = 1.6  # Å from the middle of a patch along x and y: pixels enough to bring a fit close
CLOSER, WHOLE = 4, 4  # steps of scoring with these pixels, and with all; least squares, which converges more slowly, takes twice as many of the latter


class SingleFit(NamedTuple):
    """Columns fitted one by one (C,).

    Attributes
    ----------
    depth, sd : [Å]
        Maximum of likelihood times weak priors, and root of the inverse of Fisher information plus prior; of least squares its own standard deviation.
    crlb : [Å]
        Cramér-Rao bound at the estimate, what is free profiled out.
    x, y : [Å]
        From the centre of the patch.
    gain, background :
        Factor on the signal; fraction of the beam.
    goodness_of_fit :
        Deviance over the patch, standardised by its own null mean and variance: about N(0, 1).
    converged : bool
        The last step was under 1 % of a standard deviation.
    """

    depth: np.ndarray
    sd: np.ndarray
    crlb: np.ndarray
    x: np.ndarray
    y: np.ndarray
    gain: np.ndarray
    background: np.ndarray
    goodness_of_fit: np.ndarray
    converged: np.ndarray


class _Tables(NamedTuple):
    """Basis images and their derivatives 1, x, y, xx, xy, yy on the pixels of a patch, for every tabulated position.

    values (offset y, offset x, kind, R, pixel) float32; positions (offset,) [Å].
    """

    values: jax.Array
    positions: jax.Array


def _tables(library: ColumnLibrary, pixel: float, shape: tuple[int, int]) -> _Tables:
    n_y, n_x = library.images.shape[1:]
    spectra = np.fft.fft2(np.asarray(library.images, float)) / (n_y * n_x)
    offsets = (np.arange(STEPS + 1) / STEPS - 0.5) * pixel

    def waves(n_fine: int, n: int):
        """Fourier sums at a patch's pixels minus each offset, and their first and second derivatives by the offset."""
        q = np.fft.fftfreq(n_fine, library.pixel)
        at = (np.arange(n) - (n - 1) / 2) * pixel
        base = np.exp(2j * np.pi * (at[None, :, None] - offsets[:, None, None]) * q)
        return [base * (-2j * np.pi * q) ** k for k in range(3)]

    wave_y, wave_x = waves(n_y, shape[0]), waves(n_x, shape[1])
    along_y = [np.einsum("oya,rab->oryb", w, spectra, optimize=True) for w in wave_y]
    pairs = ((0, 0), (0, 1), (1, 0), (0, 2), (1, 1), (2, 0))
    kinds = [np.einsum("oryb,pxb->opryx", along_y[ky], wave_x[kx], optimize=True).real for ky, kx in pairs]
    values = np.stack(kinds, 2).reshape(len(offsets), len(offsets), 6, len(spectra), -1)
    return _Tables(jnp.asarray(values, jnp.float32), jnp.asarray(offsets))


def _rate_and_derivatives(theta, n, library, tables, defocus, scale):
    """Expected counts (F, pixel) and derivatives by `FREE` (5, F, pixel), float32."""
    depth, x, y, log_gain, log_background = theta
    spacing = tables.positions[1] - tables.positions[0]
    nearest = lambda v: jnp.clip(jnp.round((v - tables.positions[0]) / spacing), 0, STEPS).astype(int)
    i, j = nearest(y), nearest(x)
    dx, dy = (x - tables.positions[j]).astype(jnp.float32), (y - tables.positions[i]).astype(jnp.float32)
    b, bx, by, bxx, bxy, byy = tables.values[i, j]
    image = b + dx * bx + dy * by + 0.5 * (dx**2 * bxx + dy**2 * byy) + dx * dy * bxy
    weights, slopes = jax.jvp(lambda d: library.weights(n[None], (defocus - d)[None])[0], (depth,), (jnp.ones_like(depth),))
    weights, slopes = weights.astype(jnp.float32), slopes.astype(jnp.float32)
    signal = scale * jnp.exp(log_gain).astype(jnp.float32)
    background = scale * jnp.exp(log_background).astype(jnp.float32)
    bright = signal * (weights @ image)
    by_depth = signal * (slopes @ image)
    by_x = signal * (weights @ (bx + dx * bxx + dy * bxy))
    by_y = signal * (weights @ (by + dy * byy + dx * bxy))
    rate = jnp.maximum(bright + background, DARKEST)
    return rate, jnp.stack([by_depth, by_x, by_y, bright, jnp.broadcast_to(background, bright.shape)])


@partial(jax.jit, static_argnames="least_squares")
def _fit(patches, near, n, start, scan, free, library, tables, defocus, scale, null, least_squares):
    """Estimates (C, 5), covariances (C, 5, 5), Fisher matrices (C, 5, 5), last steps (C,) in standard deviations, and goodness of fit (C,).

    A scan of the depth and the first steps see the pixels `near` alone; all but the estimate is of the point before the last step. Sums in float64 under x64.
    """
    prior = jnp.array([PRIOR_SD["depth"] ** -2, PRIOR_SD["x"] ** -2, PRIOR_SD["y"] ** -2, PRIOR_SD["log_gain"] ** -2, BACKGROUND_SHAPE])
    limit = jnp.array(LARGEST_STEP)
    known = jnp.diag(prior * free + 1.0 - free)
    tables_near = tables._replace(values=tables.values[..., near])

    def one(item):
        counts, n, start = item
        even = jnp.mean(counts)  # every pixel's variance, to least squares

        def log_likelihood(depth):
            rate, _ = _rate_and_derivatives(start.at[0].set(depth), n, library, tables_near, defocus, scale)
            seen = counts[:, near]
            each = -((seen - rate) ** 2) / (2 * even) if least_squares else seen * jnp.log(rate) - rate
            return jnp.sum(each, dtype=float)

        def step(theta, counts, tables):
            """The next estimate, its distance in standard deviations, and what it was made from: derivatives (5, pixel) over the root of the variance taken for each pixel's, that root, and expected counts."""
            rate, rows = _rate_and_derivatives(theta, n, library, tables, defocus, scale)
            root = jnp.sqrt(jnp.full_like(rate, even) if least_squares else rate).ravel()
            rows = rows.reshape(5, -1) * free[:, None].astype(jnp.float32) / root
            score = jnp.sum(rows * ((counts - rate).ravel() / root), 1, dtype=float)
            slope = jnp.where(jnp.arange(5) == 4, BACKGROUND_SHAPE, -prior * (theta - start.at[0].set(0.0)))
            hessian = (rows @ rows.T).astype(float) + known
            move = jnp.clip(jnp.linalg.solve(hessian, score + slope * free), -limit, limit)
            return theta + move, jnp.sqrt(move @ hessian @ move), (rows, root, rate)

        theta = start.at[0].set(scan[jnp.argmax(jax.lax.map(log_likelihood, scan))])
        theta = jax.lax.fori_loop(0, CLOSER, lambda _, theta: step(theta, counts[:, near], tables_near)[0], theta)
        theta = jax.lax.fori_loop(0, (1 + least_squares) * WHOLE - 1, lambda _, theta: step(theta, counts, tables)[0], theta)
        theta, last, (rows, root, rate) = step(theta, counts, tables)
        information = lambda factor: ((rows * factor) @ (rows * factor).T).astype(float)
        ratio = jnp.sqrt(rate).ravel() / root
        inverse = jnp.linalg.inv(information(jnp.ones_like(root)) + known)
        return theta, inverse @ (information(ratio) + known) @ inverse, information(1 / ratio), last, _goodness(counts, rate, null)

    return jax.lax.map(one, (patches, n, start))


def _goodness(counts, rate, null):
    """Deviance of all pixels, standardised by its null mean and variance; `null` as of `likelihood._null_table`, even in the logarithm."""
    logarithm = jnp.log(rate)
    place = (logarithm - null[0, 0]) / (null[0, 1] - null[0, 0])
    below = jnp.clip(place.astype(int), 0, null.shape[1] - 2)
    mean, variance = null[1:, below] + (place - below) * (null[1:, below + 1] - null[1:, below])
    deviance = 2 * (jnp.where(counts > 0, counts * (jnp.log(jnp.maximum(counts, 1e-30)) - logarithm), 0.0) - counts + rate)
    return jnp.sum(deviance - mean, dtype=float) / jnp.sqrt(jnp.sum(variance, dtype=float))


def fit_single_columns(
    patches: Float[np.ndarray, "column focus y x"],
    n_atoms: Int[np.ndarray, " column"],
    library: ColumnLibrary,
    series: FocalSeries,
    free: tuple[str, ...] = ("positions", "background"),
    background: float = 1e-3,
    deepest: float = 100.0,
    least_squares: bool = False,
) -> SingleFit:
    """Depths of isolated columns by maximum likelihood: a scan of the depth, then Fisher scoring. Run under `jax.enable_x64(True)`.

    Parameters
    ----------
    patches : (C, F, ny, nx)
        Counts [e/pixel], the column within half a pixel of the patch's centre.
    series : FocalSeries
        Of one patch.
    free : some of "positions", "gain", "background"
        Beside the depth. What is held is at the centre, one, and `background`.
    background : float
        Fraction of the beam, start or fixed value; one number for all images of a column.
    deepest : float
        |depth| up to which the scan looks [Å].
    least_squares : bool
        Instead take every pixel for equally uncertain; the error bars are of Poisson counts all the same.
    """
    words = {"positions": (1, 2), "gain": (3,), "background": (4,)}
    unknown = [w for w in free if w not in words]
    if unknown:
        raise ValueError(f"free names {unknown[0]!r}; allowed for single columns are {', '.join(words)}.")
    mask = np.zeros(5)
    mask[[0, *(k for w in free for k in words[w])]] = 1
    tables = _tables(library, series.pixel_size, series.shape)
    count = len(n_atoms)
    start = np.tile([0.0, 0.0, 0.0, 0.0, np.log(background)], (count, 1))
    scan = np.arange(-deepest, deepest + 1, 20.0)
    scale = (np.broadcast_to(np.asarray(series.dose, float), np.shape(series.defocus)) * series.pixel_size**2)[:, None]
    y, x = (np.arange(n) - (n - 1) / 2 for n in series.shape)
    near = np.flatnonzero((abs(y[:, None]) * series.pixel_size <= NEAR) & (abs(x) * series.pixel_size <= NEAR))
    flat = np.asarray(patches, np.float32).reshape(count, len(scale), -1)
    theta, covariance, fisher, last, goodness = (
        np.asarray(a) for a in _fit(
            jnp.asarray(flat), jnp.asarray(near), jnp.asarray(n_atoms), jnp.asarray(start), jnp.asarray(scan), jnp.asarray(mask), library, tables,
            jnp.asarray(series.defocus, float), jnp.asarray(scale, jnp.float32), jnp.asarray(_null_table(1.2 * float(flat.max()) + 10.0), jnp.float32), least_squares,
        )
    )  # fmt: skip
    chosen = np.flatnonzero(mask)
    bound = np.sqrt(np.linalg.inv(fisher[:, chosen][:, :, chosen])[:, 0, 0])
    return SingleFit(theta[:, 0], np.sqrt(covariance[:, 0, 0]), bound, theta[:, 1], theta[:, 2], np.exp(theta[:, 3]), np.exp(theta[:, 4]), goodness, last < 0.01)


class Comparison(NamedTuple):
    """How one estimator does on isolated columns of one kind.

    Attributes
    ----------
    estimator : str
    n_atoms : int
    dose : float
        [e/Å^2] per image.
    series : int
        Simulated.
    failed : int
        Without an estimate (nan); left out of the rest.
    bias, bias_error : float
        Mean error and its standard error [Å].
    sd, sd_error : float
        Of the errors [Å].
    crlb : float
        Bound with the positions and background of the simulation free [Å].
    covered : float
        Share of true depths within the estimator's own 90 % interval; nan for one that states none.
    """

    estimator: str
    n_atoms: int
    dose: float
    series: int
    failed: int
    bias: float
    bias_error: float
    sd: float
    sd_error: float
    crlb: float
    covered: float


Estimator = Callable[[np.ndarray, np.ndarray, ColumnLibrary, FocalSeries], "np.ndarray | tuple[np.ndarray, np.ndarray]"]


def library_maximum(patches, n_atoms, library, series):
    """`fit_single_columns` as an estimator."""
    fit = fit_single_columns(patches, n_atoms, library, series)
    return fit.depth, fit.sd


def library_least_squares(patches, n_atoms, library, series):
    """`fit_single_columns` by least squares as an estimator."""
    fit = fit_single_columns(patches, n_atoms, library, series, least_squares=True)
    return fit.depth, fit.sd


def gaussian_peak(patches, n_atoms, library, series):
    """The paper's method as an estimator, one column a patch, at the true positions."""
    count, n_foci, ny, nx = patches.shape
    centre = np.array([[(nx - 1) / 2, (ny - 1) / 2]]) * series.pixel_size
    scale = (np.broadcast_to(np.asarray(series.dose, float), (n_foci,)) * series.pixel_size**2)[:, None, None]
    side_by_side = np.concatenate(list(patches), 2) / scale  # patches in one wide image
    positions = centre + np.arange(count)[:, None] * np.array([[nx * series.pixel_size, 0.0]])
    fit = fit_gaussian_peaks(side_by_side, positions, n_atoms, library, series, np.zeros((n_foci, 2)), radius=1.0)
    return fit.depth, fit.sd


ESTIMATORS: dict[str, Estimator] = {"library maximum likelihood": library_maximum, "library least squares": library_least_squares, "Gaussian peak": gaussian_peak}


def compare_estimators(
    library: ColumnLibrary,
    defocus: np.ndarray,
    n_atoms: tuple[int, ...],
    doses: tuple[float, ...],
    estimators: dict[str, Estimator] | None = None,
    series_count: int = 1000,
    depth_range: float = 10.0,
    background: float = 1e-3,
    pixel: float = 0.4,
    half_field: float = 4.0,
    seed: int = 0,
    batch: int = 500,
    progress: Callable = lambda items, **_: items,
) -> list[Comparison]:
    """Simulate isolated columns at random depths and positions, and hold every estimator's errors against the Cramér-Rao bound.

    Data and estimators share one library, so this studies statistics; model error is the business of whole particles. Run under x64.

    Parameters
    ----------
    estimators : {name: function}
        Functions of counts (S, F, ny, nx), atom numbers (S,), library and series, that return depths (S,) [Å] or depths and their
        standard deviations; `ESTIMATORS` by default.
    depth_range : float
        Depths are uniform within plus or minus this [Å].
    """
    estimators = estimators or ESTIMATORS
    side = 2 * int(np.ceil(half_field / pixel)) + 1
    tables = _tables(library, pixel, (side, side))
    rng = np.random.default_rng(seed)
    rows = []
    for n in n_atoms:
        for dose in progress(doses, desc=f"{n} atoms", unit="dose"):
            series = FocalSeries(np.asarray(defocus, float), pixel, np.full(len(defocus), float(dose)), (side, side))
            depth = rng.uniform(-depth_range, depth_range, series_count)
            bounds, found = [], {name: [] for name in estimators}
            for part in np.array_split(np.arange(series_count), max(1, series_count // batch)):
                at = np.column_stack([depth[part], rng.uniform(-0.1, 0.1, (len(part), 2)) * pixel, np.zeros(len(part)), np.full(len(part), np.log(background))])
                rate, fisher = (np.asarray(a) for a in _expected(jnp.asarray(at), jnp.asarray(n), library, tables, jnp.asarray(series.defocus), jnp.float32(dose * pixel**2)))
                bounds.append(np.linalg.inv(fisher)[:, 0, 0])
                counts = rng.poisson(rate).reshape(len(part), len(defocus), side, side)
                for name, estimator in estimators.items():
                    result = estimator(counts, np.full(len(part), n), library, series)
                    found[name].append(result if isinstance(result, tuple) else (result, np.full(len(part), np.nan)))
            bound = float(np.sqrt(np.mean(np.concatenate(bounds))))
            rows += [_compared(name, n, float(dose), depth, *(np.concatenate(a) for a in zip(*parts, strict=True)), bound) for name, parts in found.items()]
    return rows


@jax.jit
def _expected(theta, n, library, tables, defocus, scale):
    """Expected counts of columns and their Fisher matrices over depth, x, y and log background."""

    def one(theta):
        rate, rows = _rate_and_derivatives(theta, n, library, tables, defocus, scale)
        rows = rows[jnp.array([0, 1, 2, 4])].reshape(4, -1) * jax.lax.rsqrt(rate).ravel()
        return rate, (rows @ rows.T).astype(float)

    return jax.lax.map(one, theta)


def _compared(name: str, n: int, dose: float, truth: Array, depth: np.ndarray, sd: np.ndarray, bound: float) -> Comparison:
    good = np.isfinite(depth)
    error = (depth - truth)[good]
    m = len(error)
    spread = float(error.std(ddof=1))
    fourth = np.mean((error - error.mean()) ** 4) / spread**4
    covered = np.mean(abs(error) < 1.6449 * sd[good]) if np.isfinite(sd[good]).all() else np.nan
    return Comparison(
        name, int(n), dose, len(depth), int((~good).sum()), float(error.mean()), spread / np.sqrt(m), spread,
        spread * float(np.sqrt(max(fourth - 1, 0.0) / m)) / 2, bound, float(covered),
    )  # fmt: skip
