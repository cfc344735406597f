"""Atom counts and the joint fit of a field, in turn until they agree, and the depths that come of it."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from scipy.ndimage import correlate, maximum_filter
from scipy.spatial import cKDTree

from .. import processes
from ..config import Config
from ..inference import likelihood, local
from ..inference.counts import marginal_draws, mean_square_shift
from ..inference.drawing import windows_about
from ..inference.gaussian_peak import PeakFit
from ..inference.goodness import over_dispersed
from ..inference.likelihood import Amplitudes, Estimate, Share
from ..inference.posterior import Posterior
from ..inference.problem import AFFINE, DARKEST, LARGE, PER_COLUMN, WIDE, Problem, field_of, make_problem
from ..physics.focal_series import Field, FocalSeries, background_images, counts_per_fraction
from ..physics.library import ColumnLibrary
from .columns import peak_offsets
from .counting import Counts, count_by_library
from .drift import shift_images
from .lattice import nearest_distance
from .libraries import column_geometry, read_variance_of

LOOKS, FIXED_SECONDS = 150, 60.0  # at all images, counting Fisher matrices as so many; and what a reconstruction takes besides
ROUNDS = 20  # of counting, fitting, looking for hidden columns and taking off what superposition lacks
HOP = 1.75  # Å, from an image's shift to where another is looked for
CLEAR = 3.0  # of the log-likelihood, that another shift has to gain
SHARPEST = 8  # images that hidden columns are looked for in
SETTLED = 2e-3  # of the counts may change once more: in fields of hundreds some columns always lie halfway
RECKONINGS, FEW = 3, 0.1  # of what superposition lacks, at most, and until no larger share of the counts changes
HELD = 0.5  # of what superposition lacks, that the residuals hold where it is not a sum of isolated columns
LIBRARY_ERROR = 0.015  # relative, of cross-sections: what superposition and thermal model leave
SCALE_SD = 0.05  # of a factor common to all cross-sections
NINETY = 1.6449  # standard deviations that hold 90 % of a normal distribution
PRIOR_OF = {  # parameters behind the config's words
    "depth_A": ("depth",), "position_A": ("x", "y"), "gain": ("log_gain",), "background": ("log_background",), "image_shift_A": ("shift_x", "shift_y"),
    "focus_offset_A": ("focus_offset",), "focus_step": ("focus_step",), "source_variance_A2": ("source_variance",), "image_distortion": AFFINE,
    "focal_variance_A2": ("focal_spread",), "debye_waller_B_A2": ("debye_waller_B",),  # of bounds alone
}  # fmt: skip


class JointFit(NamedTuple):
    """A field fitted with the atom counts that its own intensities ask for.

    Attributes
    ----------
    problem, estimate
    counts : Counts
        With the probability of every number of atoms.
    amplitudes : Amplitudes
        Factors on the columns' signals that are left.
    settled : bool
        Whether counts and fit agree.
    lacking : (F, ny, nx), or zero
        What the problem's counts are less than those measured.
    refused : Share, optional
        What share of it the residuals of a fit without it hold, where that is so little that nothing was taken off.
    """

    problem: Problem
    estimate: Estimate
    counts: Counts
    amplitudes: Amplitudes
    settled: bool
    lacking: np.ndarray | float = 0.0
    refused: Share | None = None

    @property
    def reader(self):
        return reader_of(self.problem)


class Depths(NamedTuple):
    """Of each column (C,) [Å]: mean, standard deviation, and the ends of the 90 % interval."""

    mean: np.ndarray
    sd: np.ndarray
    low: np.ndarray
    high: np.ndarray


def starting_depths(peaks: PeakFit, vague: float = 15.0) -> np.ndarray:
    """Depths (C,) [Å] of Gaussian peaks; of columns where that failed or is as `vague` [Å], the median of the others'. Zero if no peak tells."""
    tells = np.isfinite(peaks.depth) & (peaks.sd < vague)
    return np.where(tells, peaks.depth, np.median(peaks.depth[tells])) if tells.any() else np.zeros(len(tells))


class Forecast(NamedTuple):
    """What a joint fit will take."""

    seconds: float
    gigabytes: float


