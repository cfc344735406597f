"""Images of isolated columns from their Gram matrices: by one radius where the lens is round, by plane waves elsewhere."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float
from scipy.special import jv

from .electron import wavelength
from .gram import DiscModes, Modes, bessel, legendre_nodes, mode_spectra, radial_modes
from .optics import Microscope, aberration_phase


def at_points(images: Float[np.ndarray, "image v u"], pixel: float, x: np.ndarray, y: np.ndarray) -> Float[np.ndarray, "image y x"]:
    """Periodic images with the origin at pixel (0, 0), at points x, y [Å]; exact, by Fourier sum."""
    n_y, n_x = images.shape[1:]
    qy, qx = np.fft.fftfreq(n_y, pixel), np.fft.fftfreq(n_x, pixel)
    spectra = np.fft.fft2(images) / (n_y * n_x)
    ey, ex = np.exp(2j * np.pi * np.outer(y, qy)), np.exp(2j * np.pi * np.outer(qx, x))
    return np.einsum("ya,rab,bx->ryx", ey, spectra, ex, optimize=True).real


class Profiles(NamedTuple):
    """Radial images of columns under a round lens.

    Attributes
    ----------
    values : (gram, z, r) float64
        Fraction of the beam, without the source's width.
    r, area : (r,)
        [Å], and weights of the integral over the image [Å^2].
    """

    values: np.ndarray
    r: np.ndarray
    area: np.ndarray


def is_round(microscope: Microscope) -> bool:
    """Whether only C3 and C50 disturb the probe, so that a column's image is a function of one radius."""
    return not any(value for name, value in microscope.aberrations.items() if name.startswith("C") and name.removesuffix("_A") != "C50")


class RadialProbe(NamedTuple):
    """Quadratures for images of columns under a round lens.

    Attributes
    ----------
    k, k_area : (k,)
        Frequencies within the aperture [1/Å] and their areas.
    r, area : (r,)
        As in `Profiles`.
    probe : (focus, k) complex
        The aperture's wave with the crossover in each plane, for each node of the focal spread in turn.
    share : (node,)
        Of each node of the focal spread.
    """

    k: np.ndarray
    k_area: np.ndarray
    r: np.ndarray
    area: np.ndarray
    probe: np.ndarray
    share: np.ndarray

    def over_spread(self, values: Float[np.ndarray, "gram focus r"]) -> Float[np.ndarray, "gram z r"]:
        """Mean over the focal spread."""
        return np.einsum("gznr,n->gzr", values.reshape(len(values), -1, len(self.share), len(self.r)), self.share)


def radial_probe(microscope: Microscope, plane: np.ndarray, end: float) -> RadialProbe:
    """Nodes and probes for radial images out to `end` Å with the crossover in each plane."""
    lam = float(wavelength(microscope.energy))
    aperture = float(microscope.convergence_angle) * 1e-3 / lam
    turns = np.pi * lam * aperture**2 * (abs(plane).max() + 5 * float(microscope.focal_spread)) + 2 * np.pi * aperture * end
    k, w = legendre_nodes(aperture, int(turns) + 40)
    r, w_r = legendre_nodes(end, int(5 * aperture * end) + 20)
    k_area = 2 * np.pi * k * w
    chi = np.asarray(aberration_phase(microscope, k, np.zeros_like(k), 0.0))
    spread = float(microscope.focal_spread)
    nodes, share = np.polynomial.hermite_e.hermegauss(5 if spread else 1)
    foci = (np.asarray(plane, float)[:, None] + spread * nodes).ravel()
    probe = np.exp(-1j * (chi - np.pi * lam * k**2 * foci[:, None])) / np.sqrt(k_area.sum())
    return RadialProbe(k, k_area, r, 2 * np.pi * r * w_r, probe, share / share.sum())


