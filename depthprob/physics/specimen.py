"""What is looked at: isolated columns of atoms and their thermal motion."""

import math

import equinox as eqx
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
    """

    element: str = eqx.field(static=True)
    n_atoms: int = eqx.field(static=True)
    spacing: ScalarLike
    debye_waller_b: ScalarLike


def debye_waller_b_from_rms(rms: float) -> float:
    """B [Å^2] of an rms displacement [Å] along one axis."""
    return 8 * math.pi**2 * rms**2


def rms_from_debye_waller_b(debye_waller_b: ScalarLike) -> ScalarLike:
    """Rms displacement along one axis [Å] of B [Å^2]; differentiable."""
    return (debye_waller_b / (8 * math.pi**2)) ** 0.5
