"""The fast electron: wavelength and interaction parameter."""

import math

PLANCK = 6.62607015e-34  # J s
ELECTRON_MASS = 9.1093837015e-31  # kg
LIGHT_SPEED = 299792458.0  # m / s
ELEMENTARY_CHARGE = 1.602176634e-19  # C


def wavelength(energy: float) -> float:
    """Relativistic de Broglie wavelength [Å] of electrons of kinetic energy `energy` [eV].

    h c / sqrt(E (2 m c^2 + E)); Kirkland, Advanced Computing in Electron Microscopy, 2nd ed. (2010), eq. 2.5.
    """
    kinetic = energy * ELEMENTARY_CHARGE
    rest = ELECTRON_MASS * LIGHT_SPEED**2
    return PLANCK * LIGHT_SPEED / (kinetic * (2 * rest + kinetic)) ** 0.5 * 1e10


def interaction_parameter(energy: float) -> float:
    """Phase per projected potential, sigma [rad / (V Å)], at kinetic energy `energy` [eV].

    2 pi / (wavelength E) (m c^2 + E) / (2 m c^2 + E); Kirkland (2010), eq. 5.6.
    """
    rest = ELECTRON_MASS * LIGHT_SPEED**2 / ELEMENTARY_CHARGE
    return 2 * math.pi / (wavelength(energy) * energy) * (rest + energy) / (2 * rest + energy)
