"""From a raw focal series to atoms: every stage in order, each usable alone."""

import time
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ..config import Config, read_config
from ..errors import InputError
from ..inference import held, likelihood, local
from ..inference.counts import depth_shifts, marginal_draws, mean_square_shift
from ..inference.gaussian_peak import disc_averages, disc_radius, fit_gaussian_peaks
from ..inference.likelihood import field_of, goodness_of_fit, make_problem
from ..inference.posterior import LARGE, infer, to_arviz, write_netcdf
from ..io import Stack, read_atoms, read_drift_csv, read_stack, write_columns_csv, write_drift_csv, write_json, write_xyz
from ..physics.focal_series import Field, FocalSeries
from ..physics.gram import default_sampling
from ..physics.library import ColumnLibrary
from ..physics.particle import images_from_gram, simulate_particle
from ..physics.specimen import debye_waller_b_from_rms
from ..statstem import ColumnResult, write_statstem
from .columns import ColumnFit, central_average, find_columns, fit_columns
from .counting import Counts, Mixture, count_by_hybrid, count_by_library, gaussian_mixture_counts
from .drift import estimate_drift, shift_images
from .lattice import snap
from .libraries import atoms_needed, column_geometry, crystal_of, detector_of, library_for, microscope_of, neighbouring_libraries, read_variance_of
from .surface import ColumnEnds, Surface, column_ends, count_variance, find_surface, surface_as_dict

GAUGE = "absolute: z = 0 is the plane in focus at defocus 0 (the focus offset is held at zero)"
GAUGE_FREE = "relative: with a free focus offset only depths relative to the field's mean are measured, and the mean of all depths is zero"

PRIOR_OF = {  # parameters behind the config's words
    "depth_A": ("depth",), "position_A": ("x", "y"), "gain": ("log_gain",), "background": ("log_background",), "image_shift_A": ("shift_x", "shift_y"),
    "focus_offset_A": ("focus_offset",), "focus_step": ("focus_step",), "source_variance_A2": ("source_variance",),
}  # fmt: skip
HELD = "beam energy, convergence angle, aberrations, detector angles, Debye-Waller factor, source size, foci"


@dataclass
class Reconstruction:
    """Everything the pipeline found, as plain arrays; what report and files are written from."""

    stack: np.ndarray
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


class Stages:
    """Names each stage on the terminal as it starts and keeps the seconds it took."""

    def __init__(self, quiet: bool):
        self.quiet, self.seconds, self._name, self._start = quiet, {}, None, 0.0

    def __call__(self, name: str | None) -> None:
        now = time.perf_counter()
        if self._name:
            self.seconds[self._name] = round(now - self._start, 2)
        self._name, self._start = name, now
        if name and not self.quiet:
            tqdm.write(f"depthprob: {name}")


def progress_bar(quiet: bool):
    """What shows how far an iteration is, with an estimate; nothing when quiet."""
    return lambda items, **k: tqdm(items, disable=quiet, **k)


