"""The probe-forming lens."""

import math

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike

from .electron import wavelength


class Microscope(eqx.Module):
    """Convergent illumination and its partial coherence.

    Attributes
    ----------
    energy : scalar
        Kinetic energy [eV].
    convergence_angle : scalar
        Semi-angle of the probe-forming aperture [mrad].
    source_fwhm : scalar
        Full width at half maximum of the Gaussian source image [Å].
    focal_spread : scalar
        Standard deviation of defocus [Å].
    spherical_aberration : scalar
        C30 [Å].
    aberrations : dict
        Krivanek magnitudes C_nm [Å] and azimuths phi_nm [degrees], beside C10 and C30: {"C12_A": 20.0, "phi12_deg": 30.0}.
    """

    energy: ScalarLike
    convergence_angle: ScalarLike
    source_fwhm: ScalarLike = 0.0
    focal_spread: ScalarLike = 0.0
    spherical_aberration: ScalarLike = 0.0
    aberrations: dict = eqx.field(default_factory=dict)


def aberration_phase(
    microscope: Microscope, kx: Float[Array, "..."], ky: Float[Array, "..."], defocus: ScalarLike
) -> Float[Array, "..."]:
    """Aberration function chi [rad] at frequencies kx, ky [1/Å]; the aperture holds exp(-i chi).

    chi = 2 pi / wavelength * sum C_nm theta^(n + 1) cos(m (phi - phi_nm)) / (n + 1), with C10 = -defocus (positive is underfocus),
    so that exp(-i chi) = exp(+i pi wavelength defocus k^2) crosses over at z = +defocus.
    Krivanek, Dellby and Lupini, Ultramicroscopy 78, 1 (1999).
    """
    lam = wavelength(microscope.energy)
    theta, phi = lam * jnp.hypot(kx, ky), jnp.arctan2(ky, kx)
    chi = -defocus * theta**2 / 2 + microscope.spherical_aberration * theta**4 / 4
    for name, value in microscope.aberrations.items():
        if name.startswith("C"):
            n, m = int(name[1]), int(name[2])
            azimuth = math.pi / 180 * microscope.aberrations.get(f"phi{n}{m}_deg", 0.0)
            chi = chi + value * theta ** (n + 1) * jnp.cos(m * (phi - azimuth)) / (n + 1)
    return 2 * math.pi / lam * chi
