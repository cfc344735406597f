"""A wave through atoms: planes that transmit it, with free flight between them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int

from .electron import interaction_parameter
from .scattering import POTENTIAL_PER_SCATTERING_FACTOR, scattering_factor


def transmission(
    positions: Float[Array, "atom xy"],
    element: str | Sequence[str],
    cell: tuple[float, float],
    shape: tuple[int, int],
    energy: float,
    band_limit: float,
    parametrization: str = "lobato",
) -> Complex[Array, "y x"]:
    """exp(i sigma V) of the atoms of one plane, low-passed to |q| < band_limit (complex64).

    The phase of a heavy atom is several radians, so it is exponentiated on a grid twice as fine and low-passed afterwards:
    a potential cut off before the exponential is a different atom (16 % more HAADF signal for gold).

    Parameters
    ----------
    positions : (atom, 2)
        x, y [Å]; differentiable.
    element : str, or one for each atom
    cell, shape : (Lx, Ly) [Å], (ny, nx)
        Periodic cell and working grid.
    energy : float
        [eV].
    band_limit : float
        [1/Å]; two thirds of Nyquist keeps products free of aliasing.
    """
    ny, nx = shape
    qx, qy = (np.fft.fftfreq(2 * n, side / (2 * n)) for n, side in zip((nx, ny), cell, strict=True))
    q = np.hypot(qx, qy[:, None])
    elements = np.broadcast_to(np.asarray(element), len(positions))
    total = jnp.zeros_like(q, jnp.complex64)
    for kind in np.unique(elements):
        factor = jnp.asarray(
            POTENTIAL_PER_SCATTERING_FACTOR
            * scattering_factor(str(kind), q, parametrization)
            / (cell[0] * cell[1]),
            jnp.float32,
        )
        x, y = positions[elements == kind].T
        structure = jnp.exp(-2j * jnp.pi * qy[:, None] * y) @ jnp.exp(-2j * jnp.pi * x[:, None] * qx)
        total = total + factor * structure
    potential = jnp.fft.ifft2(total).real * (4 * nx * ny)
    spectrum = jnp.fft.fft2(jnp.exp(1j * interaction_parameter(energy) * potential)) / 4
    keep_y, keep_x = (np.fft.fftfreq(n, 1 / n).round().astype(int) for n in (ny, nx))
    kept = spectrum[np.ix_(keep_y, keep_x)] * (q[np.ix_(keep_y, keep_x)] < band_limit)
    return jnp.fft.ifft2(kept).astype(jnp.complex64)


def propagator(
    cell: tuple[float, float],
    shape: tuple[int, int],
    wavelength: float,
    distance: Float[Array, ""],
    band_limit: float,
) -> Complex[Array, "y x"]:
    """exp(-i pi wavelength q^2 distance), zero beyond the band limit and zero frequency in the corner; differentiable in distance [Å]."""
    qx, qy = (np.fft.fftfreq(n, side / n) for n, side in zip(shape[::-1], cell, strict=True))
    q2 = qx**2 + qy[:, None] ** 2
    return jnp.where(
        q2 < band_limit**2, jnp.exp(-1j * jnp.pi * wavelength * q2 * distance), 0
    ).astype(jnp.complex64)


def multislice(
    spectrum: Complex[Array, "y x"],
    transmissions: Complex[Array, "plane y x"],
    depths: Float[Array, " plane"],
    cell: tuple[float, float],
    wavelength: float,
    band_limit: float,
) -> Complex[Array, "y x"]:
    """Carry a wave through planes of atoms; the depths of the planes are propagation lengths, so derivatives by them are exact.

    Parameters
    ----------
    spectrum : (y, x)
        Fourier transform of the wave, referred to the plane z = 0.
    transmissions : (plane, y, x)
        Entrance side first.
    depths : (plane,)
        Ascending z of the planes [Å].

    Returns
    -------
    (y, x)
        Fourier transform of the wave just behind the last plane.

    Notes
    -----
    Cowley and Moodie, Acta Cryst. 10, 609 (1957).
    """
    shape = spectrum.shape

    def step(wave, plane):
        transmitted, distance = plane
        wave = wave * propagator(cell, shape, wavelength, distance, band_limit)
        return jnp.fft.fft2(transmitted * jnp.fft.ifft2(wave)).astype(jnp.complex64), None

    distances = jnp.diff(depths, prepend=0.0)
    return jax.lax.scan(step, spectrum.astype(jnp.complex64), (transmissions, distances))[0]


def exit_waves(
    waves: Int[np.ndarray, "wave xy"],
    transmissions: Complex[Array, "plane y x"],
    depths: Float[Array, " plane"],
    cell: tuple[float, float],
    wavelength: float,
    band_limit: float,
) -> Complex[Array, "wave y x"]:
    """Spectra behind the last plane for plane waves of one electron each, one by one (faster on a CPU than a batch of FFTs).

    The differentiable reference of `particle.particle_gram`: sum_g D(g) conj(psi_k(g)) psi_k'(g) of these spectra is the Gram matrix.

    Parameters
    ----------
    waves : (wave, 2)
        Frequencies (x, y) in units of 1 / cell.
    """
    shape = transmissions.shape[1:]

    def carry(wave):
        incident = (
            jnp.zeros(shape, jnp.complex64).at[wave[1] % shape[0], wave[0] % shape[1]].set(1.0)
        )
        return multislice(incident, transmissions, depths, cell, wavelength, band_limit)

    return jax.lax.map(carry, jnp.asarray(waves))
