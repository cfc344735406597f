"""Fisher information of Poisson counts, and Cramér-Rao bounds on the depths of single atoms."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ..physics.detector import AnnularDetector
from ..physics.electron import wavelength
from ..physics.focal_series import FocalSeries
from ..physics.gram import default_reach, laguerre_gauss_modes
from ..physics.library import at_points, column_images
from ..physics.optics import Microscope
from ..physics.radial import prepare_radial, radial_gram
from ..physics.specimen import Column

KNOWN = 1e-14  # eigenvalues below this part of the largest are rounding


class AtomInformation(NamedTuple):
    """What a series tells of the depths of a column's atoms, all else known.

    Attributes
    ----------
    fisher : (atom, atom)
        Fisher information [1/Å^2], top atom first.
    atom_sd : (atom,)
        Bound on each atom's depth, the others unknown too [Å].
    column_sd : float
        Bound on the depth of the column, moved as a whole [Å].
    eigenvalues, eigenvectors : (atom,), (atom, atom)
        Of the Fisher information, best known combination first; eigenvectors are rows.
    """

    fisher: np.ndarray
    atom_sd: np.ndarray
    column_sd: float
    eigenvalues: np.ndarray
    eigenvectors: np.ndarray

    def in_words(self) -> list[str]:
        """One line per eigenvector: which atoms move together, which against each other, and how well that is known."""
        lines = []
        for value, vector in zip(self.eigenvalues, self.eigenvectors, strict=True):
            vector = vector * np.sign(vector[np.argmax(abs(vector))])
            strong = np.flatnonzero(abs(vector) >= 0.4 * abs(vector).max())
            up = [str(i + 1) for i in strong if vector[i] > 0]
            down = [str(i + 1) for i in strong if vector[i] < 0]
            who = f"atoms {' '.join(up)}" if len(up) > 1 else f"atom {up[0]}"
            if down:
                who += f" against {' '.join(down)}"
            lines.append(f"{who}: sd {value**-0.5:.3g} A" if value > KNOWN * self.eigenvalues[0] else f"{who}: nothing is known")
        return lines


def poisson_fisher(expected: Float[np.ndarray, "..."], derivatives: Float[np.ndarray, "p ..."]) -> Float[np.ndarray, "p p"]:
    """Fisher matrix sum (dn_a)(dn_b) / n of independent Poisson counts, float64; eq. 8 of Alania et al. (2017).

    A pixel with n = 0 tells nothing to first order (its derivative vanishes too, since counts cannot be negative) and is left out.
    """
    n = np.asarray(expected, float).ravel()
    d = np.asarray(derivatives, float).reshape(len(derivatives), -1)
    seen = n > 0
    rows = d[:, seen] / np.sqrt(n[seen])
    return rows @ rows.T


def atom_information(
    column: Column,
    microscope: Microscope,
    detector: AnnularDetector,
    series: FocalSeries,
    parametrization: str = "lobato",
    progress: Callable = lambda items, **_: items,
) -> AtomInformation:
    """Fisher information of a series on the depth of each atom of an isolated column, centred in the image with its depth zero.

    From the deterministic thermal model (`physics.radial`), so without Monte-Carlo noise, and with exact derivatives. Lateral positions
    need not be free: the images' derivatives by them are odd, those by depths even, so they share no information. Sums and waves in
    float64 and complex128, except that the incident modes are tabulated in complex64. Read noise is not included.

    Raises
    ------
    ValueError
        Outside `jax.enable_x64(True)`.
    """
    if not jax.config.jax_enable_x64:
        raise ValueError("atom_information needs double precision: call it under jax.enable_x64(True).")
    lam = float(wavelength(microscope.energy))
    aperture = float(microscope.convergence_angle) * 1e-3 / lam
    modes = laguerre_gauss_modes(default_reach(column, float(microscope.convergence_angle)), aperture)
    radial = prepare_radial(column, microscope.energy, aperture, detector, modes, parametrization)
    depths = (jnp.arange(column.n_atoms) - (column.n_atoms - 1) / 2) * column.spacing
    gram = jax.jit(radial_gram)(depths, radial)
    tangent = jax.jit(lambda v: jax.jvp(lambda z: radial_gram(z, radial), (depths,), (v,))[1])
    grams = [gram] + [tangent(v) for v in progress(jnp.eye(column.n_atoms), desc="atoms", unit="atom")]
    ny, nx = series.shape
    widest = float(abs(np.asarray(series.defocus)).max()) + column.spacing * column.n_atoms / 2
    cell = max(2 * (1e-3 * float(microscope.convergence_angle) * widest + 7.0), 1.5 * max(ny, nx) * series.pixel_size)
    size = int(np.ceil(4.1 * aperture * cell / 2)) * 2
    fine = column_images(np.stack(grams), modes, microscope, np.asarray(series.defocus), cell, size)
    at_y, at_x = ((np.arange(n) - (n - 1) / 2) * series.pixel_size for n in (ny, nx))
    flat = at_points(fine.reshape(-1, size, size), cell / size, at_x, at_y)
    images = flat.reshape(len(grams), -1, ny, nx)
    dose = np.broadcast_to(np.asarray(series.dose, float), np.shape(series.defocus))
    counts = images * (dose * series.pixel_size**2)[:, None, None]
    return _information(poisson_fisher(counts[0], counts[1:]))


def _information(fisher: np.ndarray) -> AtomInformation:
    values, vectors = np.linalg.eigh(fisher)
    values, vectors = values[::-1], vectors[:, ::-1].T
    known = values > KNOWN * values[0]
    variance = np.full(len(fisher), np.inf)
    if known.all():
        variance = (vectors**2 / values[:, None]).sum(0)
    else:
        untouched = (vectors[~known] ** 2).sum(0) < 1e-12
        variance[untouched] = (vectors[known] ** 2 / values[known, None]).sum(0)[untouched]
    return AtomInformation(fisher, np.sqrt(variance), float(fisher.sum() ** -0.5), values, vectors)
