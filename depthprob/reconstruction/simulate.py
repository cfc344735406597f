"""Focal series of a column or of a structure file, and the columns that such a file holds."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from ..config import Config
from ..errors import InputError
from ..io import read_atoms
from ..physics.gram import default_sampling
from ..physics.particle import images_from_gram, simulate_particle
from ..physics.specimen import debye_waller_b_from_rms
from ..stack import Stack
from .libraries import column_geometry, detector_of, library_for, microscope_of
from .pipeline import progress_bar

SAME_COLUMN = 0.3  # Å aside, of atoms one above the other
UNEVEN = 0.1  # of the crystal's spacing


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
        structure, cell = read_structure(config)
        shape = shape_of_cell(cell, pixel)
        sampling = config.simulation.potential_sampling_A or default_sampling(microscope.energy, detector.outermost, microscope.convergence_angle)
        halves, waves = simulate_particle(
            structure.positions, structure.get_chemical_symbols(), structure.arrays["debye_waller_B_A2"], cell, microscope, detector, config.thermal.configurations,
            config.thermal.seed, sampling, config.simulation.parametrization, checkpoint, progress, structure.arrays["occupancy"], config.specimen.tilt_mrad,
        )
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


def read_structure(config: Config):
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


class StructureColumns(NamedTuple):
    """Columns of a structure file.

    Attributes
    ----------
    positions : (C, 2)
        [Å].
    n_atoms : (C,) int
    depths : (C,)
        Mean z of the atoms [Å].
    broken : (C,) bool
        Whether its atoms are not evenly spaced as the crystal's.
    cell : (Lx, Ly)
        [Å].
    """

    positions: np.ndarray
    n_atoms: np.ndarray
    depths: np.ndarray
    broken: np.ndarray
    cell: tuple[float, float]


def columns_of_structure(config: Config) -> StructureColumns:
    """Columns along z of the atoms in the config's structure file.

    Raises
    ------
    InputError
        For atoms of other elements, sites partly filled, and atoms along z that are not spaced as the config's crystal along its zone axis.
    """
    structure, cell = read_structure(config)
    elements = sorted(set(structure.get_chemical_symbols()))
    if elements != [config.specimen.element]:
        raise InputError(f"specimen.structure_file holds {', '.join(elements) or 'no atoms'}; bounds and plans are of columns of specimen.element, {config.specimen.element}, alone.")
    if np.any(structure.arrays["occupancy"] != 1):
        raise InputError("specimen.structure_file has an array occupancy with sites partly filled; bounds and plans are of columns of whole atoms. Leave it out, or take away what is not there.")
    atoms = structure.positions
    pairs = cKDTree(np.mod(atoms[:, :2], cell), boxsize=cell).query_pairs(SAME_COLUMN, output_type="ndarray")
    count, column = connected_components(coo_array((np.ones(len(pairs)), pairs.T), shape=(len(atoms), len(atoms))), directed=False)
    first = atoms[np.unique(column, return_index=True)[1], :2][column]
    beside = np.mod(atoms[:, :2] - first + np.array(cell) / 2, cell) - np.array(cell) / 2
    n_atoms = np.bincount(column, minlength=count)
    mean = lambda values: np.bincount(column, values) / n_atoms
    order = np.lexsort((atoms[:, 2], column))
    steps, within = np.diff(atoms[order, 2]), np.diff(column[order]) == 0
    spacing = column_geometry(config).spacing
    if within.any() and abs(np.median(steps[within]) - spacing) > UNEVEN * spacing:
        raise InputError(
            f"atoms along z in specimen.structure_file are {np.median(steps[within]):.3f} Å apart, and those of the config's crystal along specimen.zone_axis {list(config.specimen.zone_axis)} {spacing:.3f} Å. "
            "Turn the structure so that its columns lie along z, or give its crystal and zone axis."
        )
    uneven = within & (abs(steps - spacing) > UNEVEN * spacing)
    positions = np.stack([mean(first[:, k] + beside[:, k]) for k in range(2)], 1)
    return StructureColumns(positions, n_atoms, mean(atoms[:, 2]), np.bincount(column[order][:-1], uneven, count) > 0, cell)


def shape_of_cell(cell: tuple[float, float], pixel: float) -> tuple[int, int]:
    """(ny, nx) of an image of a whole cell (Lx, Ly) [Å]."""
    shape = tuple(round(side / pixel) for side in cell[::-1])
    if any(abs(n * pixel - side) > 1e-3 * pixel * n for n, side in zip(shape[::-1], cell, strict=True)):
        raise InputError(f"pixel_size_A is {pixel:g} Å, but the cell of {cell[0]:g} x {cell[1]:g} Å is no whole number of pixels. Choose one that divides both sides.")
    return shape
