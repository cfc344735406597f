"""Fisher information on the depths of a column's single atoms."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ..physics.column_images import at_points, column_images, plane_wave_images
from ..physics.detector import AnnularDetector, require_out_of_beam
from ..physics.electron import wavelength
from ..physics.focal_series import FocalSeries
from ..physics.frozen_phonon import CHEAP_ANGLE, CHEAP_CELL, thermal_draws
from ..physics.gram import (
    DiscModes,
    Modes,
    default_cell,
    default_reach,
    default_sampling,
    laguerre_gauss_modes,
    prepare_sweep,
    require_full_symmetry,
    sweep_atoms,
    symmetrised,
)
from ..physics.optics import Microscope
from ..physics.rings import gigabytes_of_derivatives, ring_grams
from ..physics.specimen import Column
from ..physics.thermal import depth_derivatives, gram_of_depths, incident_disc, prepare_channel
from .fisher import Information, poisson_fisher


def atom_information(
    column: Column,
    microscope: Microscope,
    detector: AnnularDetector,
    series: FocalSeries,
    parametrization: str = "lobato",
    progress: Callable = lambda items, **_: items,
) -> Information:
    """Fisher information of a series on the depth of each atom of an isolated column, centred in the image with its depth zero.

    Thermal motion averaged in closed form, so without Monte-Carlo noise, and exact derivatives; sums in float64. Plain annuli go by `rings`, in a fifth of the time
    that `atom_counts` takes for ten atoms and with bounds up to 1.3 % lower. Lateral positions need not be free: the images' derivatives by them are odd, those by
    depths even, so they share no information. Read noise is not included.

    Raises
    ------
    InputError
        For a tilted column, and a detector that is not round or that the direct beam falls on.
    """
    require_out_of_beam(detector, float(microscope.convergence_angle))
    if detector.measured is None:
        aperture = float(microscope.convergence_angle) * 1e-3 / float(wavelength(microscope.energy))
        grams, modes = ring_grams(column, float(microscope.energy), aperture, detector.edges, parametrization, derivatives=True, progress=progress)
        with jax.enable_x64(True):
            counts = _counts(grams[::2].sum(0), modes, column, microscope, series)  # every other ring lies between two annuli
    else:
        counts = atom_counts(column, microscope, detector, series, parametrization=parametrization, progress=progress)
    return information_of(poisson_fisher(counts[0], counts[1:]))


def gigabytes_of_atoms(column: Column, microscope: Microscope, detector: AnnularDetector) -> float:
    """Memory that `atom_information` of plain annuli takes, half a GB of it whatever the column: the rest grows with the square of the number of atoms."""
    energy = float(microscope.energy)
    return 0.5 + gigabytes_of_derivatives(column, energy, float(microscope.convergence_angle) * 1e-3 / float(wavelength(energy)), detector.edges)


def atom_counts(
    column: Column,
    microscope: Microscope,
    detector: AnnularDetector,
    series: FocalSeries,
    depths: np.ndarray | None = None,
    derivatives: bool = True,
    parametrization: str = "lobato",
    progress: Callable = lambda items, **_: items,
) -> Float[np.ndarray, "entry focus y x"]:
    """Expected counts of an isolated column's series, then their derivatives by the depth of each atom [1/Å], top atom first.

    Thermal motion averaged in closed form (`physics.thermal`), float64 and complex128.

    Parameters
    ----------
    depths : (atom,), optional
        z of each atom [Å]; by default equally spaced about zero. Without derivatives also (entry, atom).
    derivatives : bool
        False for the counts alone, an entry for each row of depths.

    Raises
    ------
    InputError
        For a detector that the direct beam falls on.
    """
    require_out_of_beam(detector, float(microscope.convergence_angle))
    energy = float(microscope.energy)
    aperture = float(microscope.convergence_angle) * 1e-3 / float(wavelength(energy))
    modes = incident_disc(column, energy, aperture)
    channel = prepare_channel(column, energy, aperture, detector, parametrization)
    depths = np.asarray(depths if depths is not None else (np.arange(column.n_atoms) - (column.n_atoms - 1) / 2) * float(column.spacing))
    grams = depth_derivatives(depths, channel, modes, progress) if derivatives else np.stack([gram_of_depths(row, channel, modes) for row in np.atleast_2d(depths)])
    with jax.enable_x64(True):
        return _counts(grams, modes, column, microscope, series)


def _counts(grams: np.ndarray, modes: Modes | DiscModes, column: Column, microscope: Microscope, series: FocalSeries) -> Float[np.ndarray, "entry focus y x"]:
    """Expected counts of the series, and of their derivatives, from Gram blocks or whole matrices; the column in the image's middle."""
    ny, nx = series.shape
    aperture = float(microscope.convergence_angle) * 1e-3 / float(wavelength(microscope.energy))
    widest = float(abs(np.asarray(series.defocus)).max()) + column.spacing * column.n_atoms / 2
    cell = max(2 * (1e-3 * float(microscope.convergence_angle) * widest + 7.0), 1.5 * max(ny, nx) * series.pixel_size)
    size = int(np.ceil(4.1 * aperture * cell / 2)) * 2
    draw = plane_wave_images if grams.ndim == 3 else column_images
    fine = draw(grams, modes, microscope, np.asarray(series.defocus), cell, size)
    at_y, at_x = ((np.arange(n) - (n - 1) / 2) * series.pixel_size for n in (ny, nx))
    flat = at_points(fine.reshape(-1, size, size), cell / size, at_x, at_y)
    dose = np.broadcast_to(np.asarray(series.dose, float), np.shape(series.defocus))
    return flat.reshape(len(grams), -1, ny, nx) * (dose * series.pixel_size**2)[:, None, None]


