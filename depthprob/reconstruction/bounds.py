"""Cramér-Rao bounds of one isolated column, or of all columns of a structure file."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..config import Config
from ..errors import InputError
from ..inference import local
from ..inference.atoms import atom_information, gigabytes_of_atoms
from ..inference.crlb import field_information
from ..inference.problem import LARGE, make_problem
from ..physics.focal_series import Field, FocalSeries, counts_by_focal_variance, expected_counts
from ..physics.gram import ColumnGram, has_full_symmetry
from .joint import PRIOR_OF
from .libraries import MARGIN, column_of, detector_of, gram_for, library_of, microscope_of, read_variance_of, z_range_of
from .pipeline import GAUGE, GAUGE_FREE, refuse_beyond_limit
from .simulate import columns_of_structure, shape_of_cell

ATOM_MODEL = (
    "independent thermal displacements, averaged in closed form: no Monte-Carlo error, hence a standard error of zero, and exact derivatives; "
    "zero is no accuracy: wider and finer grids change those of six and ten gold atoms by up to 2 %"
)

UNDEFINED = "an isolated column's depth and a free focus offset cannot be told apart: bounds with focus_offset are null"

B_STEP = 0.05  # Å^2; of the difference that stands for the derivative by B


def _grams_about(config: Config, n_max: int, progress: Callable) -> list[ColumnGram]:
    """Gram matrices of columns whose B is lower and higher by `B_STEP`."""
    if config.thermal.model == "absorptive" or not has_full_symmetry(column_of(config, n_max), detector_of(config)):
        raise InputError(
            'crlb.nuisances holds "debye_waller_B", whose derivative comes from the closed thermal average; it is allowed for upright crystals, round detectors and thermal.model "'
            f'frozen_phonon", and here specimen.tilt_mrad is {list(config.specimen.tilt_mrad)} and thermal.model {config.thermal.model!r}. Leave it out.'
        )
    b = config.specimen.debye_waller_b
    if b <= B_STEP:
        raise InputError(f'crlb.nuisances holds "debye_waller_B", and specimen.debye_waller_B_A2 is {b:g}; allowed is more than {B_STEP:g} with it. Leave it out.')
    moved = [replace(config, specimen=replace(config.specimen, debye_waller_B_A2=b + step, rms_displacement_A=None)) for step in (-B_STEP, B_STEP)]
    return [gram_for(other, n_max, progress) for other in moved]


class _Bounds:
    """Bounds on depths in a field, from the library that `thermal.model` asks for, by the config's microscope and series, with what `[crlb]` says is known beforehand."""

    def __init__(self, config: Config, largest: int, shape: tuple[int, int], periodic: bool, z_range: tuple[float, float], progress: Callable):
        settings, microscope = config.focal_series, microscope_of(config)
        self.gram = gram_for(config, largest, progress)
        self.library = library_of(self.gram, microscope, z_range)
        self.model = "in closed form, over infinitely many configurations" if np.isinf(self.gram.configurations) else config.thermal.model
        dose = np.broadcast_to(np.asarray(settings.dose, float), settings.defocus.shape)
        self.series = FocalSeries(settings.defocus, settings.pixel_size_A, dose, shape, periodic)
        self.known = config.crlb.prior_sd
        self._prior_sd = {name: sd for word, sd in self.known.items() for name in PRIOR_OF[word]}
        self._read_variance = read_variance_of(config)
        self._slopes = {"focal_spread": lambda field: counts_by_focal_variance(field, self.library, self.series)}
        if "debye_waller_B" in config.crlb.nuisances:
            colder, warmer = (library_of(g, microscope, z_range) for g in _grams_about(config, largest, progress))
            self._slopes["debye_waller_B"] = lambda field: (expected_counts(field, warmer, self.series) - expected_counts(field, colder, self.series)) / (2 * B_STEP)

    def field(self, positions: np.ndarray, n_atoms: np.ndarray, depths: np.ndarray) -> Field:
        """Columns in vacuum, seen by a microscope without drift."""
        zero = np.zeros(len(self.series.defocus))
        return Field(positions, n_atoms, depths, zero + 1e-7, zero + 1, np.zeros((len(zero), 2)))

    def isolated(self, n_atoms: int) -> Field:
        """One column in the middle, its centre of mass at z = 0."""
        middle = (np.array([self.series.shape[::-1]]) - 1) / 2 * self.series.pixel_size
        return self.field(middle, np.array([n_atoms]), np.zeros(1))

    def __call__(self, field: Field, nuisances: tuple[str, ...] = (), progress: Callable = lambda items, **_: items) -> Callable[..., np.ndarray]:
        """A function of those of the nuisances that are unknown, which gives the bound on the depth of each column (C,) [Å]."""
        beside = {name: np.asarray(self._slopes[name](field)) for name in nuisances if name in self._slopes}
        information = field_information(field, self.library, self.series, nuisances, self._read_variance, beside, progress)
        return lambda unknown, others_known=False: information.depth_bounds(unknown, self._prior_sd, others_known)

    def described(self, n_atoms: int) -> dict:
        """What the bounds stand on."""
        error, configurations = self.library.depth_error[n_atoms - 1], self.gram.configurations
        return {
            "prior_sd": self.known,
            "configurations": None if np.isinf(configurations) else configurations * self.gram.blocks.shape[0],
            "thermal_average": self.model,
            "dose_e_per_A2": float(self.series.dose.mean()),
            "library_depth_error_A": None if np.isnan(error) else float(error),
        }


