"""The probe-forming lens."""

import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike

from ..errors import InputError
from .electron import wavelength

ORDERS = (
    "12",
    "21",
    "23",
    "32",
    "34",
    "41",
    "43",
    "45",
    "50",
    "52",
    "54",
    "56",
)  # n, m beside C10 and C30


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
        Krivanek magnitudes C_nm [Å] and azimuths phi_nm [degrees], to fifth order, beside C10 and C30:
        {"C12_A": 20.0, "phi12_deg": 30.0}; the units in the names may be left out.

    Raises
    ------
    InputError
        For an aberration that is not one of these names.
    """

    energy: ScalarLike
    convergence_angle: ScalarLike
    source_fwhm: ScalarLike = 0.0
    focal_spread: ScalarLike = 0.0
    spherical_aberration: ScalarLike = 0.0
    aberrations: dict = eqx.field(default_factory=dict)

    def __check_init__(self):
        names = [_order(name) for name in self.aberrations]
        if len(set(names)) < len(names):
            raise InputError(
                f"aberrations are {', '.join(self.aberrations)}: one is given twice. Keep one spelling of it."
            )


def _order(name: str) -> tuple[str, int, int]:
    """("C" or "phi", n, m) of an aberration's name."""
    match = re.fullmatch(r"(?:(C)(\d\d)(?:_A)?|(phi)(\d\d)(?:_deg)?)", name)
    kind, order = (match[1] or match[3], match[2] or match[4]) if match else (None, None)
    if order not in ORDERS or (kind == "phi" and order.endswith("0")):
        own = {
            "C10": " Defocus is -C10: give the defocus instead.",
            "C30": " Give spherical_aberration instead.",
        }
        allowed = ", ".join(f"C{o}_A" for o in ORDERS)
        raise InputError(
            f"aberration {name!r} is not known.{own.get(name.removesuffix('_A'), '')} "
            f"Allowed are {allowed} and the azimuths phi12_deg, phi21_deg, ... of those that have one."
        )
    return kind, int(order[0]), int(order[1])


@jax.jit
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
    terms = {_order(name): value for name, value in microscope.aberrations.items()}
    for (kind, n, m), value in terms.items():
        if kind == "C":
            azimuth = math.pi / 180 * terms.get(("phi", n, m), 0.0)
            chi = chi + value * theta ** (n + 1) * jnp.cos(m * (phi - azimuth)) / (n + 1)
    return 2 * math.pi / lam * chi


def edge_phase(microscope: Microscope, n: int) -> float:
    """Phase at the aperture's edge on its azimuth, for each Å of C_nm [rad/Å]."""
    angle = 1e-3 * float(microscope.convergence_angle)
    return 2 * math.pi / float(wavelength(microscope.energy)) * angle ** (n + 1) / (n + 1)
