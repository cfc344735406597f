"""From a raw focal series to atoms: every stage in order, each usable alone."""

import math
import time
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial import cKDTree
from tqdm import tqdm

from .. import processes
from ..config import NUISANCES, Config
from ..errors import InputError
from ..inference import held, local
from ..inference.counts import REACH, depth_shifts
from ..inference.gaussian_peak import disc_averages, disc_radius, fit_gaussian_peaks
from ..inference.goodness import dispersion_of, goodness_of_fit, image_dispersions, leverages
from ..inference.posterior import infer, to_arviz
from ..inference.problem import AFFINE, distortions_of, places
from ..inference.sampling import gradients
from ..io import read_drift_csv
from ..physics.focal_series import Field, FocalSeries
from ..physics.library import ColumnLibrary
from ..stack import Stack
from . import quality, superposition
from .columns import ColumnFit, central_average, columns_beyond, find_columns, fit_columns
from .counting import Counts, Mixture, count_by_hybrid, count_by_library, gaussian_mixture_counts
from .drift import estimate_drift, shift_images
from .joint import SCALE_SD, by_windows, column_depths, fit_jointly, forecast, pose, starting_depths
from .lattice import lattice_stretch, nearest_distance, snap
from .libraries import atoms_needed, column_geometry, crystal_of, library_for, neighbouring_libraries, read_variance_of
from .scan import scan_residuals
from .surface import ColumnEnds, Surface, column_ends, count_variance, find_surface

LEAST_SEEN = 0.05  # of an image that unseen columns leave
GAUGE = "absolute: z = 0 is the plane in focus at defocus 0 (the focus offset is held at zero)"
GAUGE_FREE = "relative: with a free focus offset only depths relative to the field's mean are measured, and the mean of all depths is zero"


@dataclass
class Reconstruction:
    """Everything the pipeline found, as plain arrays; what report and files are written from."""

    stack: np.ndarray
    images: np.ndarray  # numbers of those used, from 0 in the series given; all that belongs to images is of these
    defocus: np.ndarray
    pixel_size: float
    dose: np.ndarray
    element: str
    spacing: float
    drift_px: np.ndarray
    drift_sd_px: np.ndarray
    drift_start_px: np.ndarray
    average_image: np.ndarray
    column_fit: ColumnFit
    positions: np.ndarray
    cross_section: np.ndarray
    cross_section_sd: np.ndarray
    n_atoms: np.ndarray
    n_probability: np.ndarray
    library_cross_section: np.ndarray
    mixture: Mixture
    hybrid: Counts
    gaussian_depth: np.ndarray
    gaussian_depth_sd: np.ndarray
    depth: np.ndarray
    depth_sd: np.ndarray
    depth_q05: np.ndarray
    depth_q95: np.ndarray
    crlb: np.ndarray
    superposition_shift: np.ndarray
    goodness_of_fit: np.ndarray
    lattice_depth: np.ndarray
    lattice_probability: np.ndarray
    atoms: np.ndarray
    atom_sd: np.ndarray
    site_probability: np.ndarray
    column_of_atom: np.ndarray
    ends: ColumnEnds
    surface: Surface
    column_series: np.ndarray
    gaussian_fit_series: np.ndarray
    joint_fit_series: np.ndarray
    diagnostics: dict
    warnings: list
    provenance: dict
    gauge: str
    fixed: list
    data: object = None
    truth: object = None
    distortion: np.ndarray | None = None
    distortion_sd: np.ndarray | None = None


class Stages:
    """Names each stage on the terminal as it starts and keeps the seconds it took."""

    def __init__(self, quiet: bool):
        self.quiet, self.seconds, self._name, self._start = quiet, {}, None, 0.0

    def __call__(self, name: str | None) -> None:
        now = time.perf_counter()
        if self._name:
            self.seconds[self._name] = round(now - self._start, 2)
        self._name, self._start = name, now
        if name:
            self.tell(name)

    def tell(self, line: str) -> None:
        if not self.quiet:
            tqdm.write(f"depthprob: {line}")


