"""Images of what pairs of columns lack, as a library: pairs are drawn as columns are.

Seen with the crossover in any plane, pairs of many numbers of atoms are sums of a few images, which are turned to each direction that pairs have in the field.
"""

from typing import NamedTuple

import numpy as np
import scipy.fft
from jaxtyping import Float
from scipy.sparse.linalg import svds

from .crosstalk import PairGram
from .electron import wavelength
from .library import ColumnLibrary, natural_spline
from .optics import Microscope
from .particle import focal_damping, probe_amplitudes, source_damping

PLANES = 10.0  # Å between planes that images are interpolated from: 1e-4 of the largest pixel
MOST, FAINTEST = 80, 1e-4  # images that all are sums of: how many at most, and how strong the least, of the strongest
RIM = 0.3  # Å within which images fade out before they meet those of the next cell


class PairImages(NamedTuple):
    """Images of pairs of one separation, low-rank, in the pairs' own frame.

    Attributes
    ----------
    basis : (R, y, x)
        Fraction of the beam by a point source over a cell, the pair's middle at pixel (0, 0).
    weights : (pair, plane, R)
        With the crossover in planes `PLANES` apart.
    first : float
        Of those planes, below the pair's top [Å].
    """

    basis: np.ndarray
    weights: np.ndarray
    first: float


def pair_images(grams: list[PairGram], lens: Microscope, lowest: float, highest: float, turn: float = 0.0) -> PairImages:
    """Images of pairs of one separation, with the crossover in planes from `lowest` to `highest` [Å] below their tops; `turn` [rad] is the angle from the lens's x to the pairs'."""
    planes = np.arange(lowest - PLANES, highest + 2 * PLANES, PLANES)
    seen = np.concatenate([focal_images(gram, lens, planes, turn) for gram in grams])
    flat = seen.reshape(len(seen), -1)
    most = min(MOST, *(side - 1 for side in flat.shape))
    left, values, rows = svds(flat, most, v0=np.ones(min(flat.shape), flat.dtype))
    strong = values > FAINTEST * values.max()
    weights = (left * values)[:, strong].reshape(len(grams), len(planes), -1)
    return PairImages(rows[strong].reshape(-1, *seen.shape[1:]), weights, float(planes[0]))


def focal_images(gram: PairGram, lens: Microscope, planes: np.ndarray, turn: float) -> Float[np.ndarray, "F y x"]:
    """Images (F, y, x) float32 over the cell by a point source: each vector of the Gram matrix is a wave whose intensity counts by its value."""
    cell, values, vectors = (gram.cell,) * 2, gram.values, gram.vectors
    if float(lens.focal_spread) > 0:
        values, vectors = np.linalg.eigh(gram.matrix * focal_damping(gram.waves, cell, lens))
        strong = abs(values) > FAINTEST * abs(values).max()
        values, vectors = values[strong], vectors[:, strong]
    size = scipy.fft.next_fast_len(4 * int(abs(gram.waves).max()) + 3)
    x, y = gram.waves.T % size
    images = np.empty((len(planes), size, size), np.float32)
    for image, amplitudes in zip(images, probe_amplitudes(gram.waves, cell, lens, planes, turn), strict=True):
        waves = np.zeros((len(values), size, size), np.complex64)
        waves[:, y, x] = (amplitudes.conj()[:, None] * vectors).T
        waves = scipy.fft.ifft2(waves, norm="forward", overwrite_x=True)
        image[:] = np.tensordot(values.astype(np.float32), waves.real**2 + waves.imag**2, 1)
    return images


def pair_library(images: PairImages, shares: list[dict[int, float]], cell: float, lens: Microscope, turn: float) -> ColumnLibrary:
    """A library whose n-th "column" is the sum of pairs shares[n - 1], with their x turned by an angle [rad] from the images', at z = focus less the top of the pair.

    Only what draws columns reads it: cross-sections and errors are zero.
    """
    weights = np.array([sum(share * images.weights[i] for i, share in of.items()) for of in shares])
    size = images.basis.shape[1]
    j = np.fft.fftfreq(size, 1 / size)
    q = j / cell
    spectra = np.fft.fft2(images.basis, norm="forward") * source_damping(q, q, lens)
    along, down = np.meshgrid(q, q)
    c, s = np.cos(turn), np.sin(turn)
    x, y = (a.ravel() for a in np.meshgrid(j * cell / size, j * cell / size))
    radius = np.hypot(x, y)
    inside = radius < cell / 2
    strong = abs(spectra).max(0) > FAINTEST * abs(spectra).max()
    phases = np.exp(2j * np.pi * (np.outer(along[strong], (c * x + s * y)[inside]) + np.outer(down[strong], (c * y - s * x)[inside])))
    turned = np.zeros((len(spectra), size**2), np.float32)
    turned[:, inside] = (spectra[:, strong] @ phases).real * np.sin(np.pi / 2 * np.clip((cell / 2 - radius[inside]) / RIM, 0, 1)) ** 2
    nothing = np.zeros(len(shares))
    return ColumnLibrary(
        images=turned.reshape(-1, size, size),
        coefficients=np.stack([natural_spline(w) for w in weights]),
        cross_section=nothing,
        depth_error=nothing,
        centre=nothing,
        pixel=cell / size,
        z_start=images.first,
        z_step=PLANES,
        element="",
        spacing=0.0,
        source_fwhm=float(lens.source_fwhm),
        band_limit=2e-3 * float(lens.convergence_angle) / float(wavelength(lens.energy)),
    )