def _nuisance_sets(config: Config) -> list[tuple[str, ...]]:
    """Each nuisance alone, and all together."""
    return [s for s in dict.fromkeys([*((name,) for name in config.crlb.nuisances), config.crlb.nuisances]) if s]


def config_crlb(config: Config, progress: Callable = lambda items, **_: items) -> dict:
    """`structure_crlb` of the config's structure file, if it names one, else `column_crlb`."""
    return structure_crlb(config, progress) if config.specimen.structure_file else column_crlb(config, progress)


def structure_crlb(config: Config, progress: Callable = lambda items, **_: items) -> dict:
    """Bounds on the depth of every column in the config's structure file, beside all others; Alania et al. (2017), eqs. 8 to 10.

    The image is the whole cell. Columns scatter as isolated ones do, and add up (`focal_series.periodic`: across the edges as well).
    """
    found = columns_of_structure(config)
    defocus, count = config.focal_series.defocus, len(found.n_atoms)
    low, high = float(found.depths.min()), float(found.depths.max())
    if low < defocus.min() - MARGIN or high > defocus.max() + MARGIN:
        raise InputError(
            f"columns of specimen.structure_file are centred at z = {low:.1f} to {high:.1f} Å, and the foci reach from {defocus.min():g} to {defocus.max():g} Å; allowed are depths up to {MARGIN:g} Å "
            "beyond them. z = 0 is the plane in focus at defocus 0: move the structure, or the foci."
        )
    series_shape = shape_of_cell(found.cell, config.focal_series.pixel_size_A)
    z_range = float(defocus.min() - max(high, MARGIN)), float(defocus.max() - min(low, -MARGIN))
    bounds = _Bounds(config, int(found.n_atoms.max()), series_shape, config.focal_series.periodic, z_range, progress)
    field = bounds.field(found.positions, found.n_atoms, found.depths)
    if count > LARGE:
        problem = make_problem(np.zeros((len(defocus), *series_shape)), field, bounds.library, bounds.series, dense=False)
        refuse_beyond_limit(config, local.memory(problem) / 1e9, f"bounds on {count} columns in {len(defocus)} images of {series_shape[1]} x {series_shape[0]}", "cut the structure")
    bound, adrift = bounds(field, config.crlb.nuisances, progress), "focus_offset" in config.crlb.nuisances and "focus_offset_A" not in bounds.known
    null = adrift and count == 1
    each, rest = bound((), others_known=True), {"others": bound(())}
    rest |= {"+".join(s): None if null and "focus_offset" in s else bound(s) for s in _nuisance_sets(config)}
    median = lambda sd: None if sd is None else float(np.median(sd))
    broken = int(found.broken.sum())
    return {
        "specimen": f"{count} columns of {config.specimen.structure_file!r}, each beside the others; single numbers are medians over them",
        "column_depth_sd_A": median(each),
        "column_depth_sd_with_nuisances_A": {name: median(sd) for name, sd in rest.items()},
        "unknown": "column_depth_sd_A: one column's depth, all else known; 'others': all depths; every set of nuisances: all depths and the set",
        "columns": {
            "x_A": found.positions[:, 0],
            "y_A": found.positions[:, 1],
            "n_atoms": found.n_atoms,
            "depth_A": found.depths,
            "depth_sd_A": each,
            "depth_sd_with_nuisances_A": rest,
        },
        "undefined": UNDEFINED if null else None,
        **bounds.described(int(found.n_atoms.max())),
        "field_of_view_A": list(found.cell),
        "n_atoms": int(found.n_atoms.sum()),
        "gauge": f"with focus_offset {GAUGE_FREE}; without, {GAUGE}" if adrift else GAUGE,
        "warning": f"{broken} of {count} columns have atoms that are not spaced as the crystal's; they are taken for whole columns of as many atoms, centred where theirs are" if broken else None,
        "atom_depth_sd_A": None,
        "atom_depth_sd_standard_error_A": None,
        "atom_model": "none: bounds on single atoms are of an isolated column; leave specimen.structure_file out for those of specimen.n_atoms",
    }