def edge_mask(series: FocalSeries, positions: np.ndarray, focus: float, angle: float, near: float = 3.0) -> np.ndarray:
    """Pixels the likelihood may use (F, ny, nx): all but those that columns outside the field can reach.

    Where columns come within `near` Å of an edge the particle is taken to go on beyond it; there each image loses a border as wide
    as the probe at its defocus from `focus` [Å] and 1.2 Å.
    """
    n_foci, (ny, nx), px = len(series.defocus), series.shape, series.pixel_size
    used = np.ones((n_foci, ny, nx), bool)
    if series.periodic:
        return used
    x, y = np.arange(nx) * px, (np.arange(ny) * px)[:, None]
    reach = 1e-3 * angle * abs(np.asarray(series.defocus) - focus) + 1.2
    width, height = (nx - 1) * px, (ny - 1) * px
    distances = {
        "left": (positions[:, 0], x),
        "right": (width - positions[:, 0], width - x),
        "top": (positions[:, 1], y),
        "bottom": (height - positions[:, 1], height - y),
    }
    for of_columns, of_pixels in distances.values():
        if np.min(of_columns) < near:
            used &= of_pixels[None] >= reach[:, None, None]
    return used


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
        Counts (F, y, x) as `io.read_stack` returns them.
    library : ColumnLibrary, optional
        Built (or found in the cache) when absent.
    checkpoint : path, optional
        Where NUTS keeps its state, and goes on from after an interruption.

    Raises
    ------
    InputError
        When the series shows no columns, or columns brighter than the library.
    """
    method = method or config.inference.method
    stages = Stages(quiet)
    progress = progress_bar(quiet)
    periodic, pixel = config.focal_series.periodic, float(stack.pixel_size_A)
    defocus = np.asarray(stack.defocus_A, float)
    dose = np.broadcast_to(np.asarray(config.focal_series.dose, float), defocus.shape)
    fraction = stack.data / (dose * pixel**2)[:, None, None]
    warnings: list[str] = []
    geometry = column_geometry(config)

    stages("drift")
    given = config.focal_series.drift_file
    drift = read_drift_csv(config.resolve(given), defocus, fraction.shape[1:]) if given else estimate_drift(fraction, pixel, defocus, periodic)

    stages("columns")
    average, chosen = central_average(shift_images(fraction, -drift, periodic), defocus)
    found = find_columns(average, pixel, periodic)
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
    counted = count_by_library(columns.volume, columns.volume_sd, reference, scale_sd=0.05)
    mixture = gaussian_mixture_counts(columns.volume, min(len(found), library.n_max + 3))
    hybrid = count_by_hybrid(columns.volume, reference, float(dose[chosen].sum()))

    stages("joint fit")
    series = FocalSeries(defocus, pixel, dose, fraction.shape[1:], periodic)
    focus = float(defocus[chosen].mean())
    mask = edge_mask(series, columns.positions, focus, config.microscope.convergence_angle_mrad)
    field = Field(
        positions=columns.positions,
        n_atoms=counted.n,
        depths=np.zeros(len(found)),
        background=np.full(len(dose), max(1e-5, float(np.quantile(average, 0.02)))),
        gain=np.ones(len(dose)),
        image_shifts=drift * pixel,
    )
    # a free focus offset and a common shift of all depths are one thing: the offset is held, and depths are measured from their mean
    relative = "focus_offset" in config.inference.free
    free = tuple(name for name in config.inference.free if name != "focus_offset") + ("smooth_background",) * (config.inference.background == "smooth")
    fit = local if len(found) > LARGE else likelihood
    mode = amplitudes = None
    dispersed = config.inference.noise == "over_dispersed"
    prior_sd = {name: sd for word, sd in config.inference.prior_sd.items() for name in PRIOR_OF[word]}
    pose = lambda field, centre=None: make_problem(stack.data, field, library, series, free, mask, read_variance_of(config), fit is likelihood, prior_sd, centre)
    centre = pose(field).centre
    for _ in range(5):
        problem = pose(field, centre)
        mode = fit.find_mode(problem, progress, close=likelihood.ROUGH, before=mode)
        amplitudes = fit.column_amplitudes(mode.parameters, problem, amplitudes)
        noisier = likelihood.over_dispersed(problem, fit.rates(mode.parameters, problem)).dispersion ** 0.5 if dispersed else 1.0
        n_now = np.asarray(problem.n_atoms)
        cross = library.cross_section[n_now - 1]
        # a gain common to all images is a scale of cross-sections: left to itself it would make good a common error of the counts
        cross = cross * np.exp(np.asarray(mode.parameters["log_gain"]).mean())
        recount = count_by_library(amplitudes.value * cross, np.hypot(amplitudes.sd * noisier, 0.015) * cross, library.cross_section, scale_sd=0.05)
        field = field_of(mode.parameters, jnp.asarray(recount.n))
        if np.array_equal(recount.n, n_now):
            break
    else:
        warnings.append("Atom counts had not settled after five rounds of counting and fitting.")
    problem = pose(field_of(mode.parameters, problem.n_atoms), centre)
    if dispersed:
        problem, mode = likelihood.over_dispersed(problem, fit.rates(mode.parameters, problem)), None
    mode = fit.find_mode(problem, progress, before=mode)
    estimate = fit.estimate_at(mode, problem, progress)
    parameters = {k: np.asarray(v) for k, v in estimate.parameters.items()}
    positions = np.stack([parameters["x"], parameters["y"]], 1)
    shifts = np.stack([parameters["shift_x"], parameters["shift_y"]], 1)

    stages("Gaussian peaks")
    baseline = fit_gaussian_peaks(fraction, positions, n_now, library, series, shifts)

    stages(f"posterior ({method})")
    key = jax.random.key(config.inference.seed)
    result = infer(problem, method, key, config.inference.samples, config.inference.chains, estimate=estimate, progress_bar=not quiet, checkpoint=checkpoint)
    bound = fit.column_bounds(estimate, problem, relative)
    model_sd = np.nan_to_num(library.depth_error[n_now - 1])
    background = np.exp(parameters["log_background"])
    moves = depth_shifts(library, defocus, dose, background, float(np.median(parameters["depth"])))
    if result.draws is None:
        moved = mean_square_shift(n_now, recount.probability, moves)
        depth, depth_sd = parameters["depth"], np.sqrt(fit.depth_sd(estimate, problem, relative) ** 2 + model_sd**2 + moved)
        depth = depth - depth.mean() * relative
        low, high = depth - 1.6449 * depth_sd, depth + 1.6449 * depth_sd
    else:
        draws = result.of("depth").reshape(-1, len(n_now))
        draws = draws - draws.mean(1, keepdims=True) * relative
        rng = np.random.default_rng(config.inference.seed)
        draws = draws + model_sd * rng.standard_normal(draws.shape)  # the library's own Monte-Carlo error
        draws = marginal_draws(draws, n_now, recount.probability, moves, rng)
        depth, depth_sd = draws.mean(0), draws.std(0)
        low, high = np.quantile(draws, [0.05, 0.95], axis=0)
    gaussian_depth = baseline.depth - np.nanmean(baseline.depth) * relative
    if abs(depth - gaussian_depth)[np.isfinite(gaussian_depth)].max(initial=0) > 15:
        warnings.append("The two estimators differ by more than 15 Å for some columns; look at their series before trusting either.")

    stages("held settings")
    tested = held.asked(estimate, problem, neighbouring_libraries(config, library.n_max, progress) if ours else {})
    warnings += doubts(tested, config, float(np.median(depth_sd)))

    stages("lattice")
    position_sd = np.stack([estimate.sd("x"), estimate.sd("y")], 1) if "x" in problem.free else np.zeros_like(positions)
    lean = np.asarray(config.specimen.tilt_mrad) * 1e-3  # what the tilt moves aside, Å per Å of depth
    snapped = snap(positions - np.outer(depth, lean), depth, depth_sd, n_now, geometry, position_sd)

    stages("surface")
    atoms = snapped.atoms + np.pad(np.outer(snapped.atoms[:, 2], lean), [(0, 0), (0, 1)])
    ends = column_ends(depth, depth_sd, n_now, recount.probability, geometry.spacing)
    variance = count_variance(n_now, recount.probability)
    surface = find_surface(atoms, snapped.column_of_atom, ends, variance, positions, crystal_of(config), config.specimen.zone_axis)

    rate = fit.rates(estimate.parameters, problem)
    leverage = likelihood.leverages(estimate, problem) if fit is likelihood else None
    fit_quality = goodness_of_fit(estimate.parameters, problem, rate, leverage)
    spread = likelihood.dispersion_of(problem, rate)
    poor = np.flatnonzero(fit_quality > 5)
    if len(poor):
        warnings.append(f"{len(poor)} of {len(n_now)} columns fit badly (goodness of fit above 5 standard deviations): columns {', '.join(map(str, poor[:12]))}.")
    pooled = float(np.nanmean(fit_quality)) * len(n_now) ** 0.5
    if np.nanmean(fit_quality) > 0.75 and pooled > 5:
        warnings.append(f"The fit as a whole is worse than noise allows: goodness of fit {np.nanmean(fit_quality):.2f} on average over columns, {pooled:.0f} standard deviations of that. Check what is held fixed: {HELD}.")
    if config.thermal.model == "absorptive":
        warnings.append("The absorptive library is brighter than frozen phonons, by 2 to 11 % from three to ten atoms of gold, and its error is not in the error bars: counts and depths are provisional.")
    if not dispersed and spread.value > max(1.2, 1 + 5 * spread.sd):
        warnings.append(f"Counts scatter about the fit with {spread.value:.2f} times Poisson's variance: error bars are too small. See goodness of fit, or set inference.noise = \"over_dispersed\".")
    if not estimate.converged:
        warnings.append("The joint fit had not converged.")
    if abs(amplitudes.value.mean() - 1) > 0.05 or abs(parameters["log_gain"].mean()) > 0.05:
        warnings.append(f"Intensities are {np.exp(parameters['log_gain'].mean()):.3f} times the library's: check dose, gain and detector angles.")
    if np.any(parameters["depth"] - defocus.min() < 20) or np.any(defocus.max() - parameters["depth"] < 20):
        warnings.append("Some columns lie within 20 Å of the end of the focus range: their depths hang on half a peak.")
    if np.nanmax(model_sd) > 0.1:
        warnings.append(f"The library's own Monte-Carlo error reaches {np.nanmax(model_sd):.2f} Å of depth here; it is included in the error bars. More thermal configurations would lower it.")
    expected = rate / (dose * pixel**2)[:, None, None]
    joint_series = disc_averages(expected, positions, shifts, pixel, disc_radius(positions), periodic)
    words = ["positions", "background", "gain", "image_shifts", "focus_offset", "focus_step", "source_size"]
    drift_px = shifts / pixel
    stages(None)
    return Reconstruction(
        stack=stack.data,
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
        n_atoms=n_now,
        n_probability=recount.probability,
        library_cross_section=reference * counted.scale,
        mixture=mixture,
        hybrid=hybrid,
        gaussian_depth=gaussian_depth,
        gaussian_depth_sd=baseline.sd,
        depth=depth,
        depth_sd=depth_sd,
        depth_q05=low,
        depth_q95=high,
        crlb=bound,
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
        diagnostics=result.diagnostics | {"dispersion": spread.value, "dispersion_sd": spread.sd, **{f"asked of {name} (sd)": a.significance for name, a in tested.items()}, "stages": stages.seconds},
        warnings=warnings,
        provenance=_provenance(config, stages.seconds, method, library),
        gauge=GAUGE_FREE if relative else GAUGE,
        fixed=[w for w in words if w not in config.inference.free],
        data=to_arviz(result, problem, relative),
        truth=truth,
    )


def doubts(tested: dict[str, held.Asked], config: Config, depth_sd: float) -> list[str]:
    """A warning of held settings that the residuals ask to be others, by five standard deviations and enough to matter to depths; the strongest first."""
    lens = config.microscope
    fwhm = lambda change: max(lens.source_fwhm_A**2 + 8 * np.log(2) * change, 0) ** 0.5
    spread = lambda change: max(lens.focal_spread_A**2 + change, 0) ** 0.5
    words = {
        "focus_step": lambda a: f"focus steps {1 + a.change:.3f} ± {a.sd:.3f} times those given",
        "source_variance": lambda a: f"a source image of {fwhm(a.change):.2f} Å FWHM where {lens.source_fwhm_A:g} is given",
        "convergence_angle": lambda a: f"a convergence angle of {lens.convergence_angle_mrad + a.change:.2f} ± {a.sd:.2f} mrad where {lens.convergence_angle_mrad:g} is given",
        "spherical_aberration": lambda a: f"C3 = {lens.spherical_aberration_mm + a.change * 1e-7:.5f} ± {a.sd * 1e-7:.5f} mm where {lens.spherical_aberration_mm:g} is given",
        "focal_variance": lambda a: f"a focal spread of {spread(a.change):.0f} Å where {lens.focal_spread_A:g} is given",
    }
    possible = {name: a for name, a in tested.items() if name != "focal_variance" or lens.focal_spread_A > 0 or a.change > 0}
    sure = [name for name, a in possible.items() if abs(a.significance) > 5 and np.abs(a.depth_moves).max() > depth_sd / 4]
    if not sure:
        return []
    first, *others = sorted(sure, key=lambda name: -abs(tested[name].significance))
    a = tested[first]
    text = f"The residuals ask for {words[first](a)} ({abs(a.significance):.0f} standard deviations; depths would move by up to {np.abs(a.depth_moves).max():.1f} Å)"
    return [text + "".join(f"; or, less well, for {words[name](tested[name])}" for name in others) + "."]


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


def write(result: Reconstruction, folder: Path) -> None:
    """The files of a reconstruction: columns.csv, columns.mat (of the fit to the average image, as StatSTEM keeps it), drift.csv, posterior.nc, structure.xyz, surface.json, report.html, provenance.json."""
    from ..report import write_report

    folder = Path(folder)
    write_columns_csv(
        folder / "columns.csv",
        {
            "x_A": result.positions[:, 0],
            "y_A": result.positions[:, 1],
            "cross_section_A2": result.cross_section,
            "cross_section_sd_A2": result.cross_section_sd,
            "n_atoms": result.n_atoms,
            "n_atoms_probability": result.n_probability[np.arange(len(result.n_atoms)), result.n_atoms - 1],
            "gaussian_depth_A": result.gaussian_depth,
            "gaussian_depth_sd_A": result.gaussian_depth_sd,
            "depth_A": result.depth,
            "depth_sd_A": result.depth_sd,
            "depth_q05_A": result.depth_q05,
            "depth_q95_A": result.depth_q95,
            "crlb_A": result.crlb,
            "goodness_of_fit": result.goodness_of_fit,
            "lattice_depth_A": result.lattice_depth,
            "lattice_probability": result.lattice_probability,
            "n_atoms_hybrid": result.hybrid.n,
            "top_A": result.ends.top,
            "top_sd_A": result.ends.top_sd,
            "bottom_A": result.ends.bottom,
            "bottom_sd_A": result.ends.bottom_sd,
            "thickness_A": result.ends.thickness,
            "thickness_sd_A": result.ends.thickness_sd,
        },
    )
    fit = result.column_fit
    of_average = ColumnResult(
        result.average_image, result.pixel_size, fit.positions, fit.volume, np.full(len(fit.volume), fit.width), fit.background, fit.model_image,
        result.library_cross_section, result.mixture, result.n_atoms,
    )
    write_statstem(folder / "columns.mat", of_average, result.element)
    write_drift_csv(folder / "drift.csv", result.defocus, result.drift_px, result.drift_sd_px)
    write_xyz(folder / "structure.xyz", result.element, result.atoms, result.atom_sd, result.site_probability, result.column_of_atom, result.surface.coordination, result.gauge)
    write_json(folder / "surface.json", surface_as_dict(result.surface))
    write_netcdf(result.data, folder / "posterior.nc")
    write_json(folder / "provenance.json", result.provenance)
    write_report(folder / "report.html", result)


def run(stack_path, config: Config, folder, library_path=None, method=None, memory_limit=None, quiet=False, checkpoint=None) -> None:
    """Read a stack, reconstruct it and write everything into a folder. An interrupted NUTS run goes on from its `checkpoint`.

    Raises
    ------
    InputError
        For whatever is wrong with the stack, the config, the library, or a memory limit [GB] below what the field needs.
    """
    stack = read_stack(stack_path, config)
    need = 60 * stack.data.size * 4 / 1e9 + 1.0
    name = "simulation.memory_limit_GB" if memory_limit is None else "--memory-limit"
    memory_limit = memory_limit or config.simulation.memory_limit_GB
    if memory_limit is not None and need > memory_limit:
        raise InputError(f"{name} is {memory_limit:g} GB; this series of {stack.data.shape} needs about {need:.1f} GB. Raise the limit or crop the series.")
    library = ColumnLibrary.load(library_path) if library_path is not None else None
    write(reconstruct(stack, config, library, method, quiet, checkpoint=checkpoint), Path(folder))


def demo(folder, quiet: bool = False) -> None:
    """The packaged gold particle through the whole pipeline, sampled with NUTS and compared with its true atoms."""
    data = resources.files("depthprob.data")
    with resources.as_file(data / "demo.toml") as config_path, resources.as_file(data / "demo_stack.npz") as stack_path:
        config = read_config(config_path)
        stack = read_stack(stack_path, config)
        with np.load(stack_path, allow_pickle=False) as saved:
            truth = SimpleNamespace(columns=saved["columns"], atoms=saved["atoms_A"], drift=saved["drift_A"])
    write(reconstruct(stack, config, quiet=quiet, truth=truth), Path(folder))


def simulate(config: Config, noise: bool = True, quiet: bool = False, checkpoint: Path | None = None) -> Stack:
    """Focal series of the config's isolated column (frozen phonons, one Gram matrix), or of its structure file (full multislice).

    A structure file needs an orthogonal periodic cell; the image is the whole cell, z = 0 in focus at defocus 0. Its atoms may be of several
    elements, and carry arrays `debye_waller_B_A2` or `rms_displacement_A` (else specimen's holds for all) and `occupancy`. Its thermal
    configurations are summed up in `checkpoint`, from which an interrupted run goes on.
    """
    progress = progress_bar(quiet)
    settings = config.focal_series
    pixel, defocus = settings.pixel_size_A, settings.defocus
    dose = np.broadcast_to(np.asarray(settings.dose, float), defocus.shape)
    microscope, detector = microscope_of(config), detector_of(config)
    if config.specimen.structure_file:
        structure, cell = _read_structure(config)
        sampling = config.simulation.potential_sampling_A or default_sampling(microscope.energy, detector.outermost, microscope.convergence_angle)
        halves, waves = simulate_particle(
            structure.positions, structure.get_chemical_symbols(), structure.arrays["debye_waller_B_A2"], cell, microscope, detector, config.thermal.configurations,
            config.thermal.seed, sampling, config.simulation.parametrization, checkpoint, progress, structure.arrays["occupancy"], config.specimen.tilt_mrad,
        )
        shape = tuple(round(side / pixel) for side in cell[::-1])
        if any(abs(n * pixel - side) > 1e-3 * pixel * n for n, side in zip(shape[::-1], cell, strict=True)):
            raise InputError(f"pixel_size_A is {pixel:g} Å, but the cell of {cell[0]:g} x {cell[1]:g} Å is no whole number of pixels. Choose one that divides both sides.")
        weight = (config.thermal.configurations + 1) // 2 / config.thermal.configurations
        fraction = images_from_gram(weight * halves[0] + (1 - weight) * halves[1], waves, cell, microscope, defocus, shape)
    else:
        n = config.specimen.n_atoms
        library = library_for(config, n, progress)
        half = config.focal_series.field_of_view_A / 2
        along = np.arange(-half, half + pixel / 2, pixel)
        fraction = library.series(n, defocus, along, along)
    expected = np.maximum(fraction, 0) * (dose * pixel**2)[:, None, None]
    data = np.random.default_rng(config.thermal.seed).poisson(expected).astype(float) if noise else expected
    return Stack(data, defocus, pixel, {"dose_e_per_A2": dose, "signal": "counts"})


def _read_structure(config: Config):
    """The `ase.Atoms` of a structure file, with arrays debye_waller_B_A2 and occupancy, and their cell (Lx, Ly) [Å]."""
    path = config.resolve(config.specimen.structure_file)
    if not path.is_file():
        raise InputError(f"no structure file {str(path)!r}. Give specimen.structure_file relative to the config.")
    atoms = read_atoms(path)
    cell = np.asarray(atoms.cell)
    if abs(cell - np.diag(np.diag(cell))).max() > 1e-6 or cell[0, 0] <= 0 or cell[1, 1] <= 0:
        raise InputError(f"the cell of {str(path)!r} is {cell.tolist()}; allowed is an orthogonal cell with x and y sides above zero.")
    if any(share != 1 for kinds in atoms.info.get("occupancy", {}).values() for share in kinds.values()):
        raise InputError(f"{str(path)!r} has partly filled sites, which its format loses. Write it as extended XYZ with an array occupancy, an atom for each element of a site.")
    given = atoms.arrays
    if "debye_waller_B_A2" not in given:
        rms = given.get("rms_displacement_A")
        atoms.set_array("debye_waller_B_A2", np.full(len(atoms), config.specimen.debye_waller_b) if rms is None else debye_waller_b_from_rms(1.0) * np.square(rms, dtype=float))
    if "occupancy" not in given:
        atoms.set_array("occupancy", np.ones(len(atoms)))
    for name, largest in {"debye_waller_B_A2": np.inf, "occupancy": 1.0}.items():
        values = given[name]
        if values.shape != (len(atoms),) or values.dtype.kind not in "iuf" or not np.all((values >= 0) & (values <= largest) & np.isfinite(values)):
            raise InputError(f"{str(path)!r} has an array {name} {values.dtype}{values.shape}, not all of it between 0 and {largest:g}; allowed is a number from 0 to {largest:g} for each atom.")
    return atoms, (float(cell[0, 0]), float(cell[1, 1]))


def columns_of_structure(config: Config) -> tuple[tuple[int, float], ...]:
    """(number of atoms, depth [Å]) of every column of the config's structure file; empty without one."""
    if not config.specimen.structure_file:
        return ()
    structure, _ = _read_structure(config)
    elements = sorted(set(structure.get_chemical_symbols()))
    if elements != [config.specimen.element]:
        raise InputError(f"specimen.structure_file holds {', '.join(elements)}; design follows columns of specimen.element, {config.specimen.element}, alone.")
    atoms = structure.positions
    column = np.unique(atoms[:, :2].round(1), axis=0, return_inverse=True)[1].ravel()
    return tuple((int(np.sum(column == c)), float(atoms[column == c, 2].mean())) for c in range(column.max() + 1))


def write_library(config: Config, output, quiet: bool = False) -> None:
    """Build the library of the config's columns up to inference.max_atoms (else specimen.n_atoms) and write it."""
    library_for(config, config.inference.max_atoms or config.specimen.n_atoms, progress_bar(quiet)).save(output)
