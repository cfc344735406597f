"""From a raw focal series to atoms: every stage in order, each usable alone."""

import hashlib
import json
import os
import time
from dataclasses import dataclass, field, replace
from importlib import metadata, resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ..config import Config
from ..errors import InputError
from ..inference.gaussian_peak import fit_gaussian_peaks
from ..inference.likelihood import column_amplitudes
from ..inference.posterior import infer
from ..io import Stack, read_stack, write_columns_csv, write_drift_csv, write_json, write_xyz
from ..physics.detector import AnnularDetector
from ..physics.focal_series import Field, FocalSeries, expected_counts
from ..physics.library import ColumnLibrary, build_gram, library_from_gram
from ..physics.optics import Microscope
from ..physics.specimen import Column
from .columns import central_average, find_columns, fit_columns
from .counting import count_by_library, gaussian_mixture_counts
from .drift import estimate_drift, shift_images
from .lattice import crystal_columns, snap

GAUGE = "absolute: z = 0 is the plane in focus at defocus 0 (the focus offset is held at zero)"
GAUGE_FREE = "relative: the focus offset is free, so only depths relative to the field's mean are measured"


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
    average_image: np.ndarray
    gaussian_model_image: np.ndarray
    positions: np.ndarray
    cross_section: np.ndarray
    cross_section_sd: np.ndarray
    n_atoms: np.ndarray
    n_probability: np.ndarray
    library_cross_section: np.ndarray
    mixture_icl: np.ndarray
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


def microscope_of(config: Config) -> Microscope:
    """The config's lens, in the units of the physics."""
    m = config.microscope
    return Microscope(
        energy=m.energy_keV * 1e3,
        convergence_angle=m.convergence_angle_mrad,
        source_fwhm=m.source_fwhm_A,
        focal_spread=m.focal_spread_A,
        spherical_aberration=m.spherical_aberration_mm * 1e7,
        aberrations=m.aberrations,
    )


def detector_of(config: Config) -> AnnularDetector:
    return AnnularDetector(inner=config.detector.inner_mrad, outer=config.detector.outer_mrad)


