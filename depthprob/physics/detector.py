"""What is recorded of the exit wave: a sensitivity at every scattering angle."""

import hashlib

import equinox as eqx
import numpy as np
from jaxtyping import Float, ScalarLike
from scipy.ndimage import map_coordinates

from ..errors import InputError

DIM = 1e-3  # of the direct beam, that a measured sensitivity may seem to record
SHARP = 1e-9  # mrad; a rim that no node of a quadrature falls into


def _angles(value) -> float | tuple[float, ...]:
    many = isinstance(value, (list, tuple, np.ndarray)) and np.ndim(value)
    return tuple(float(v) for v in value) if many else value


class AnnularDetector(eqx.Module):
    """An annulus, or several at once whose signals add; of unit sensitivity, or of a measured one.

    Attributes
    ----------
    inner, outer : scalar, or one for each annulus
        Angles [mrad].
    measured : (y, x) or (angle,), optional
        Share of an electron that is recorded where it hits, 1 for whole ones: a map with the optic axis in the middle of the array, rows
        along y, or, where it depends on the angle alone, a profile from the axis outwards. Linear between pixels, zero beyond them and
        outside the annuli.
    pixel_size : scalar, optional
        Of `measured` [mrad].

    Raises
    ------
    InputError
        For annuli that overlap, an outer angle that is not the larger, or a sensitivity that is no such array.
    """

    inner: ScalarLike | tuple[float, ...] = eqx.field(converter=_angles)
    outer: ScalarLike | tuple[float, ...] = eqx.field(converter=_angles)
    measured: Float[np.ndarray, "..."] | None = None
    pixel_size: ScalarLike | None = None

    def __check_init__(self):
        inner, outer = np.atleast_1d(self.inner), np.atleast_1d(self.outer)
        if inner.shape != outer.shape or np.any(inner < 0) or np.any(outer <= inner):
            raise InputError(f"inner is {self.inner} and outer is {self.outer} mrad; allowed are angles from 0 on, one larger outer for each inner.")
        order = np.argsort(inner)
        if np.any(inner[order][1:] < outer[order][:-1]):
            raise InputError(f"inner is {self.inner} and outer is {self.outer} mrad: annuli overlap, and would record an electron twice. Make them one, or move their edges apart.")
        if self.measured is not None:
            _check_measured(self.measured, self.pixel_size)
            at = [(np.arange(n) - (n - 1) / 2 * (len(self.measured.shape) - 1)) * float(self.pixel_size) for n in self.measured.shape]
            if not self.sensitivity(at[-1], at[0][:, None] if len(at) == 2 else 0.0).any():
                raise InputError(
                    f"the detector's sensitivity reaches {at[-1][-1]:g} mrad and is 0 everywhere between inner, {self.inner}, and outer, {self.outer} mrad. "
                    "Check the angle between its pixels."
                )

    @property
    def annuli(self) -> tuple[tuple[float, float], ...]:
        """(inner, outer) of each [mrad], innermost first; those that touch are one."""
        merged: list[tuple[float, float]] = []
        for low, high in sorted(zip(np.atleast_1d(self.inner).tolist(), np.atleast_1d(self.outer).tolist(), strict=True)):
            if merged and low == merged[-1][1]:
                low = merged.pop()[0]
            merged.append((low, high))
        return tuple(merged)

    @property
    def edges(self) -> tuple[float, ...]:
        """Angles at which the sensitivity may jump [mrad]."""
        return tuple(angle for annulus in self.annuli for angle in annulus)

    @property
    def outermost(self) -> float:
        """Largest angle that is recorded [mrad]."""
        return self.edges[-1]

    @property
    def is_round(self) -> bool:
        """Whether the sensitivity is a function of the angle to the optic axis alone."""
        return self.measured is None or np.ndim(self.measured) == 1

    @property
    def record(self) -> dict[str, float | tuple[float, ...] | str]:
        """What tells this detector from others: inner, outer [mrad] (numbers for one annulus), and a checksum of what was measured."""
        inner, outer = self.annuli[0] if len(self.annuli) == 1 else (self.edges[::2], self.edges[1::2])
        measured = ""
        if self.measured is not None:
            checksum = hashlib.sha256(np.asarray(self.measured, float).tobytes()).hexdigest()[:16]
            measured = f"{checksum} {np.shape(self.measured)} {float(self.pixel_size):.9g}"
        return {"inner": inner, "outer": outer, "sensitivity": measured}

    def sensitivity(self, x: Float[np.ndarray, "..."], y: Float[np.ndarray, "..."], rim: float = SHARP) -> Float[np.ndarray, "..."]:
        """At angles x, y [mrad] of shapes that broadcast; edges of annuli are ramps of width `rim`, the sampling of the angles."""
        angle = np.hypot(x, y)
        total = sum(np.clip((angle - low) / rim + 0.5, 0, 1) * np.clip((high - angle) / rim + 0.5, 0, 1) for low, high in self.annuli)
        if self.measured is None:
            return total
        table = np.asarray(self.measured, float)
        x, y = np.broadcast_arrays(x, y)
        places = [angle] if table.ndim == 1 else [y, x]
        middle = [0.0] if table.ndim == 1 else [(n - 1) / 2 for n in table.shape]
        return total * map_coordinates(table, [p / float(self.pixel_size) + m for p, m in zip(places, middle, strict=True)], order=1)


def require_out_of_beam(detector: AnnularDetector, convergence_angle: float) -> None:
    """Refuse a detector that the direct beam, out to the convergence semi-angle [mrad], falls on.

    Images of columns do not add up in a beam that they share, and waves that meet a column are not all of it: further from the column it would be missing.
    """
    radius = (np.arange(64) + 0.5) / 64 * convergence_angle
    azimuth = 2 * np.pi * np.arange(64)[:, None] / 64
    seen = np.average(detector.sensitivity(radius * np.cos(azimuth), radius * np.sin(azimuth)).mean(0), weights=radius)
    if seen > DIM:
        raise InputError(
            f"the detector's inner angle is {detector.edges[0]:g} mrad and the convergence angle {convergence_angle:g} mrad: {100 * seen:.3g} % of the direct beam falls on the detector. Columns' libraries are of "
            f"what they scatter out of the beam. Allowed is an inner angle from {convergence_angle:g} mrad on, which also cuts a measured sensitivity; full multislice, of a structure file or simulate_particle, takes any."
        )


def _check_measured(table: np.ndarray, pixel_size: float | None) -> None:
    """Refuse a sensitivity that is no map or profile of numbers around one."""
    if pixel_size is None or not pixel_size > 0:
        raise InputError(f"the pixel size of the detector's sensitivity is {pixel_size}; allowed is a number of mrad above 0. Give it.")
    if np.ndim(table) not in (1, 2) or min(np.shape(table)) < 2:
        raise InputError(f"the detector's sensitivity has the shape {np.shape(table)}; allowed is a map (y, x) with the optic axis in its middle, or a profile (angle,) from it outwards.")
    table = np.asarray(table)
    if table.dtype.kind not in "biuf" or not np.isfinite(table).all() or table.min() < 0 or not 0 < table.max() <= 2:
        raise InputError(
            f"the detector's sensitivity holds {table.dtype} from {np.min(table)} to {np.max(table)}; allowed are finite numbers from 0 to 2, not all 0: "
            "the share of an electron that is recorded where it hits. Subtract the value of no electrons and divide by that of whole ones."
        )
