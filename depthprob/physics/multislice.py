"""A wave through atoms: planes that transmit it, with free flight between them."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int
from scipy.special import j0

from .electron import interaction_parameter
from .scattering import POTENTIAL_PER_SCATTERING_FACTOR, panels, projected_potential, scattering_factor


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

    The phase of a heavy atom is several radians, so it is low-passed after the exponential: a potential cut off before it is a different
    atom (16 % more HAADF signal for gold). Nor does a grid twice as fine resolve the nucleus (0.7 % less signal, depending on where between
    its points the atom lies). So that grid carries the potential smoothed by a Gaussian as wide as a pixel, and each nucleus adds
    `core_scattering`, turned by the phase of its neighbours' potential, which is flat across it.

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
    area, sigma = cell[0] * cell[1], interaction_parameter(energy)
    smoothing = max(cell[0] / nx, cell[1] / ny)
    qx, qy = (np.fft.fftfreq(2 * n, side / (2 * n)) for n, side in zip((nx, ny), cell, strict=True))
    q = np.hypot(qx, qy[:, None])
    positions = jnp.asarray(positions)
    elements = np.broadcast_to(np.asarray(element), len(positions))
    along_x, along_y = (jnp.exp(-2j * jnp.pi * positions[:, i, None] * q_i).astype(jnp.complex64) for i, q_i in enumerate((qx, qy)))
    total = jnp.zeros_like(q, jnp.complex64)
    smooth = np.exp(-2 * (np.pi * smoothing * q) ** 2) * POTENTIAL_PER_SCATTERING_FACTOR / area
    own = jnp.zeros(len(positions))
    for kind in np.unique(elements):
        factor = jnp.asarray(smooth * scattering_factor(str(kind), q, parametrization), jnp.float32)
        own = own.at[elements == kind].set(factor.sum())
        total = total + factor * (along_y[elements == kind].T @ along_x[elements == kind])
    potential = jnp.fft.ifft2(total).real * (4 * nx * ny)
    spectrum = jnp.fft.fft2(jnp.exp(1j * sigma * potential)) / 4
    keep_y, keep_x = (np.fft.fftfreq(n, 1 / n).round().astype(int) for n in (ny, nx))
    kept, q = spectrum[np.ix_(keep_y, keep_x)], q[np.ix_(keep_y, keep_x)]
    neighbours = ((along_y.conj() @ total) * along_x.conj()).sum(1).real - own
    turned = along_y[:, keep_y] * jnp.exp(1j * sigma * neighbours)[:, None]
    for kind in np.unique(elements):
        core = core_scattering(str(kind), q, energy, smoothing, parametrization) * (nx * ny / area)
        kept = kept + core * (turned[elements == kind].T @ along_x[elements == kind][:, keep_x])
    return jnp.fft.ifft2(kept * (q < band_limit)).astype(jnp.complex64)


def core_scattering(element: str, q: np.ndarray, energy: float, smoothing: float, parametrization: str = "lobato") -> Complex[Array, "..."]:
    """Fourier transform [Å^2] at q [1/Å] of exp(i sigma V) - exp(i sigma V_s), V_s the atom's potential smoothed by a Gaussian of sd `smoothing` [Å]."""
    r, area, sharp, smooth = _core(element, smoothing, parametrization)
    sigma = interaction_parameter(energy)
    difference = jnp.exp(1j * sigma * sharp) - jnp.exp(1j * sigma * smooth)
    table, place = np.linspace(0, q.max(), 512), q / (q.max() / 511)
    transform = jnp.asarray(j0(2 * np.pi * np.outer(table, r)) * area) @ difference
    below = np.minimum(place.astype(int), 510)
    return transform[below] + (place - below) * (transform[below + 1] - transform[below])


@functools.lru_cache(maxsize=64)
def _core(element: str, smoothing: float, parametrization: str) -> tuple[np.ndarray, ...]:
    """Radii [Å] around a nucleus, their areas [Å^2], and the projected potential there [V Å], sharp and smoothed."""
    end = 1.3 / smoothing
    edges = np.array([0, 1e-5, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 2.5])  # smoothing curves the tail too, to the square of its width
    r, w_r = panels(edges, 16 + 4 * end * np.diff(edges))
    q, w_q = panels(np.array([0, 0.1, 0.3, 1, 3, 10, 30, 100]) * end / 100, 40 + 4 * np.diff([0, 0.1, 0.3, 1, 3, 10, 30, 100]) * end / 100)
    with jax.ensure_compile_time_eval():
        damped = np.asarray(scattering_factor(element, q, parametrization)) * np.exp(-2 * (np.pi * smoothing * q) ** 2)
    smooth = 2 * np.pi * POTENTIAL_PER_SCATTERING_FACTOR * j0(2 * np.pi * np.outer(r, q)) @ (damped * q * w_q)
    return r, 2 * np.pi * r * w_r, projected_potential(element, r, parametrization), smooth


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