def column_profiles(grams: np.ndarray, modes: Modes | DiscModes, microscope: Microscope, plane: np.ndarray, end: float) -> Profiles:
    """Radial images out to `end` Å for each Gram matrix with the crossover in each plane, as `column_images`; round lenses only.

    I(r) = sum_l A_l* G^l A_l, A_pl(r) = 2 pi i^-l int chi_pl(k) a(k) J_l(2 pi k r) k dk, by Gauss-Legendre quadrature in complex128; a
    factor i^-l common to a block drops out. Source size is left to the transform of the result.
    """
    s = radial_probe(microscope, plane, end)
    grams = np.asarray(grams)
    values = np.zeros((len(grams), len(s.probe), len(s.r)))
    transforms = bessel(modes.order, 2 * np.pi * np.outer(s.r, s.k))
    for l in range(modes.order + 1):
        radial = seen_modes(modes, l, s)
        waves = np.einsum("zpk,rk->zpr", s.probe[:, None] * radial, transforms[l], optimize=True)
        # real and imaginary parts side by side: a Hermitian form is one real product
        blocks = grams[:, l, : len(radial), : len(radial)].astype(complex)
        for z, wave in enumerate(waves):
            values[:, z] += (1 + (l > 0)) * ((blocks @ wave) * wave.conj()).real.sum(1)
    return Profiles(s.over_spread(values), s.r, s.area)


def seen_modes(modes: Modes | DiscModes, l: int, nodes: RadialProbe) -> Complex[np.ndarray, "p k"]:
    """Conjugate radial parts of the modes of angular momentum l >= 0 at the nodes, with their areas."""
    return radial_modes(modes, l, nodes.k).conj() * modes.taper[modes.l == l, None] * nodes.k_area


def images_of_profiles(
    values: np.ndarray, profiles: Profiles, microscope: Microscope, cell: float, size: int, turns: int = 0, azimuth: float = 0.0
) -> np.ndarray:
    """Radial functions (..., r) times cos(turns (phi - azimuth)) as images (..., size, size) on a periodic cell, centred on pixel (0, 0), with the source's width.

    The transform of f(r) cos(m phi) is (-i)^m cos(m phi_q) 2 pi int f(r) J_m(2 pi q r) r dr.
    """
    aperture = float(microscope.convergence_angle) * 1e-3 / float(wavelength(microscope.energy))
    q = np.fft.fftfreq(size, cell / size)
    qx, qy = np.meshgrid(q, q)
    radius, where = np.unique(np.round(np.hypot(qx, qy) * cell, 9), return_inverse=True)
    radius = radius[radius <= 2 * aperture * cell + 1e-9] / cell
    s = float(microscope.source_fwhm) / np.sqrt(8 * np.log(2))
    kernel = jv(turns, 2 * np.pi * np.outer(profiles.r, radius)) * profiles.area[:, None] * np.exp(-2 * (np.pi * s * radius) ** 2) / cell**2
    spectrum = np.append(values.reshape(-1, len(profiles.r)) @ kernel, np.zeros((values[..., 0].size, 1)), 1)
    inside = np.minimum(where.reshape(size, size), len(radius))
    turned = 1j**turns * np.cos(turns * (np.arctan2(qy, qx) - azimuth))  # i^m, for the transform back is by fft2, at -q
    images = np.stack([np.fft.fft2(row[inside] * turned).real for row in spectrum])
    return images.reshape(*values.shape[:-1], size, size)


def column_images(
    grams: np.ndarray, modes: Modes | DiscModes, microscope: Microscope, plane: np.ndarray, cell: float, size: int
) -> Float[np.ndarray, "gram z y x"]:
    """Fraction of the beam for each Gram matrix with the probe's crossover in each plane, on a periodic cell.

    By one radius in float64 where the lens is round, else by plane waves in the precision of `grams`.

    Parameters
    ----------
    grams : (m, l, P, P)
        Blocks as in `ColumnGram.blocks`, any number of atom numbers or scramblings, or derivatives of such.
    modes : Modes
        The waves that the blocks refer to.
    plane : (z,)
        Depth of the crossover below the modes' own plane [Å]: defocus - depth + `centre_of_mass`.
    cell, size : float, int
        Side [Å] and pixels of the square image; the column sits at pixel (0, 0). size / cell >= 4 k_aperture keeps it alias-free.
    """
    if not is_round(microscope):
        return plane_wave_images(grams, modes, microscope, plane, cell, size)
    profiles = column_profiles(grams, modes, microscope, np.asarray(plane), cell)
    return images_of_profiles(profiles.values, profiles, microscope, cell, size)


