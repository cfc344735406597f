"""Column libraries: packaged, from the user's cache, or built now and kept there."""

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np

from .. import processes
from ..config import Config
from ..errors import InputError
from ..io import read_atoms
from ..physics import asymmetry
from ..physics.column_images import is_round
from ..physics.detector import AnnularDetector, require_out_of_beam
from ..physics.electron import wavelength
from ..physics.frozen_phonon import build_gram
from ..physics.gram import ColumnGram, has_full_symmetry
from ..physics.library import ColumnLibrary, arrays_of, library_from_gram, load_gram, module_of, save_gram
from ..physics.optics import Microscope, edge_phase
from ..physics.rings import leaning_grams, quick_gram
from ..physics.specimen import Column
from ..physics.thermal import absorptive_gram, thermal_gram
from ..storage import load_arrays
from .lattice import CrystalColumns, UnitCell, crystal_columns, unit_cell

SCRAMBLINGS = 8  # fewer make no depth error one can trust
LENGTHS = (3, 6, 12, 24, 48)  # atoms of columns that libraries are built for
MARGIN = 60.0  # Å that depths may lie beyond the foci
LIVELIER = 0.05  # Å^2 of B, between columns whose difference stands for the derivative
LEAN = 0.5  # mrad of tilt, likewise
UNROUND = {"C12": (1, 2), "C21": (2, 1), "C23": (2, 3)}  # aberrations that residuals are asked for: n and m
FORMAT = 4  # of the files in the cache