def forecast(problem: Problem, draws: int, gradients: int = 0) -> Forecast:
    """Time and memory of a field fitted window by window, with so many draws of its posterior and gradients, each on one device, for them: from what one image takes here and now."""
    image, windows = np.array([len(problem.series.defocus) // 4]), windows_about(problem.start, problem)
    local.evaluate(problem.start, problem, windows, image)  # compiles
    start = time.perf_counter()
    local.evaluate(problem.start, problem, windows, image)
    one = time.perf_counter() - start
    looks = LOOKS * len(processes.share(problem.series.defocus)) + gradients * len(problem.series.defocus) * jax.local_device_count()
    return Forecast(FIXED_SECONDS + looks * one, local.memory(problem, draws) / 1e9)


def pose(
    stack: np.ndarray, field: Field, library: ColumnLibrary, series: FocalSeries, mask: np.ndarray, config: Config, centre: dict | None = None
) -> Problem:
    """The joint fit of a stack (F, ny, nx) [e/pixel] from a starting field, as the config asks for it.

    A free focus offset and a common shift of all depths are one thing: the offset is held here.
    """
    free = tuple(name for name in config.inference.free if name != "focus_offset") + ("smooth_background",) * (config.inference.background == "smooth")
    prior_sd = {name: sd for word, sd in config.inference.prior_sd.items() for name in PRIOR_OF[word]}
    return make_problem(stack, field, library, series, free, mask, read_variance_of(config), not by_windows(len(field.n_atoms), library, series, config), prior_sd, centre)


def by_windows(n_columns: int, library: ColumnLibrary, series: FocalSeries, config: Config) -> bool:
    """Whether a field is fitted window by window: of many columns, or of few in images so wide that drawing each in all of them takes longer. SVI needs the whole."""
    pixels, widest = math.prod(series.shape), math.prod(library.images.shape[1:]) * (library.pixel / series.pixel_size) ** 2
    return n_columns > LARGE or (n_columns * (pixels - widest) > WIDE and config.inference.method != "svi")


def reader_of(problem: Problem):
    """The module that evaluates this field's likelihood: `local` window by window, or `likelihood` whole."""
    return local if problem.draw is None else likelihood


class _Agreed(NamedTuple):
    """A fit after some rounds of counting: the field with the counts that the last asked for, and what the next may start from."""

    field: Field
    problem: Problem
    mode: likelihood.Mode
    counts: Counts
    amplitudes: Amplitudes

    @property
    def changed(self) -> float:
        """Share of the columns whose counts the last round changed."""
        return float(np.mean(np.asarray(self.problem.n_atoms) != np.asarray(self.field.n_atoms)))

    def rate(self) -> np.ndarray:
        """Expected counts (F, ny, nx)."""
        return reader_of(self.problem).rates(self.mode.parameters, self.problem)


def fit_jointly(
    stack: np.ndarray, field: Field, library: ColumnLibrary, series: FocalSeries, mask: np.ndarray, config: Config, progress: Callable = lambda items, **_: items,
    lacking: Callable[[dict, Problem], np.ndarray] | None = None,
) -> JointFit:
    """Fit a stack (F, ny, nx) [e/pixel] from a starting field, its atom counts mended by the amplitudes that the fit asks for.

    Priors are centred where the field starts. What the model is `lacking` of the expected counts at an estimate is taken off the stack once that is near the maximum,
    and counts and fit are brought to agree anew; it is reckoned again where that changed many counts, on which it depends. With `inference.superposition` "auto" it is not where the
    residuals hold less than half of it, three standard deviations short of the whole: those of a series which is itself a sum of isolated columns hold none. Columns are looked for in what is left then: thick ones scatter as
    much beside them as atoms between them.
    """
    posed = lambda field, short, centre=None: pose(stack - short, field, library, series, mask, config, centre)
    dispersed = config.inference.noise == "over_dispersed"
    centre, rounds = dict(posed(field, 0.0).centre), 0

    def agree(field: Field, short: np.ndarray | float, enough: float, near: _Agreed | None = None) -> _Agreed:
        """Fits and counts in turn until they change no more than `enough` of each other, from a fit `near` to the first."""
        nonlocal rounds
        mode, amplitudes = (near.mode, near.amplitudes) if near else (None, None)
        before, still = None, np.False_  # the counts of the last round, and which are not to change any more
        while True:
            rounds += 1
            problem = posed(field, short, centre)
            mode = reader_of(problem).find_mode(problem, progress, close=likelihood.ROUGH, before=mode)
            if rounds == 1 and "shift_x" in problem.free:
                likelier = likelier_shifts(mode.parameters, problem, reader_of(problem).rates(mode.parameters, problem))
                if any(np.any(likelier[name] != mode.parameters[name]) for name in ("shift_x", "shift_y")):
                    problem = posed(field_of(likelier, problem.n_atoms), short, centre)
                    mode = reader_of(problem).find_mode(problem, progress, close=likelihood.ROUGH, before=mode)
            counts, amplitudes = recount(mode.parameters, problem, dispersed, amplitudes)
            n = np.asarray(problem.n_atoms)
            still |= (counts.n == before) & (counts.n != n)  # went there, and would go back: halfway between the two
            counts, before = counts._replace(n=np.where(still, n, counts.n)), n
            field = field_of(mode.parameters, jnp.asarray(counts.n))
            agreed = _Agreed(field, problem, mode, counts, amplitudes)
            if agreed.changed <= enough or rounds >= ROUNDS:
                return agreed

    def reckon(agreed: _Agreed) -> tuple[_Agreed, np.ndarray | float, Share | None]:
        """A fit less what the model lacks, reckoned until few counts depend on it, and what that is; or the fit as it was, and what share of it the residuals hold."""
        short: np.ndarray | float = 0.0
        if lacking is None or agreed.changed > FEW:
            return agreed, short, None
        for reckoning in range(RECKONINGS):
            reckoned = np.asarray(agreed.problem.n_atoms)
            short = lacking(agreed.mode.parameters, agreed.problem)
            if reckoning == 0 and config.inference.superposition == "auto":
                held = reader_of(agreed.problem).share_held(short, agreed.mode.parameters, agreed.problem, agreed.amplitudes)
                if held.value < min(HELD, 1 - 3 * held.sd):
                    return agreed, 0.0, held
            agreed = agree(agreed.field, short, FEW, agreed)
            if rounds >= ROUNDS or np.mean(reckoned != np.asarray(agreed.problem.n_atoms)) <= FEW:
                break
        return agreed, short, None

    agreed, short, refused = reckon(agree(field, 0.0, FEW if lacking else SETTLED))
    complete = False  # what was hidden has been found, and more
    while True:
        if agreed.changed > SETTLED and rounds < ROUNDS:
            agreed = agree(agreed.field, short, SETTLED, agreed)
        if rounds >= ROUNDS:
            break
        doubled = processes.of_first(doubled_columns(agreed.field, series, nearest_distance(column_geometry(config))))
        hidden = [] if complete or len(doubled) else processes.of_first(hidden_columns(agreed.mode.parameters, agreed.problem, agreed.rate()))
        if len(doubled):
            field, complete = without_columns(agreed.field, doubled), True
            centre |= {name: jnp.delete(centre[name], doubled) for name in PER_COLUMN}
        elif len(hidden):
            field = with_columns(agreed.field, hidden)
            centre |= {name: jnp.concatenate([centre[name], posed(field, short).centre[name][-len(hidden) :]]) for name in PER_COLUMN}
        else:
            break
        del agreed  # with its large factors, before there are new ones
        agreed = agree(field, short, SETTLED)

    problem, amplitudes, mode = posed(agreed.field, short, centre), agreed.amplitudes._replace(curvature=None), agreed.mode  # the curvature is large
    if dispersed:
        problem, mode = over_dispersed(problem, reader_of(problem).rates(mode.parameters, problem)), None
    return JointFit(problem, reader_of(problem).maximum(problem, progress, mode), agreed.counts, amplitudes, agreed.changed <= SETTLED, short, refused)


def likelier_shifts(parameters: dict, problem: Problem, rate: np.ndarray) -> dict:
    """Parameters with the image shifts that are likeliest within `HOP` of those given, by whole pixels, in the half of the images that is farthest from focus; from their expected counts `rate` (F, ny, nx).

    There a lattice moved aside looks much like itself, and drift found by correlation may start a fit beside the wrong columns. A shift is compared with the one given on the
    pixels that the fit uses and that are moved to such; those that gain less than `CLEAR` stay.
    """
    series, v, (ny, nx) = problem.series, float(problem.read_variance), problem.series.shape
    away = abs(np.asarray(series.defocus) - np.median(parameters["depth"]))
    reach = int(HOP / series.pixel_size)
    steps = np.argwhere(np.hypot(*np.mgrid[-reach : reach + 1, -reach : reach + 1]) <= reach) - reach  # y, x
    shifts = {name: np.asarray(parameters[name]).copy() for name in ("shift_y", "shift_x")}
    for i in np.flatnonzero(away > np.median(away)):
        mean = np.maximum(rate[i].astype(float), DARKEST) + v
        terms = np.stack([np.asarray(problem.mask[i], float), np.log(mean), mean])
        around = np.pad(terms, [(0, 0), (reach, reach), (reach, reach)], mode="wrap" if series.periodic else "constant")
        (used, logs, mean), counts = terms, np.asarray(problem.counts[i], float) + v
        gains = np.zeros(len(steps))
        for k, (y, x) in enumerate(steps):
            use, log, moved = around[:, reach - y : reach - y + ny, reach - x : reach - x + nx]
            gains[k] = (used * use * (counts * (log - logs) - (moved - mean))).sum() / float(problem.dispersion)
        for by, (name, values) in zip(steps.T * series.pixel_size, shifts.items(), strict=True):
            start = values[i] - float(problem.centre[name][i])
            gains += (start**2 - (start + by) ** 2) / (2 * problem.prior_sd[name] ** 2)
        best = int(np.argmax(gains))
        if gains[best] > CLEAR:
            for by, values in zip(steps[best] * series.pixel_size, shifts.values(), strict=True):
                values[i] += by
    return parameters | {name: jnp.asarray(values) for name, values in processes.of_first(shifts).items()}


def recount(parameters: dict, problem: Problem, dispersed: bool, before: Amplitudes | None = None) -> tuple[Counts, Amplitudes]:
    """Atom counts that a fit's amplitudes ask for, and the amplitudes, reckoned from those `before`; `dispersed` counts scatter more than Poisson's.

    A gain common to all images is a scale of cross-sections: left to itself it would make good a common error of the counts.
    """
    fit, library, n = reader_of(problem), problem.library, np.asarray(problem.n_atoms)
    amplitudes = fit.column_amplitudes(parameters, problem, before)
    rate = fit.rates(parameters, problem)
    noisier = over_dispersed(problem, rate).dispersion ** 0.5 if dispersed else 1.0
    cross = library.cross_section[n - 1] * common_gain(parameters, problem, rate)
    counts = count_by_library(amplitudes.value * cross, np.hypot(amplitudes.sd * noisier, LIBRARY_ERROR) * cross, library.cross_section, scale_sd=SCALE_SD)
    return processes.of_first(counts), amplitudes


def common_gain(parameters: dict, problem: Problem, rate: np.ndarray) -> float:
    """Geometric mean of the images' gains, each with the weight of what its pixels tell of it beside its background, from expected counts `rate` (F, ny, nx).

    Where a crystal fills the field, images far from focus are as even as their background, and their gains stay at the prior whatever the atom numbers.
    """
    field, series = field_of(parameters, problem.n_atoms), problem.series
    level, scale = np.asarray(background_images(field, series)), np.asarray(counts_per_fraction(series))
    told = np.zeros(len(rate))
    for i, image in enumerate(rate):  # one in double precision at a time: large fields hold many
        image = image.astype(float)
        dark = np.broadcast_to(level[i] * scale[i], image.shape)
        weight = np.asarray(problem.mask[i]) / ((np.maximum(image, DARKEST) + float(problem.read_variance)) * float(problem.dispersion))
        bright = image - dark
        among, beside, behind = ((a * b * weight).sum() for a, b in ((bright, bright), (bright, dark), (dark, dark)))
        told[i] = among - beside**2 / max(behind, DARKEST)
    return float(np.exp(np.average(np.asarray(parameters["log_gain"]), weights=np.maximum(told, 0) + DARKEST)))


def hidden_columns(parameters: dict, problem: Problem, rate: np.ndarray) -> np.ndarray:
    """Positions (m, 2) [Å] of columns that the fit lacks: thin ones beside thick ones, whose maxima the average image hides.

    The residual of the sharpest images to the fit's expected counts `rate` (F, ny, nx), through a filter matched to a single atom less its surroundings; a
    column is half an atom and six standard deviations of its noise, and a neighbour of those known: 0.6 to 1.4 of their spacing from the nearest.
    """
    series, library = problem.series, problem.library
    px, (ny, nx) = series.pixel_size, series.shape
    at = np.stack([parameters["x"], parameters["y"]], 1)
    if len(at) < 2:
        return np.empty((0, 2))
    z = np.asarray(series.defocus) - float(np.median(parameters["depth"]))
    chosen = np.argsort(abs(z))[:SHARPEST]
    electrons = (np.broadcast_to(np.asarray(series.dose), z.shape) * np.exp(parameters["log_gain"]))[chosen, None, None] * px**2
    back = -np.stack([parameters["shift_x"], parameters["shift_y"]], 1)[chosen] / px
    left = np.where(problem.mask, np.asarray(problem.counts, float) - rate, 0.0)[chosen] / electrons
    noise = ((np.maximum(rate[chosen], DARKEST) + float(problem.read_variance)) * float(problem.dispersion) / electrons**2).mean(0) / len(chosen)
    along = np.arange(-np.ceil(1.2 / px), np.ceil(1.2 / px) + 1) * px
    atom = library.series(1, z[chosen], along, along).mean(0)
    disc = np.hypot(along, along[:, None]) <= max(1.2, 1.5 * px)
    atom = np.where(disc, atom - atom[disc].mean(), 0.0)
    mode = "wrap" if series.periodic else "nearest"
    amplitude = correlate(shift_images(left, back, series.periodic).mean(0), atom, mode=mode) / (atom**2).sum()
    sd = np.sqrt(correlate(noise, atom**2, mode=mode)) / (atom**2).sum()
    peak = (amplitude == maximum_filter(amplitude, footprint=disc, mode=mode)) & (amplitude > 0.5) & (amplitude > 6 * sd)
    y, x = np.nonzero(peak)
    found = (np.stack([x, y], 1) + peak_offsets(amplitude, y, x)) * px
    size = np.array([nx, ny]) * px
    tree = cKDTree(np.mod(at, size), boxsize=size) if series.periodic else cKDTree(at)
    spacing = np.median(tree.query(tree.data, 2)[0][:, 1])
    away = tree.query(found)[0]
    near = (away > 0.6 * spacing) & (away < 1.4 * spacing)
    if not series.periodic:
        near &= ((found > 0.5) & (found < size - px - 0.5)).all(1)
    return found[near]


def with_columns(field: Field, positions: np.ndarray) -> Field:
    """A field with more columns, of one atom and as deep as their nearest neighbour."""
    nearest = cKDTree(np.asarray(field.positions)).query(positions)[1]
    return eqx.tree_at(
        lambda f: (f.positions, f.n_atoms, f.depths), field,
        (jnp.concatenate([field.positions, positions]), jnp.concatenate([field.n_atoms, jnp.ones(len(positions), int)]), jnp.concatenate([field.depths, field.depths[nearest]])),
    )


def doubled_columns(field: Field, series: FocalSeries, nearest: float) -> np.ndarray:
    """Indices of columns that stand for another's atoms: nearer to it than half of what any two are, `nearest` [Å], and of the two the one with fewer atoms."""
    at, size, n = np.asarray(field.positions), np.array(series.shape[::-1]) * series.pixel_size, np.asarray(field.n_atoms)
    tree = cKDTree(np.mod(at, size), boxsize=size) if series.periodic else cKDTree(at)
    pairs = tree.query_pairs(nearest / 2, output_type="ndarray").reshape(-1, 2)
    return np.unique(np.where(n[pairs[:, 0]] < n[pairs[:, 1]], *pairs.T))


def without_columns(field: Field, which: np.ndarray) -> Field:
    """A field with fewer columns."""
    return eqx.tree_at(lambda f: (f.positions, f.n_atoms, f.depths), field, tuple(jnp.delete(a, which, axis=0) for a in (field.positions, field.n_atoms, field.depths)))


def column_depths(posterior: Posterior, joint: JointFit, count_shifts: np.ndarray, superposition_sd: np.ndarray, seed: int, relative: bool = False) -> Depths:
    """Depths with the error bars of fit, library, superposition and uncertain counts together.

    Parameters
    ----------
    count_shifts : (C, changes)
        What a wrong count does to each depth [Å], by changes as of `counts.depth_shifts`.
    superposition_sd : (C,)
        What is not known of the sum of isolated columns [Å].
    relative : bool
        Depths less their mean.
    """
    problem, n = joint.problem, np.asarray(joint.problem.n_atoms)
    library_sd = np.hypot(np.nan_to_num(problem.library.depth_error[n - 1]), superposition_sd)
    if posterior.draws is None:
        mean = np.asarray(joint.estimate.parameters["depth"])
        sd = np.sqrt(joint.reader.depth_sd(joint.estimate, problem, relative) ** 2 + library_sd**2 + mean_square_shift(n, joint.counts.probability, count_shifts))
        mean = mean - mean.mean() * relative
        return Depths(mean, sd, mean - NINETY * sd, mean + NINETY * sd)
    draws = posterior.of("depth").reshape(-1, len(n))
    draws = draws - draws.mean(1, keepdims=True) * relative
    rng = np.random.default_rng(seed)
    draws = draws + library_sd * rng.standard_normal(draws.shape)
    draws = marginal_draws(draws, n, joint.counts.probability, count_shifts, rng)
    return Depths(draws.mean(0), draws.std(0), *np.quantile(draws, [0.05, 0.95], axis=0))
