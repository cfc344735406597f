"""How the images of a round column change, to first order, with what breaks their roundness.

Such a change is a function of the radius times cos(m (phi - azimuth)), so radial quadratures give in seconds what a library of another lens takes
minutes for. They are for tests whether residuals ask for it (`inference.held`); a lens known to be astigmatic has a library of its own.
"""

import dataclasses

import numpy as np

from .column_images import Profiles, images_of_profiles, radial_probe, seen_modes
from .electron import wavelength
from .gram import DiscModes, Modes, bessel
from .library import ColumnLibrary, low_rank, natural_spline
from .optics import Microscope, edge_phase


def by_aberration(grams: np.ndarray, modes: Modes | DiscModes, microscope: Microscope, plane: np.ndarray, end: float, n: int, m: int) -> Profiles:
    """Derivative of a column's images by C_nm of azimuth zero, at C_nm = 0 [1/Å]: radial functions, each to be multiplied by cos(m phi).

    The aperture's wave changes by -i g(k) cos(m phi_k) of itself, g = 2 pi / wavelength (wavelength k)^(n + 1) / (n + 1), which takes J_l in the amplitude
    A_l of `column_profiles` to -i i^m (J_(l-m) + (-1)^m J_(l+m)) g / 2 times exp(i m phi), and the same for -m. With both signs of l together

        dI = cos(m phi) sum_l 2 Re(-i i^m A_l* G^l B_l), B_pl = 2 pi int chi_pl(k) a(k) g(k) (J_(l-m) + (-1)^m J_(l+m))(2 pi k r) k dk,

    l = 0 once and half. Parameters as of `column_profiles`.
    """
    s = radial_probe(microscope, plane, end)
    aperture = float(microscope.convergence_angle) * 1e-3 / float(wavelength(microscope.energy))
    lever = edge_phase(microscope, n) * (s.k / aperture) ** (n + 1)
    grams = np.asarray(grams)
    values = np.zeros((len(grams), len(s.probe), len(s.r)))
    transforms = bessel(modes.order + m, 2 * np.pi * np.outer(s.r, s.k))
    for l in range(modes.order + 1):
        radial = seen_modes(modes, l, s)
        below = transforms[abs(l - m)] * (-1) ** max(m - l, 0)
        waves, moved = (np.einsum("zpk,rk->zpr", s.probe[:, None] * radial, t, optimize=True) for t in (transforms[l], lever * (below + (-1) ** m * transforms[l + m])))
        blocks = grams[:, l, : len(radial), : len(radial)].astype(complex)
        for z, (wave, other) in enumerate(zip(waves, moved, strict=True)):
            values[:, z] += (1 + (l > 0)) * (-1j * 1j**m * (blocks @ other) * wave.conj()).real.sum(1)
    return Profiles(s.over_spread(values), s.r, s.area)


def by_tilt(grams: np.ndarray, modes: DiscModes, microscope: Microscope, plane: np.ndarray, end: float) -> Profiles:
    """Derivative of a column's images by its lean towards x, at none [1/mrad], from `rings.leaning_grams` (n, l, p, p): radial functions, each to be multiplied by cos(phi).

    With both signs of l the amplitudes of `column_profiles`, which leave out (-i)^l exp(-i l phi), make of the part between l + 1 and l
    dI = -4 cos(phi) Im A_(l+1)* G^l A_l. Other parameters as of `column_profiles`.
    """
    s = radial_probe(microscope, plane, end)
    transforms = bessel(modes.order, 2 * np.pi * np.outer(s.r, s.k))
    waves = [np.einsum("zpk,rk->zpr", s.probe[:, None] * seen_modes(modes, l, s), transforms[l], optimize=True) for l in range(modes.order + 1)]
    values = np.zeros((len(grams), len(s.probe), len(s.r)))
    for l in range(modes.order):
        for z, (wave, other) in enumerate(zip(waves[l], waves[l + 1], strict=True)):
            values[:, z] -= 4 * (other.conj() * (grams[:, l] @ wave)).imag.sum(1)
    return Profiles(s.over_spread(values), s.r, s.area)


def beside(library: ColumnLibrary, slopes: Profiles, microscope: Microscope, m: int, amount: float) -> tuple[ColumnLibrary, ColumnLibrary]:
    """A round library plus `amount` times slopes of its images (n, z, r) in its `planes`, times cos(m phi) and times sin(m phi)."""
    n, n_planes, _ = slopes.values.shape
    basis, weights = low_rank(slopes.values.reshape(n * n_planes, -1), 1e-3, slopes.area)
    coefficients = np.stack([natural_spline(w) for w in weights.reshape(n, n_planes, -1)])
    size = library.images.shape[1]
    return tuple(
        dataclasses.replace(
            library,
            images=np.concatenate([library.images, images_of_profiles(basis, slopes, microscope, library.pixel * size, size, m, azimuth).astype(np.float32)]),
            coefficients=np.concatenate([library.coefficients, amount * coefficients], 2),
        )
        for azimuth in (0.0, np.pi / (2 * m))
    )