class PhononInformation(NamedTuple):
    """Fisher information on atom depths from so many frozen-phonon configurations.

    Attributes
    ----------
    configurations : int
        In each group.
    raw, symmetrised : (group, atom, atom)
        From the mean of each group's configurations, as it is and averaged over turns and mirrors [1/Å^2].
    crossed : (pair, atom, atom)
        From symmetrised groups by pairs, one derivative of each product from either group: without the Monte-Carlo bias, but not
        necessarily positive definite.
    """

    configurations: int
    raw: np.ndarray
    symmetrised: np.ndarray
    crossed: np.ndarray


def phonon_information(
    column: Column,
    microscope: Microscope,
    detector: AnnularDetector,
    series: FocalSeries,
    configurations: tuple[int, ...] = (1, 4, 16),
    groups: int = 4,
    seed: int = 0,
    parametrization: str = "lobato",
    progress: Callable = lambda items, **_: items,
) -> list[PhononInformation]:
    """Fisher information on atom depths against the number of frozen-phonon configurations, in independent groups.

    Noise in a derivative counts as information: lateral displacements make atoms of one configuration distinguishable that are not. The
    waves travel on the coarse grid of the library's cheap sweep, in complex64; sums of the Fisher matrices are float64.

    Raises
    ------
    InputError
        For a tilted column, and a detector that is not round or that the direct beam falls on.
    """
    require_full_symmetry(column, detector, "the information from symmetrised configurations")
    require_out_of_beam(detector, float(microscope.convergence_angle))
    lam = float(wavelength(microscope.energy))
    angle, outer = float(microscope.convergence_angle), detector.outermost
    aperture, reach = angle * 1e-3 / lam, default_reach(column, angle)
    modes = laguerre_gauss_modes(reach, aperture)
    sampling = max(default_sampling(microscope.energy, outer, angle), lam / (3 * CHEAP_ANGLE * outer * 1e-3))
    cell = CHEAP_CELL * default_cell(column, microscope.energy, aperture, reach)
    sweep = prepare_sweep(column, microscope.energy, aperture, detector, reach, parametrization, sampling, cell)
    draws = [thermal_draws(column.n_atoms, column.debye_waller_b, max(configurations), seed * 1000 + g) for g in range(groups)]
    sums = np.zeros((groups, column.n_atoms + 1, len(modes.l), len(modes.l)), np.complex128)
    found = []
    order = [(c, g) for c in range(max(configurations)) for g in range(groups)]
    for c, g in progress(order, desc="frozen phonons", unit="configuration"):
        sums[g] += sweep_atoms(jnp.asarray(draws[g][c], jnp.float32), sweep)
        if g + 1 == groups and c + 1 in configurations:
            means = (sums / (c + 1)).astype(np.complex64)
            raw = [_counts(m, modes, column, microscope, series) for m in means]
            even = [_counts(symmetrised(m, modes), modes, column, microscope, series) for m in means]
            rate = np.mean([e[0] for e in even], 0)
            crossed = [_crossed(rate, even[a][1:], even[b][1:]) for a in range(groups) for b in range(a)]
            found.append(PhononInformation(c + 1, *(np.stack([poisson_fisher(n[0], n[1:]) for n in side]) for side in (raw, even)), np.stack(crossed)))
    return found


def _crossed(expected: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Symmetric part of sum (dn_a of one)(dn_b of the other) / n."""
    seen = expected.ravel() > 0
    one, other = (np.asarray(d, float).reshape(len(d), -1)[:, seen] / np.sqrt(expected.ravel()[seen]) for d in (first, second))
    product = one @ other.T
    return (product + product.T) / 2


def information_of(fisher: Float[np.ndarray, "atom atom"]) -> Information:
    """A Fisher matrix over the depths of a column's atoms, top atom first [1/Å^2]; `sd` bounds each, `sd_together` the column moved as a whole."""
    return Information(fisher, tuple(f"atom[{i + 1}]" for i in range(len(fisher))), ("Å",) * len(fisher))
