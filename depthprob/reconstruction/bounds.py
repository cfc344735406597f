"""Cramér-Rao bounds of one isolated column."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..config import Config
from ..errors import InputError
from ..inference.atoms import atom_information, gigabytes_of_atoms
from ..inference.crlb import crlb
from ..physics.focal_series import Field, FocalSeries, counts_by_focal_variance, expected_counts
from ..physics.gram import ColumnGram, has_full_symmetry
from .joint import PRIOR_OF
from .libraries import column_of, detector_of, gram_for, library_of, microscope_of, read_variance_of, z_range_of
from .pipeline import GAUGE, refuse_beyond_limit

ATOM_MODEL = (
    "independent thermal displacements, averaged in closed form: no Monte-Carlo error, hence a standard error of zero, and exact derivatives; "
    "zero is no accuracy: wider and finer grids change those of six and ten gold atoms by up to 2 %"
)

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
    largest = max(n, config.crlb.max_atoms or n)
    gram = gram_for(config, largest, progress)
    library = library_of(gram, microscope, z_range_of(config))
    pixels = round(settings.field_of_view_A / settings.pixel_size_A)
    shape = (pixels + 1 - pixels % 2,) * 2
    defocus = settings.defocus
    dose = np.broadcast_to(np.asarray(settings.dose, float), defocus.shape)
    series = FocalSeries(defocus, settings.pixel_size_A, dose, shape, False)
    centre = (shape[0] - 1) / 2 * settings.pixel_size_A
    zero = np.zeros(len(defocus))
    field_of_n = lambda n: Field(np.array([[centre, centre]]), np.array([n]), np.zeros(1), zero + 1e-7, zero + 1, np.zeros((len(defocus), 2)))

    known = config.crlb.prior_sd
    prior_sd = {name: sd for word, sd in known.items() for name in PRIOR_OF[word]}

    by_parameter = {"focal_spread": lambda field: counts_by_focal_variance(field, library, series)}
    if "debye_waller_B" in config.crlb.nuisances:
        colder, warmer = (library_of(g, microscope, z_range_of(config)) for g in _grams_about(config, largest, progress))
        by_parameter["debye_waller_B"] = lambda field: (expected_counts(field, warmer, series) - expected_counts(field, colder, series)) / (2 * B_STEP)

    def bound(nuisances, n=n):
        free = tuple(name for name in nuisances if name not in by_parameter)
        beside = {name: by_parameter[name](field_of_n(n)) for name in nuisances if name not in free}
        return float(crlb(field_of_n(n), library, series, free, read_variance_of(config), prior_sd, beside)[0])

    sets = [(name,) for name in config.crlb.nuisances] + [config.crlb.nuisances]
    undefined = set() if "focus_offset_A" in known else {"focus_offset"}
    result = {
        "column_depth_sd_A": bound(()),
        "column_depth_sd_with_nuisances_A": {"+".join(s): None if undefined & set(s) else bound(s) for s in dict.fromkeys(sets) if s},
        "undefined": "an isolated column's depth and a free focus offset cannot be told apart: bounds with focus_offset are null" if undefined else None,
        "prior_sd": known,
        "configurations": None if np.isinf(gram.configurations) else gram.configurations * gram.blocks.shape[0],
        "thermal_average": "in closed form, over infinitely many configurations" if np.isinf(gram.configurations) else config.thermal.model,
        "field_of_view_A": settings.field_of_view_A,
        "dose_e_per_A2": float(dose.mean()),
        "n_atoms": n,
        "specimen": f"one isolated column of {n} atoms" + (f"; specimen.structure_file {config.specimen.structure_file!r} is not read" if config.specimen.structure_file else ""),
        "library_depth_error_A": None if np.isnan(library.depth_error[n - 1]) else float(library.depth_error[n - 1]),
        "gauge": GAUGE,
        "atom_depth_sd_A": None,
        "atom_depth_sd_standard_error_A": None,
    }
    if config.crlb.max_atoms:
        numbers = range(1, config.crlb.max_atoms + 1)
        result["column_depth_sd_by_n_atoms_A"] = [bound((), m) for m in progress(numbers, desc="bounds", unit="column")]
    if config.crlb.atoms and not by_atoms:
        result["atom_model"] = (
            "none: bounds on single atoms come from a deterministic model with full rotational symmetry, which a tilted column or a detector "
            "with a measured map has not; theirs are null"
        )
    elif by_atoms:
        atoms = atom_information(column, microscope, detector, series, config.simulation.parametrization, progress)
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