def plane_wave_images(
    grams: np.ndarray, modes: Modes | DiscModes, microscope: Microscope, plane: np.ndarray, cell: float, size: int
) -> Float[np.ndarray, "gram z y x"]:
    """`column_images` for any aberrations, in the precision of `grams`; also of whole matrices (m, mode, mode), as from `sweep_atoms`.

    Notes
    -----
    I(R) = sum A*_pl(R) G^l_pp' A_p'l(R), A_pl(R) = sum_k a(k) chi*_pl(k) exp(-2 pi i k.R): a^H G a with all k once.
    Source size multiplies the spectrum by exp(-2 pi^2 s^2 q^2); focal spread averages over defocus (Gauss-Hermite).
    """
    kind = jnp.promote_types(jnp.asarray(grams).dtype, jnp.complex64)
    real = jnp.finfo(kind).dtype
    whole = np.ndim(grams) == 3
    if whole:
        grams, matter = _in_what_matters(np.asarray(grams))
    grams = jnp.asarray(grams, kind)
    lam = float(wavelength(microscope.energy))
    aperture = float(microscope.convergence_angle) * 1e-3 / lam
    k = np.fft.fftfreq(size, cell / size)
    kx, ky = np.meshgrid(k, k)
    radius = np.hypot(kx, ky)
    rim = np.clip((aperture - radius) * cell + 0.5, 0, 1)
    inside = rim > 0
    amplitude = rim[inside] / np.sqrt((rim**2).sum()) / cell
    spectra = mode_spectra(modes, kx[inside], ky[inside]).conj() * amplitude * modes.taper[:, None]
    spectra = jnp.asarray(matter.conj().T @ spectra if whole else spectra, kind)
    flat = jnp.asarray(np.flatnonzero(inside))
    chi = jnp.asarray(aberration_phase(microscope, kx[inside], ky[inside], 0.0))
    k2 = jnp.asarray(radius[inside] ** 2)
    s = float(microscope.source_fwhm) / np.sqrt(8 * np.log(2))
    source_factor = jnp.asarray(np.exp(-2 * (np.pi * s * radius) ** 2), real)

    spread = float(microscope.focal_spread)
    nodes, weights = np.polynomial.hermite_e.hermegauss(5 if spread else 1)
    if whole:
        groups, blocks = (tuple(range(len(spectra))),), [grams]
    else:
        groups = tuple(tuple(np.flatnonzero(modes.l == value).tolist()) for value in dict.fromkeys(modes.l.tolist()))
        blocks = [grams[:, abs(modes.l[g[0]]), : len(g), : len(g)] for g in groups]
    a_at = lambda crossover: spectra * jnp.exp(-1j * (chi - jnp.pi * lam * k2 * crossover)).astype(kind)
    out = np.zeros((len(grams), len(plane), size, size), real)
    for i, z in enumerate(plane):
        for node, weight in zip(nodes, weights / weights.sum(), strict=True):
            out[:, i] += weight * np.asarray(_images(blocks, a_at(z + spread * node), flat, source_factor, groups, size))
    return out


def _in_what_matters(grams: Complex[np.ndarray, "m mode mode"], tolerance: float = 1e-5) -> tuple[np.ndarray, np.ndarray]:
    """Matrices (m, r, r) on the r combinations of modes (mode, r) that any of them sees by more than `tolerance` of the strongest."""
    square = np.einsum("mij,mkj->ik", grams.astype(complex), grams.conj(), optimize=True)
    values, vectors = np.linalg.eigh(square)
    vectors = vectors[:, values > tolerance**2 * values[-1]]
    return vectors.conj().T @ grams @ vectors, vectors


@partial(jax.jit, static_argnames=("groups", "size"))
def _images(blocks: list[Array], spectra, flat, source_factor, groups: tuple[tuple[int, ...], ...], size: int):
    """One plane of `column_images`: probe spectra (mode, inside) at pixels `flat` to images (gram, y, x); a block couples one group of modes."""
    waves = jnp.zeros((len(spectra), size * size), spectra.dtype).at[:, flat].set(spectra)
    waves = jnp.fft.fft2(waves.reshape(-1, size, size)).reshape(len(spectra), -1)
    total = jnp.zeros((len(blocks[0]), size * size), source_factor.dtype)
    for group, block in zip(groups, blocks, strict=True):
        g = np.array(group)
        seen = (block.reshape(-1, len(g)) @ waves[g]).reshape(len(block), len(g), -1)
        total = total + jnp.sum(waves[g].real * seen.real + waves[g].imag * seen.imag, 1)
    return jnp.fft.ifft2(jnp.fft.fft2(total.reshape(-1, size, size)) * source_factor).real