def cache_folder() -> Path:
    """Where libraries are kept: $DEPTHPROB_CACHE, else the user's cache folder."""
    chosen = os.environ.get("DEPTHPROB_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(base) / "depthprob"


def _settings(config: Config, spacing: float) -> dict:
    """What a Gram matrix depends on."""
    m, d, s = config.microscope, config.detector, config.simulation
    return {
        "element": config.specimen.element,
        "spacing": round(float(spacing), 6),
        "debye_waller_b": round(float(config.specimen.debye_waller_b), 6),
        "energy": m.energy_keV * 1e3,
        "inner": float(d.inner[0]),
        "outer": float(d.outer[0]),
        "parametrization": s.parametrization,
    }


def _matches(gram: ColumnGram, config: Config, spacing: float, n_max: int) -> bool:
    wanted = _settings(config, spacing)
    angle = gram.aperture * float(wavelength(gram.energy)) * 1e3
    return (
        all(np.isclose(getattr(gram, k), v) if isinstance(v, float) else getattr(gram, k) == v for k, v in wanted.items())
        and gram.n_max >= n_max
        and angle >= config.microscope.convergence_angle_mrad * (1 - 1e-6)
    )


def gram_for(config: Config, n_max: int, progress, scramblings: int = 8, configurations: int | None = None) -> ColumnGram:
    """The Gram matrix of columns up to n_max atoms: packaged, from the cache, or built now and kept.

    `thermal.configurations` in the config is the total, shared over the scramblings.
    """
    spacing = column_geometry(config).spacing
    for packaged in resources.files("depthprob.data").iterdir():
        if packaged.name.startswith("gram_"):
            with resources.as_file(packaged) as path:
                gram = load_gram(path)
            if _matches(gram, config, spacing, n_max):
                return gram
    per_scrambling = configurations or max(1, config.thermal.configurations // scramblings)
    wanted = _settings(config, spacing) | {
        "angle": config.microscope.convergence_angle_mrad,
        "n_max": n_max,
        "scramblings": scramblings,
        "configurations": per_scrambling,
        "seed": config.thermal.seed,
        "sampling": config.simulation.potential_sampling_A,
        "format": 1,
    }
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder() / f"gram_{key}.npz"
    if path.exists():
        return load_gram(path)
    column = Column(wanted["element"], n_max, spacing, wanted["debye_waller_b"])
    checkpoint = path.with_suffix(".partial.npz")
    gram = build_gram(
        column,
        wanted["energy"],
        wanted["angle"],
        detector_of(config),
        configurations=per_scrambling,
        scramblings=scramblings,
        seed=config.thermal.seed,
        parametrization=wanted["parametrization"],
        sampling=wanted["sampling"],
        checkpoint=checkpoint,
        progress=progress,
    )
    save_gram(path, gram)
    checkpoint.unlink(missing_ok=True)
    return gram


def column_geometry(config: Config):
    """Columns of the config's crystal along its zone axis."""
    s = config.specimen
    return crystal_columns(s.structure, s.lattice_constant_A, s.zone_axis)


def library_for(config: Config, n_max: int, progress, margin: float = 60.0) -> ColumnLibrary:
    """Library for the config's lens and foci, atoms up to n_max, depths up to `margin` Å beyond the foci; kept in the cache."""
    gram = gram_for(config, n_max, progress)
    defocus = config.focal_series.defocus
    z_range = (float(defocus.min() - margin), float(defocus.max() + margin))
    m = config.microscope
    text = json.dumps([repr(m), z_range, gram.n_max, float(abs(gram.blocks).sum()), 1], sort_keys=True)
    path = cache_folder() / f"library_{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"
    for packaged in resources.files("depthprob.data").iterdir():
        if packaged.name == path.name:
            with resources.as_file(packaged) as found:
                return ColumnLibrary.load(found)
    if path.exists():
        return ColumnLibrary.load(path)
    library = library_from_gram(gram, microscope_of(config), z_range)
    library.save(path)
    return library


def atoms_needed(config: Config, volumes: np.ndarray, progress) -> int:
    """Largest atom number a library must hold for these cross-sections [Å^2], from one thermal configuration of growing columns."""
    if config.inference.max_atoms:
        return config.inference.max_atoms
    largest = 1.15 * np.max(volumes)
    for n_max in (12, 24, 48):
        try_first = gram_for(config, n_max, progress, scramblings=1, configurations=1) if n_max > 12 else gram_for(config, 12, progress)
        library = library_from_gram(try_first, microscope_of(config), (-20.0, 20.0), z_step=20.0)
        if library.cross_section[-1] > largest:
            return max(12, int(np.searchsorted(library.cross_section, largest)) + 2)
    raise InputError(
        f"the brightest column scatters {np.max(volumes):.3g} Å^2, more than {n_max} atoms of {config.specimen.element} "
        f"({library.cross_section[-1]:.3g} Å^2). Check dose, signal and detector angles, or set inference.max_atoms."
    )


def disc_weights(positions, shifts, shape, pixel_size, radius, periodic):
    """Unit discs around columns, in every image: list over images of (column, pixel) sparse rows."""


def reconstruct(
    stack: Stack,
    config: Config,
    library: ColumnLibrary | None = None,
    method: str | None = None,
    quiet: bool = False,
    progress=None,
) -> Reconstruction:
    """Take a focal series to column depths, atom numbers and atoms.

    Parameters
    ----------
    stack : Stack
        Counts (F, y, x) as `io.read_stack` returns them.
    library : ColumnLibrary, optional
        Built (or found in the cache) when absent.

    Raises
    ------
    InputError
        When the series shows no columns, or columns brighter than the library.
    """
    method = method or config.inference.method
    stages = Stages(quiet)
    progress = progress or (lambda items, **k: tqdm(items, disable=quiet, **k))
    series_config = config.focal_series
    periodic, pixel = series_config.periodic, stack.pixel_size_A
    dose = np.broadcast_to(np.asarray(series_config.dose, float), stack.defocus_A.shape)
    fraction = stack.data / (dose * pixel**2)[:, None, None]
    warnings: list[str] = []

    stages("drift")
    drift = estimate_drift(fraction, pixel, stack.defocus_A, periodic)

    stages("columns")
    aligned = shift_images(fraction, -drift, periodic)
    average, chosen = central_average(aligned, stack.defocus_A)
    found = find_columns(average, pixel)
    if len(found) < 1:
        raise InputError("no columns were found on the average of the central images. Check signal, dose and defocus of the series.")
    columns = fit_columns(average, found, pixel, periodic)

    stages("library")
    if library is None:
        library = library_for(config, atoms_needed(config, columns.volume, progress), progress)
    stages("counts")
    reference = library_cross_sections(library, stack.defocus_A[chosen], pixel)
    counted = count_by_library(columns.volume, columns.volume_sd, reference)
    mixture = gaussian_mixture_counts(columns.volume, max_components=min(len(found) // 2 + 1, library.n_max + 3))

    stages("joint fit")
    series = FocalSeries(stack.defocus_A, pixel, dose, stack.data.shape[1:], periodic)
    start = Field(
        positions=columns.positions,
        n_atoms=np.asarray(counted.n),
        depths=np.zeros(len(found)),
        background=np.full(len(dose), max(1e-5, float(np.quantile(fraction, 0.02)))),
        gain=np.ones(len(dose)),
        image_shifts=drift * pixel,
    )
    mask = edge_mask(series, columns.positions, library, config)
    fit = infer(stack.data, start, library, series, method="mle", mask=mask, free=config.inference.free)
    probability = counted.probability
    for _ in range(4):
        amplitude, amplitude_sd = column_amplitudes(stack.data, fit.field, library, series, mask=mask)
        n_now = np.asarray(fit.field.n_atoms)
        measured = amplitude * library.cross_section[n_now - 1]
        sd = np.hypot(amplitude_sd, 0.015) * library.cross_section[n_now - 1]
        recount = count_by_library(measured, sd, library.cross_section)
        probability = recount.probability
        if np.array_equal(recount.n, n_now):
            break
        fit = infer(stack.data, fit.field._replace_counts(recount.n), library, series, method="mle", mask=mask, free=config.inference.free)
    else:
        warnings.append("Atom counts had not settled after four rounds of counting and fitting.")

    stages("Gaussian peaks")
    field = fit.field
    shifts = np.asarray(field.image_shifts)
    baseline = fit_gaussian_peaks(fraction, np.asarray(field.positions), np.asarray(field.n_atoms), library, series, shifts)

    stages(f"posterior ({method})")
    return None