def cache_folder() -> Path:
    """Where libraries are kept: $DEPTHPROB_CACHE, else the user's cache folder."""
    chosen = os.environ.get("DEPTHPROB_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(base) / "depthprob"


def build_library(
    column: Column,
    microscope: Microscope,
    detector: AnnularDetector,
    z_range: tuple[float, float] = (-260.0, 260.0),
    configurations: int = 32,
    seed: int = 0,
    model: str = "frozen_phonon",
    parametrization: str = "lobato",
    sampling: float | None = None,
    progress: Callable = lambda items, **_: items,
) -> ColumnLibrary:
    """Library of isolated columns of 1 to column.n_atoms atoms; `library.depth_error` says how far its thermal averages have converged.

    Parameters
    ----------
    z_range : (low, high)
        Range of defocus minus depth to cover [Å].
    configurations, seed : int
        Thermal configurations over all eight scramblings, and where their random numbers start; of a tilted column or a detector that
        is not round alone, since others are averaged in closed form.
    model : "frozen_phonon" or "absorptive"
    sampling : float, optional
        Of the potential [Å]; by default what the detector needs.

    Raises
    ------
    InputError
        For a detector that the direct beam falls on.

    Notes
    -----
    Kept in the user's cache with the Gram matrix behind it: another range, source size or aberration takes seconds, and an
    interrupted build goes on where it stopped.
    """
    gram = gram_of(column, microscope, detector, configurations, seed, model, parametrization, sampling, progress)
    return library_of(gram, microscope, z_range)


def gram_of(
    column: Column,
    microscope: Microscope,
    detector: AnnularDetector,
    configurations: int,
    seed: int,
    model: str,
    parametrization: str,
    sampling: float | None,
    progress: Callable,
    scramblings: int = SCRAMBLINGS,
) -> ColumnGram:
    """The Gram matrix of columns up to column.n_atoms: packaged, from the cache, or built now and kept.

    Frozen phonons are averaged in closed form where column and detector are round about the beam; `configurations`, `seed`, `sampling` and
    `scramblings` are of the Monte-Carlo mean, the only way for a tilted column or a detector that is not round.
    """
    energy, angle = float(microscope.energy), float(microscope.convergence_angle)
    require_out_of_beam(detector, angle)
    if model == "absorptive":
        return _by_first(ColumnGram, lambda: absorptive_gram(column, energy, angle, detector, parametrization, progress))
    wanted = {
        "element": column.element,
        "spacing": round(float(column.spacing), 6),
        "debye_waller_b": round(float(column.debye_waller_b), 6),
        "energy": energy,
        "parametrization": parametrization,
        "tilt": column.tilt,
        **detector.record,
    }
    is_round = has_full_symmetry(column, detector)
    # one pass gives all atom numbers, so a few lengths serve everyone
    longest = next((n for n in LENGTHS if n >= column.n_atoms), column.n_atoms) if is_round else column.n_atoms
    per_scrambling = max(1, configurations // scramblings)
    settings = wanted | {"angle": angle, "n_max": longest, "format": FORMAT}
    if not is_round:
        settings |= {"scramblings": scramblings, "configurations": per_scrambling, "seed": seed, "sampling": sampling}
    path = cache_folder() / f"gram_{_checksum(json.dumps(settings, sort_keys=True).encode())}.npz"

    def kept() -> ColumnGram | None:
        if is_round:
            for packaged in resources.files("depthprob.data").iterdir():
                if packaged.name.startswith("gram_"):
                    with resources.as_file(packaged) as there:
                        gram = load_gram(there)
                    if _serves(gram, wanted, angle, column.n_atoms):
                        return gram.first(column.n_atoms)
        gram = _cached(path, load_gram)
        return gram.first(column.n_atoms) if gram is not None and _serves(gram, wanted, angle, column.n_atoms) else None

    def averaged() -> ColumnGram:
        gram = thermal_gram(dataclasses.replace(column, n_atoms=longest), energy, angle, detector, parametrization, progress)
        save_gram(path, gram)
        return gram.first(column.n_atoms)

    gram = _by_first(ColumnGram, kept)
    if gram is not None:
        return gram
    if is_round:
        return _by_first(ColumnGram, averaged)
    checkpoint = path.with_suffix(".partial.npz")
    gram = build_gram(column, energy, angle, detector, per_scrambling, scramblings, seed, parametrization, checkpoint, progress, sampling)
    if processes.is_first():
        save_gram(path, gram)
        checkpoint.unlink(missing_ok=True)
    return gram


def _by_first(cls, make: Callable):
    """What the first process makes or finds, a `ColumnGram` or `ColumnLibrary`, in all processes; None where it finds none."""
    made = make() if processes.is_first() else None
    if not processes.of_first(np.array(made is not None)):
        return None
    nothing = dict.fromkeys((f.name for f in dataclasses.fields(cls)), np.zeros(0))
    arrays = processes.of_first(nothing if made is None else arrays_of(made))
    return module_of(cls, arrays) if made is None else made


def _serves(gram: ColumnGram, wanted: dict, angle: float, n_max: int) -> bool:
    own_angle = gram.aperture * float(wavelength(gram.energy)) * 1e3
    same = (np.isclose(getattr(gram, k), v) if isinstance(v, float) else getattr(gram, k) == v for k, v in wanted.items())
    return all(same) and gram.n_max >= n_max and own_angle >= angle * (1 - 1e-6)


def _cached(path: Path, load: Callable):
    """What a file of the cache holds; None where there is none, or one that is damaged or of another version."""
    try:
        return load(path) if path.exists() else None
    except InputError as fault:
        warnings.warn(f"{fault} It is built anew.", stacklevel=2)
        return None


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def library_name(microscope: Microscope, z_range: tuple[float, float], gram: ColumnGram) -> str:
    """File name that tells the lens and foci of a library, and the Gram matrix it came from."""
    m = microscope
    lens = [float(v) for v in (m.energy, m.convergence_angle, m.source_fwhm, m.focal_spread, m.spherical_aberration)]
    text = json.dumps([lens, {k: float(v) for k, v in sorted(m.aberrations.items())}, list(z_range), gram.longest, _checksum(np.ascontiguousarray(gram.blocks).tobytes()), FORMAT])
    return f"library_{_checksum(text.encode())}.npz"


def library_of(gram: ColumnGram, microscope: Microscope, z_range: tuple[float, float]) -> ColumnLibrary:
    """The library for one lens: packaged, from the cache, or made now and kept."""
    return _by_first(ColumnLibrary, lambda: _kept_library(gram, microscope, z_range))


def _kept_library(gram: ColumnGram, microscope: Microscope, z_range: tuple[float, float]) -> ColumnLibrary:
    name = library_name(microscope, z_range, gram)
    packaged = resources.files("depthprob.data") / name
    if packaged.is_file():
        with resources.as_file(packaged) as path:
            return ColumnLibrary.load(path)
    path = cache_folder() / name
    library = _cached(path, ColumnLibrary.load)
    if library is not None and (library.element, library.n_max) == (gram.element, gram.n_max) and np.isclose(library.spacing, gram.spacing):
        return library
    library = library_from_gram(gram, microscope, z_range)
    library.save(path)
    return library


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
    """The config's annuli, with the sensitivity in its file."""
    d = config.detector
    measured = None
    if d.sensitivity is not None:
        path = config.resolve(d.sensitivity)
        try:
            with path.open("rb") as file:
                measured = np.lib.format.read_array(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as fault:
            raise InputError(f"cannot read detector.sensitivity {str(path)!r} ({fault}). Give one array, written by numpy.save as .npy.") from None
    return AnnularDetector(d.inner_mrad, d.outer_mrad, measured, d.sensitivity_pixel_mrad)


def read_variance_of(config: Config) -> float:
    """Variance of the read noise [e^2]; the config gives its sd in raw values."""
    return (config.detector.read_noise / config.detector.gain) ** 2


def column_geometry(config: Config) -> CrystalColumns:
    """Columns of the config's crystal along its zone axis."""
    return crystal_columns(crystal_of(config), config.specimen.zone_axis)


def crystal_of(config: Config) -> UnitCell:
    """The config's crystal."""
    s = config.specimen
    return read_cell(config) if s.cell_file else unit_cell(s.structure, s.lattice_constant_A, s.lattice_constant_c_A)


def read_cell(config: Config) -> UnitCell:
    """The crystal in the config's cell_file."""
    path = config.resolve(config.specimen.cell_file)
    atoms = read_atoms(path)
    cell, elements = np.asarray(atoms.cell), sorted(set(atoms.get_chemical_symbols()))
    if abs(np.linalg.det(cell)) < 1e-6:
        raise InputError(f"{str(path)!r} has no unit cell (its vectors are {cell.tolist()}). Give a crystal, for instance a CIF file.")
    if elements != [config.specimen.element]:
        raise InputError(f"{str(path)!r} holds {', '.join(elements)}, but specimen.element is {config.specimen.element!r}. Give a crystal of that element alone.")
    return UnitCell(cell, cell, atoms.get_positions())


def column_of(config: Config, n_atoms: int) -> Column:
    """Isolated column of the config's crystal."""
    return Column(config.specimen.element, n_atoms, column_geometry(config).spacing, config.specimen.debye_waller_b, config.specimen.tilt_mrad)


def z_range_of(config: Config) -> tuple[float, float]:
    """Defocus minus depth that a library must cover: the foci, and depths up to `MARGIN` beyond the plane in focus."""
    defocus = config.focal_series.defocus
    return float(defocus.min() - MARGIN), float(defocus.max() + MARGIN)


def gram_for(config: Config, n_max: int, progress: Callable, scramblings: int = SCRAMBLINGS, configurations: int | None = None) -> ColumnGram:
    """`gram_of` for the config's columns up to n_max atoms; `thermal.configurations` is the total over the scramblings."""
    thermal, simulation = config.thermal, config.simulation
    return gram_of(
        column_of(config, n_max), microscope_of(config), detector_of(config), configurations or thermal.configurations, thermal.seed,
        thermal.model, simulation.parametrization, simulation.potential_sampling_A, progress, scramblings,
    )


def library_for(config: Config, n_max: int, progress: Callable) -> ColumnLibrary:
    """`build_library` for the config's columns up to n_max atoms and its foci."""
    return library_of(gram_for(config, n_max, progress), microscope_of(config), z_range_of(config))


def settings_of_library(config: Config) -> dict:
    """What of the config decides a library beside element, spacing and foci, by its keys."""
    detector = detector_of(config).record
    return {f"microscope.{key}": value for key, value in config.as_dict()["microscope"].items()} | {
        "detector.inner_mrad": detector["inner"],
        "detector.outer_mrad": detector["outer"],
        "detector.sensitivity": detector["sensitivity"],
        "specimen.debye_waller_B_A2": float(config.specimen.debye_waller_b),
        "specimen.tilt_mrad": config.specimen.tilt_mrad,
        "thermal.model": config.thermal.model,
        "simulation.parametrization": config.simulation.parametrization,
    }


def write_library(path, config: Config, progress: Callable) -> None:
    """Build the library of the config's columns up to inference.max_atoms (else specimen.n_atoms) and write it, with the settings it is for."""
    library = library_for(config, config.inference.max_atoms or config.specimen.n_atoms, progress)
    if processes.is_first():
        library.save(path, settings=json.dumps(settings_of_library(config)))


def read_library(path, config: Config) -> ColumnLibrary:
    """A library that `write_library` wrote, for the config's microscope, detector and crystal.

    Raises
    ------
    InputError
        Not such a file, or one for other settings.
    """
    library = ColumnLibrary.load(path)
    try:
        theirs = json.loads(str(load_arrays(path)["settings"]))
    except (KeyError, ValueError):
        raise InputError(f"{str(path)!r} does not say for which microscope and detector it is. Build it again with `depthprob library`.") from None
    ours = json.loads(json.dumps(settings_of_library(config)))
    unlike = [key for key in ours if theirs.get(key) != ours[key]]
    if unlike:
        said = "; ".join(f"{key} is {theirs.get(key)} in the library and {ours[key]} in the config" for key in unlike)
        raise InputError(f"{str(path)!r} is for other settings: {said}. Build it for these with `depthprob library`, or give none to have it built.")
    return library


def neighbouring_libraries(config: Config, n_max: int, progress: Callable) -> dict[str, tuple[ColumnLibrary, float]]:
    """Libraries of settings a little different from the config's, by what differs, with the difference; none where each would take minutes.

    convergence_angle [mrad], spherical_aberration [Å], focal_variance [Å^2], the square of the focal spread, and debye_waller_b [Å^2]; and of `UNROUND` [Å] C12_a = C12 cos(2 phi12),
    C12_b = C12 sin(2 phi12) and so on, and tilt_a, tilt_b, the crystal's tilt along x and y [mrad]; of round lenses, columns and detectors.
    """
    lens, column, detector = microscope_of(config), column_of(config, n_max), detector_of(config)
    if config.thermal.model == "absorptive" or not (is_round(lens) and has_full_symmetry(column, detector)):
        return {}
    gram = gram_for(config, n_max, progress)
    moved = {
        "convergence_angle": (dataclasses.replace(lens, convergence_angle=lens.convergence_angle - 0.2), -0.2),
        "spherical_aberration": (dataclasses.replace(lens, spherical_aberration=lens.spherical_aberration + 4e3), 4e3),
        "focal_variance": (dataclasses.replace(lens, focal_spread=(lens.focal_spread**2 + 64.0) ** 0.5), 64.0),
    }
    found = {name: (library_from_gram(gram, other, z_range_of(config)), step) for name, (other, step) in moved.items()}
    if detector.measured is None:
        livelier = dataclasses.replace(column, debye_waller_b=column.debye_waller_b + LIVELIER)
        warmer = quick_gram(livelier, lens.energy, lens.convergence_angle, detector, config.simulation.parametrization, progress)
        found["debye_waller_b"] = (library_from_gram(warmer, lens, z_range_of(config)), LIVELIER)
    library = library_of(gram, lens, z_range_of(config))
    end = library.pixel * library.images.shape[1]
    unround = {name: (asymmetry.by_aberration(gram.blocks.mean(0), gram.modes, lens, library.planes, end, n, m), m, 0.3 / edge_phase(lens, n)) for name, (n, m) in UNROUND.items()}
    if detector.measured is None:
        leaning, modes = leaning_grams(column, lens.energy, lens.convergence_angle, detector, config.simulation.parametrization, progress)
        unround["tilt"] = (asymmetry.by_tilt(leaning, modes, lens, library.planes - library.centre[-1], end), 1, LEAN)
    for name, (slopes, m, step) in unround.items():
        for part, other in zip("ab", asymmetry.beside(library, slopes, lens, m, step), strict=True):
            found[f"{name}_{part}"] = (other, step)
    return found


def atoms_needed(config: Config, volumes: np.ndarray, progress: Callable) -> int:
    """Largest atom number a library must hold for these cross-sections [Å^2], from growing columns; one thermal configuration where there is no closed form."""
    if config.inference.max_atoms:
        return config.inference.max_atoms
    largest = float(processes.of_first(1.15 * np.max(volumes)))
    for n_max in (12, 24, 48):
        round_or_short = n_max == 12 or has_full_symmetry(column_of(config, n_max), detector_of(config))
        try_first = gram_for(config, n_max, progress) if round_or_short else gram_for(config, n_max, progress, scramblings=1, configurations=1)
        library = _by_first(ColumnLibrary, partial(library_from_gram, try_first, microscope_of(config), (-20.0, 20.0), z_step=20.0))
        if library.cross_section[-1] > largest:
            return max(12, int(np.searchsorted(library.cross_section, largest)) + 2)
    raise InputError(
        f"the brightest column scatters {np.max(volumes):.3g} Å^2, more than {n_max} atoms of {config.specimen.element} "
        f"({library.cross_section[-1]:.3g} Å^2). Check dose, signal and detector angles, or set inference.max_atoms."
    )