def column_crlb(config: Config, progress: Callable = lambda items, **_: items) -> dict:
    """Bounds on the depths of the config's isolated column and of its atoms, in a square field; Alania et al. (2017), eqs. 8 to 10.

    The column's, alone and with sets of nuisances, from the library that `thermal.model` asks for; the atoms' from `atom_information`.
    """
    n = config.specimen.n_atoms
    microscope, detector, settings = microscope_of(config), detector_of(config), config.focal_series
    column = column_of(config, n)
    by_atoms = config.crlb.atoms and has_full_symmetry(column, detector)
    if by_atoms and config.simulation.memory_limit_GB is not None:
        refuse_beyond_limit(config, gigabytes_of_atoms(column, microscope, detector), f"bounds on the {n} atoms of the column", "leave the atoms out (crlb.atoms = false)")
    pixels = round(settings.field_of_view_A / settings.pixel_size_A)
    bounds = _Bounds(config, max(n, config.crlb.max_atoms or n), (pixels + 1 - pixels % 2,) * 2, False, z_range_of(config), progress)
    bound = bounds(bounds.isolated(n), config.crlb.nuisances)
    undefined = set() if "focus_offset_A" in bounds.known else {"focus_offset"}
    result = {
        "specimen": f"one isolated column of {n} atoms",
        "column_depth_sd_A": float(bound(())[0]),
        "column_depth_sd_with_nuisances_A": {"+".join(s): None if undefined & set(s) else float(bound(s)[0]) for s in _nuisance_sets(config)},
        "undefined": UNDEFINED if undefined else None,
        **bounds.described(n),
        "field_of_view_A": settings.field_of_view_A,
        "n_atoms": n,
        "gauge": GAUGE,
        "atom_depth_sd_A": None,
        "atom_depth_sd_standard_error_A": None,
    }
    if config.crlb.max_atoms:
        numbers = range(1, config.crlb.max_atoms + 1)
        result["column_depth_sd_by_n_atoms_A"] = [float(bounds(bounds.isolated(m))(())[0]) for m in progress(numbers, desc="bounds", unit="column")]
    if config.crlb.atoms and not by_atoms:
        result["atom_model"] = (
            "none: bounds on single atoms come from a deterministic model with full rotational symmetry, which a tilted column or a detector "
            "with a measured map has not; theirs are null"
        )
    elif by_atoms:
        atoms = atom_information(column, microscope, detector, bounds.series, config.simulation.parametrization, progress)
        finite = [float(sd) if np.isfinite(sd) else None for sd in atoms.sd()]
        result |= {
            "atom_depth_sd_A": finite,
            "atom_depth_sd_standard_error_A": [0.0] * n,
            "atom_model": ATOM_MODEL,
            "column_depth_sd_of_atom_model_A": atoms.sd_together(),
            "atom_combinations": atoms.in_words(),
            "atom_fisher_information_per_A2": atoms.matrix.tolist(),
        }
        if max(sd or np.inf for sd in finite) > column.spacing * n:
            result["warning"] = (
                "Bounds longer than the column mean that these single depths are not measured at all; Cramér-Rao is a statement about small "
                "errors. Read atom_combinations: it tells which combinations are."
            )
    return result
