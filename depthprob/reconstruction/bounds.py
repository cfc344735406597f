"""Cramér-Rao bounds of one isolated column."""

import numpy as np

from ..config import Config
from ..physics.focal_series import Field, FocalSeries
from .pipeline import gram_for, library_from_gram, microscope_of, z_range_of
from ..inference.likelihood import column_bounds, make_problem


def column_crlb(config: Config) -> dict:
    """Bounds on the depth of the config's isolated column, with nothing else free and with sets of nuisances, in a square field.

    Poisson counts; eqs. 8 to 10 of Alania et al. (2017). Bounds on single atoms are not computed yet: `atom_depth_sd_A` is None.
    """
    n = config.specimen.n_atoms
    microscope, settings = microscope_of(config), config.focal_series
    library = library_from_gram(gram_for(config, n, lambda items, **_: items), microscope, z_range_of(config))
    pixels = int(round(settings.field_of_view_A / settings.pixel_size_A))
    shape = (pixels + 1 - pixels % 2,) * 2
    defocus = settings.defocus
    dose = np.broadcast_to(np.asarray(settings.dose, float), defocus.shape)
    series = FocalSeries(defocus, settings.pixel_size_A, dose, shape, False)
    centre = (shape[0] - 1) / 2 * settings.pixel_size_A
    zero = np.zeros(len(defocus))
    field = Field(np.array([[centre, centre]]), np.array([n]), np.zeros(1), zero + 1e-7, zero + 1, np.zeros((len(defocus), 2)))

    def bound(free):
        problem = make_problem(np.zeros((len(defocus), *shape)), field, library, series, free)
        return float(column_bounds(problem.start, problem)[0])

    sets = [(name,) for name in config.crlb.nuisances] + [tuple(config.crlb.nuisances)]
    free_offset = "focus_offset"
    with_nuisances = {"+".join(s): None if free_offset in s else bound(s) for s in dict.fromkeys(sets) if s and "source_size" not in s}
    return {
        "column_depth_sd_A": bound(()),
        "column_depth_sd_with_nuisances_A": with_nuisances,
        "undefined": "an isolated column's depth and a free focus offset cannot be told apart: bounds with focus_offset are null",
        "atom_depth_sd_A": None,
        "atom_depth_sd_standard_error_A": None,
        "configurations": int(config.thermal.configurations),
        "field_of_view_A": settings.field_of_view_A,
        "dose_e_per_A2": float(dose.mean()),
        "n_atoms": n,
        "library_depth_error_A": float(library.depth_error[n - 1]),
    }