def progress_bar(quiet: bool):
    """What shows how far an iteration is, with an estimate; nothing when quiet."""
    return lambda items, **k: tqdm(items, disable=quiet, **k)


def refuse_beyond_limit(config: Config, gigabytes: float, what: str, otherwise: str = "crop the series") -> None:
    """Raise InputError where `what` needs more memory than the config allows."""
    limit = config.simulation.memory_limit_GB
    if limit is not None and gigabytes > limit:
        raise InputError(f"simulation.memory_limit_GB (--memory-limit) is {limit:g}; {what} need about {gigabytes:.1f} GB. Raise the limit or {otherwise}.")


def edge_mask(series: FocalSeries, positions: np.ndarray, focus: float, angle: float) -> np.ndarray:
    """Pixels the likelihood may use (F, ny, nx): all but those that columns beyond the field, where the crystal goes on, can reach: as far as the probe at their defocus from `focus` [Å] and 1.2 Å."""
    (ny, nx), px = series.shape, series.pixel_size
    reach = 1e-3 * angle * abs(np.asarray(series.defocus) - focus) + 1.2
    beyond = np.empty((0, 2)) if series.periodic else columns_beyond(positions, (np.array([nx, ny]) - 1) * px, float(reach.max()))
    if not len(beyond):
        return np.ones((len(reach), ny, nx), bool)
    pixels = np.stack(np.meshgrid(np.arange(nx), np.arange(ny)), -1) * px
    return cKDTree(beyond).query(pixels)[0] >= reach[:, None, None]


def library_cross_sections(library: ColumnLibrary, defocus: np.ndarray, pixel_size: float) -> np.ndarray:
    """What `fit_columns` measures on the noise-free average of an isolated column of each atom number (n_max,) [Å^2]."""
    half = int(np.ceil(3.0 / pixel_size))
    along = np.arange(-half, half + 1) * pixel_size
    centre = np.array([[half, half]]) * pixel_size
    return np.array([
        fit_columns(library.series(n, defocus, along, along).mean(0), centre, pixel_size).volume[0] for n in range(1, library.n_max + 1)
    ])


