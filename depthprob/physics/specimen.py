"""What is looked at: isolated columns of atoms and their thermal motion."""

import math

import equinox as eqx
import numpy as np
from jaxtyping import ScalarLike


class Column(eqx.Module):
    """An isolated column of equal, equally spaced atoms along the beam.

    Attributes
    ----------
    element : str
    n_atoms : int
        For a library, the largest number of atoms.
    spacing : scalar
        Distance between atoms along the beam [Å].
    debye_waller_b : scalar
        B = 8 pi^2 u^2 [Å^2], u the rms displacement along one axis.
    tilt : (x, y)
        Small angles [mrad] by which the column leans: an atom z below its centre of mass lies z * tilt beside it.
    """

    element: str = eqx.field(static=True)
    n_atoms: int = eqx.field(static=True)
    spacing: ScalarLike
    debye_waller_b: ScalarLike
    tilt: tuple[float, float] = eqx.field(static=True, default=(0.0, 0.0), converter=lambda tilt: (float(tilt[0]), float(tilt[1])))

    @property
    def leaning(self) -> np.ndarray:
        """Lateral positions (atom, 2) [Å] about the middle, top atom first."""
        z = (np.arange(self.n_atoms) - (self.n_atoms - 1) / 2) * float(self.spacing)
        return np.outer(z, self.tilt) * 1e-3


def debye_waller_b_from_rms(rms: float) -> float:
    """B [Å^2] of an rms displacement [Å] along one axis."""
    return 8 * math.pi**2 * rms**2


def rms_from_debye_waller_b(debye_waller_b: ScalarLike) -> ScalarLike:
    """Rms displacement along one axis [Å] of B [Å^2]; differentiable."""
    return (debye_waller_b / (8 * math.pi**2)) ** 0.5