def reconstruct(
    stack: Stack,
    config: Config,
    library: ColumnLibrary | None = None,
    method: str | None = None,
    quiet: bool = False,
    truth=None,
    checkpoint: Path | None = None,
) -> Reconstruction:
    """Take a focal series to column depths, atom numbers and atoms.

    Parameters
    ----------
    stack : Stack
        Counts (F, y, x) as `stack.read_stack` returns them.
    library : ColumnLibrary, optional
        Built (or found in the cache) when absent.
    checkpoint : path, optional
        Where NUTS keeps its state, and goes on from after an interruption.

    Raises
    ------
    InputError
        When the series has fewer than three foci, or three images that columns beyond the field do not cover, shows no columns, or columns brighter than the library.
    """
    method = method or config.inference.method
    config = replace(config, inference=replace(config.inference, method=method))
    quiet = quiet or not processes.is_first()
    stages = Stages(quiet)
    progress = progress_bar(quiet)
    periodic, pixel = config.focal_series.periodic, float(stack.pixel_size_A)
    defocus = np.asarray(stack.defocus_A, float)
    if len(np.unique(defocus)) < 3:
        raise InputError(f"the series holds {len(defocus)} images at the foci {', '.join(f'{f:g}' for f in defocus)} Å; a depth needs three foci at least. Give the whole focal series.")
    dose = np.broadcast_to(np.asarray(config.focal_series.dose, float), defocus.shape)
    fraction = stack.data / (dose * pixel**2)[:, None, None]
    geometry = column_geometry(config)

    stages("drift")
    given = config.focal_series.drift_file
    drift = read_drift_csv(config.resolve(given), defocus, fraction.shape[1:]) if given else estimate_drift(fraction, pixel, defocus, periodic)

    stages("columns")
    average, chosen = central_average(shift_images(fraction, -drift, periodic), defocus)
    found = processes.of_first(find_columns(average, pixel, periodic, nearest_distance(geometry)))
    if len(found) < 1:
        raise InputError("no columns were found on the average of the sharpest images. Check signal, dose and foci of the series.")
    columns = fit_columns(average, found, pixel, periodic)

    stages("library")
    ours = library is None
    if library is None:
        library = library_for(config, atoms_needed(config, columns.volume, progress), progress)
    if not np.isclose(library.spacing, geometry.spacing, rtol=1e-3) or library.element != config.specimen.element:
        raise InputError(
            f"the library holds {library.element} atoms {library.spacing:g} Å apart, but the config's columns are {config.specimen.element} "
            f"{geometry.spacing:g} Å apart. Give the library of this crystal, or none to have it built."
        )
    needed = (float(defocus.min() - 20), float(defocus.max() + 20))
    if library.z_range[0] > needed[0] or library.z_range[1] < needed[1]:
        raise InputError(
            f"the library covers defocus - depth from {library.z_range[0]:g} to {library.z_range[1]:g} Å, but the foci need {needed[0]:g} to "
            f"{needed[1]:g} Å. Build it for these foci."
        )

    stages("counts")
    reference = library_cross_sections(library, defocus[chosen], pixel)
    counted = count_by_library(columns.volume, columns.volume_sd, reference, scale_sd=SCALE_SD)

    stages("joint fit")
    series = FocalSeries(defocus, pixel, dose, fraction.shape[1:], periodic)
    mask = edge_mask(series, columns.positions, float(defocus[chosen].mean()), config.microscope.convergence_angle_mrad)
    electrons, seen = float(dose[chosen].sum()), mask.mean((1, 2)) > LEAST_SEEN
    of_edges = quality.doubts_of_edges(seen, defocus, series.shape, pixel)
    if seen.sum() < 3:
        raise InputError(f"{of_edges[0]} A depth needs three images at least.")
    counts, defocus, dose, fraction, drift, mask = (a[seen] for a in (stack.data, defocus, dose, fraction, drift, mask))
    series = FocalSeries(defocus, pixel, dose, fraction.shape[1:], periodic)
    peaks = fit_gaussian_peaks(fraction, columns.positions, counted.n, library, series, drift * pixel)
    field = Field(
        positions=columns.positions,
        n_atoms=counted.n,
        depths=starting_depths(peaks),
        background=np.full(len(dose), max(1e-5, float(np.quantile(average, 0.02)))),
        gain=np.ones(len(dose)),
        image_shifts=drift * pixel,
    )
    field = processes.of_first(field)
    pairs, seconds = superposition.asked_for(field, series, config)
    if by_windows(len(found), library, series, config):
        samples, chains = config.inference.samples, config.inference.chains
        need = forecast(pose(counts, field, library, series, mask, config), samples * chains, gradients(samples, chains) if method == "nuts" else 0)
        what = f"{len(found)} columns in {len(defocus)} images of {series.shape[0]} x {series.shape[1]} pixels"
        gigabytes = need.gigabytes + superposition.GIGABYTES * pairs
        refuse_beyond_limit(config, gigabytes, what)
        longer = f", and {math.ceil(seconds / 60)} more for the correction of superposition" if pairs else ""
        stages.tell(f"{what} take about {math.ceil(need.seconds / 60)} minutes and {gigabytes:.1f} GB{longer}")
    shared: dict = {}
    lacking = lambda parameters, problem: superposition.lacking(parameters, problem, config, progress, shared)[0]
    joint = fit_jointly(counts, field, library, series, mask, config, progress, lacking if pairs else None)

    stages("superposition")
    joint, owed = superposition.settled(joint, config, pairs and joint.refused is None, seconds, progress, shared)
    problem, estimate, fit = joint.problem, joint.estimate, joint.reader
    n_atoms, probability = np.asarray(problem.n_atoms), joint.counts.probability
    parameters = {k: np.asarray(v) for k, v in estimate.parameters.items()}
    positions = np.stack([parameters["x"], parameters["y"]], 1)
    shifts = np.stack([parameters["shift_x"], parameters["shift_y"]], 1)
    displacements = places(parameters, series) - positions

    stages("other counts")
    if len(positions) > len(found):  # the fit's residuals showed more
        columns = fit_columns(average, positions, pixel, periodic)
        counted = count_by_library(columns.volume, columns.volume_sd, reference, scale_sd=SCALE_SD)
    mixture = gaussian_mixture_counts(columns.volume, min(len(positions), library.n_max + 3))
    hybrid = count_by_hybrid(columns.volume, reference, electrons)

    stages("Gaussian peaks")
    baseline = fit_gaussian_peaks(fraction, positions, n_atoms, library, series, displacements)

    stages(f"posterior ({method})")
    relative = "focus_offset" in config.inference.free
    key = jax.random.key(config.inference.seed)
    result = infer(problem, method, key, config.inference.samples, config.inference.chains, estimate=estimate, progress_bar=not quiet, checkpoint=checkpoint)
    bound = fit.column_bounds(estimate, problem, relative)
    background = np.exp(parameters["log_background"])
    moves = depth_shifts(library, defocus, dose, background, float(np.median(parameters["depth"])))[n_atoms - 1]
    if owed.pairs:
        moves += np.outer(superposition.per_atom(joint, owed, moves[:, REACH + 1], config, progress, shared), np.arange(-REACH, REACH + 1))
    depths = column_depths(result, joint, moves, owed.depth_sd, config.inference.seed, relative)
    gaussian_depth = baseline.depth - np.nanmean(baseline.depth) * relative

    stages("held settings")
    tested = held.asked(estimate, problem, neighbouring_libraries(config, library.n_max, progress) if ours else {})

    stages("lattice")
    position_sd = np.stack([estimate.sd("x"), estimate.sd("y")], 1) if "x" in problem.free else np.zeros_like(positions)
    lean = np.asarray(config.specimen.tilt_mrad) * 1e-3  # what the tilt moves aside, Å per Å of depth
    snapped = snap(positions - np.outer(depths.mean, lean), depths.mean, depths.sd, n_atoms, geometry, position_sd)

    stages("surface")
    atoms = snapped.atoms + np.pad(np.outer(snapped.atoms[:, 2], lean), [(0, 0), (0, 1)])
    ends = column_ends(depths.mean, depths.sd, n_atoms, probability, geometry.spacing)
    variance = count_variance(n_atoms, probability)
    surface = find_surface(atoms, snapped.column_of_atom, ends, variance, positions, crystal_of(config), config.specimen.zone_axis)

    rate = fit.rates(estimate.parameters, problem)
    leverage = None if fit is local else leverages(estimate, problem)
    fit_quality = goodness_of_fit(estimate.parameters, problem, rate, leverage)
    spread = dispersion_of(problem, rate)
    warnings = [
        *quality.doubts_of_counts(counts, dose, pixel, columns.width, read_variance_of(config)),
        *quality.doubts_of_images(image_dispersions(problem, rate), parameters["log_gain"], defocus, config),
        *quality.doubts_of_scan(scan_residuals(np.asarray(problem.counts), rate, np.asarray(problem.mask), pixel, read_variance_of(config), float(problem.dispersion)), series.shape, pixel),
        *quality.doubts_of_lattice(lattice_stretch(positions - np.outer(depths.mean, lean), geometry), geometry.spacing),
        *of_edges,
        *quality.doubts_of_field(positions, shifts, series.shape, pixel, periodic),
        *quality.doubts_of_depths(parameters["depth"], defocus),
        *quality.doubts_of_thickness(n_atoms, positions, geometry.spacing, config.microscope.convergence_angle_mrad, owed, joint.refused),
        *quality.doubts_of_estimators(depths.mean, gaussian_depth),
        *quality.doubts_of_settings(tested, config, float(np.median(depths.sd)), (n_atoms.max() - 1) * geometry.spacing),
        *quality.doubts_of_fit(joint, fit_quality, spread, config),
        *quality.doubts_of_chains(result.diagnostics),
    ]
    expected = (rate + owed.change) / (dose * pixel**2)[:, None, None]
    joint_series = disc_averages(expected, positions, displacements, pixel, disc_radius(positions), periodic)
    drift_px = shifts / pixel
    stages(None)
    return Reconstruction(
        stack=counts,
        images=np.flatnonzero(seen),
        defocus=defocus,
        pixel_size=pixel,
        dose=dose,
        element=config.specimen.element,
        spacing=geometry.spacing,
        drift_px=drift_px - drift_px.mean(0),
        drift_sd_px=np.hypot(estimate.sd("shift_x"), estimate.sd("shift_y")) / pixel / np.sqrt(2) if "shift_x" in problem.free else np.full(len(defocus), np.nan),
        drift_start_px=drift,
        average_image=average,
        column_fit=columns,
        positions=positions,
        cross_section=columns.volume,
        cross_section_sd=columns.volume_sd,
        n_atoms=n_atoms,
        n_probability=probability,
        library_cross_section=reference * counted.scale,
        mixture=mixture,
        hybrid=hybrid,
        gaussian_depth=gaussian_depth,
        gaussian_depth_sd=baseline.sd,
        depth=depths.mean,
        depth_sd=depths.sd,
        depth_q05=depths.low,
        depth_q95=depths.high,
        crlb=bound,
        superposition_shift=-owed.depth,
        goodness_of_fit=fit_quality,
        lattice_depth=snapped.depth,
        lattice_probability=snapped.probability,
        atoms=atoms,
        atom_sd=snapped.atom_sd,
        site_probability=snapped.site_probability,
        column_of_atom=snapped.column_of_atom,
        ends=ends,
        surface=surface,
        column_series=baseline.intensity,
        gaussian_fit_series=baseline.model,
        joint_fit_series=joint_series,
        diagnostics=result.diagnostics | {"dispersion": spread.value, "dispersion_sd": spread.sd, "pairs of neighbours corrected": owed.pairs, **{f"asked of {name} (sd)": a.significance for name, a in tested.items()}, "stages": stages.seconds},
        warnings=warnings,
        provenance=_provenance(config, stages.seconds, method, library),
        gauge=GAUGE_FREE if relative else GAUGE,
        fixed=[w for w in NUISANCES if w not in config.inference.free],
        data=to_arviz(result, problem, relative),
        truth=truth,
        distortion=distortions_of(parameters),
        distortion_sd=np.stack([estimate.sd(name) for name in AFFINE], 1).reshape(-1, 2, 2) if AFFINE[0] in problem.free else None,
    )


def _provenance(config: Config, seconds: dict, method: str, library: ColumnLibrary) -> dict:
    packages = ("depthprob", "jax", "numpyro", "numpy", "scipy", "arviz")
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "config": config.as_dict(),
        "method": method,
        "versions": versions,
        "precision": {"waves": "complex64", "rates": "float32", "log-likelihood and Fisher sums": str(jnp.zeros(()).dtype)},
        "seeds": {"thermal": config.thermal.seed, "inference": config.inference.seed},
        "library": {"element": library.element, "spacing_A": library.spacing, "n_max": library.n_max, "depth_error_A": library.depth_error.tolist()},
        "seconds": seconds,
        "gauge": GAUGE_FREE if "focus_offset" in config.inference.free else GAUGE,
    }
