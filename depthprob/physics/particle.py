"""Full frozen-phonon multislice of a whole particle: the data that a reconstruction may be judged by.

All plane waves of the aperture are carried through the particle once per thermal configuration; their Gram matrix then gives every
focus. NumPy and SciPy rather than JAX: no derivative is wanted, and the loop over waves is bound by the FFTs.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.fft
from scipy.stats import norm, qmc

from .detector import AnnularDetector
from .electron import wavelength
from .multislice import transmission
from .optics import Microscope, aberration_phase
from .specimen import rms_from_debye_waller_b


def thermal_displacements(atoms: np.ndarray, debye_waller_b: float, configurations: int, seed: int) -> np.ndarray:
    """Lateral displacements (configuration, atom, 2) [Å]: every column draws its own scrambled Sobol sequence over its atoms."""
    rng = np.random.default_rng(seed)
    columns = np.unique(np.round(atoms[:, :2], 2), axis=0, return_inverse=True)[1].ravel()
    draws = np.empty((configurations, len(atoms), 2))
    for column in range(columns.max() + 1):
        members = np.flatnonzero(columns == column)
        sobol = qmc.Sobol(2 * len(members), scramble=True, rng=rng)
        uniform = sobol.random(configurations).reshape(configurations, len(members), 2)
        draws[:, members] = norm.ppf(np.clip(uniform, 1e-12, 1 - 1e-12))
    return float(rms_from_debye_waller_b(debye_waller_b)) * draws


def particle_gram(
    atoms: np.ndarray,
    element: str,
    cell: tuple[float, float],
    microscope: Microscope,
    detector: AnnularDetector,
    sampling: float,
    parametrization: str = "lobato",
    chunk: int = 8,
) -> tuple[np.ndarray, np.ndarray]:
    """Gram matrix of one configuration over the plane waves of the aperture, referred to the plane z = 0.

    Parameters
    ----------
    atoms : (N, 3)
        Displaced atoms [Å]; atoms of equal z share a plane of the multislice.
    cell : (Lx, Ly)
        Periodic cell [Å].

    Returns
    -------
    gram : (K, K) complex128
        sum_g D(g) conj(psi_k) psi_k', for incident waves of one electron each.
    waves : (K, 2) int
        Their frequencies (x, y) in units of 1 / cell.
    """
    lam = float(wavelength(microscope.energy))
    nx, ny = (scipy.fft.next_fast_len(int(np.ceil(side / sampling))) for side in cell)
    band_limit = min(nx / cell[0], ny / cell[1]) / 3
    jx, jy = np.fft.fftfreq(nx, 1 / nx).round().astype(int), np.fft.fftfreq(ny, 1 / ny).round().astype(int)
    q2 = (jx / cell[0]) ** 2 + ((jy / cell[1]) ** 2)[:, None]
    q, mask = np.sqrt(q2), q2 < band_limit**2
    rim = 1 / np.sqrt(cell[0] * cell[1])
    aperture = float(microscope.convergence_angle) * 1e-3 / lam
    inner, outer = float(detector.inner) * 1e-3 / lam, float(detector.outer) * 1e-3 / lam
    sensitivity = np.clip((q - inner) / rim + 0.5, 0, 1) * np.clip((outer - q) / rim + 0.5, 0, 1) * mask
    detected = np.flatnonzero(sensitivity)
    weight = np.sqrt(sensitivity.ravel()[detected]).astype(np.float32)
    iy, ix = np.nonzero(q < aperture + rim / 2)
    waves = np.stack([jx[ix], jy[iy]], 1)

    planes = np.unique(np.round(atoms[:, 2], 3))
    slices = [
        np.asarray(transmission(atoms[np.round(atoms[:, 2], 3) == z, :2], element, cell, (ny, nx), microscope.energy, band_limit, parametrization))
        for z in planes
    ]
    fly = lambda dz: (mask * np.exp(-1j * np.pi * lam * q2 * dz)).astype(np.complex64)
    propagators = {round(dz, 3): fly(dz) for dz in np.diff(planes)}
    seen = np.empty((len(waves), len(detected)), np.complex64)
    entrance = np.exp(-1j * np.pi * lam * q2[iy, ix] * planes[0])
    for start in range(0, len(waves), chunk):
        k = slice(start, start + chunk)
        spectrum = np.zeros((len(iy[k]), ny, nx), np.complex64)
        spectrum[np.arange(len(iy[k])), iy[k], ix[k]] = entrance[k]
        for i, transmitted in enumerate(slices):
            wave = scipy.fft.ifft2(spectrum, overwrite_x=True)
            wave *= transmitted
            spectrum = scipy.fft.fft2(wave, overwrite_x=True)
            if i + 1 < len(slices):
                spectrum *= propagators[round(planes[i + 1] - planes[i], 3)]
        seen[k] = spectrum.reshape(len(spectrum), -1)[:, detected] * weight
    return (seen.conj() @ seen.T).astype(np.complex128), waves


def images_from_gram(
    gram: np.ndarray, waves: np.ndarray, cell: tuple[float, float], microscope: Microscope, defocus: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """Focal series (F, y, x), fraction of the beam, of the cell sampled at shape pixels from the corner (float64).

    Every pair (k, k') adds conj(a_k) G a_k' to the Fourier coefficient at q = k' - k of the image over probe positions,
    with a_k = exp(-i chi(k)) and exp(-2 pi i k.R) for the probe at R. Source size multiplies by exp(-2 pi^2 s^2 q^2),
    focal spread averages over defocus (Gauss-Hermite).
    """
    lam = float(wavelength(microscope.energy))
    kx, ky = waves[:, 0] / cell[0], waves[:, 1] / cell[1]
    rim = np.sqrt(cell[0] * cell[1])
    amplitude = np.clip((float(microscope.convergence_angle) * 1e-3 / lam - np.hypot(kx, ky)) * rim + 0.5, 0, 1)
    amplitude = amplitude / np.sqrt((amplitude**2).sum())
    chi = np.asarray(aberration_phase(microscope, kx, ky, 0.0))
    widest = 2 * abs(waves).max() + 1
    side = 2 * widest + 1
    dx = waves[None, :, 0] - waves[:, None, 0]
    dy = waves[None, :, 1] - waves[:, None, 1]
    index = (((-dy) % side) * side + (-dx) % side).ravel()
    frequency = np.fft.fftfreq(side, 1 / side)
    qx, qy = np.meshgrid(frequency / cell[0], frequency / cell[1])
    s = float(microscope.source_fwhm) / np.sqrt(8 * np.log(2))
    source = np.exp(-2 * (np.pi * s) ** 2 * (qx**2 + qy**2))
    x, y = np.arange(shape[1]) / shape[1], np.arange(shape[0]) / shape[0]
    to_x, to_y = np.exp(2j * np.pi * np.outer(frequency, x)), np.exp(2j * np.pi * np.outer(y, frequency))
    spread = float(microscope.focal_spread)
    nodes, weights = np.polynomial.hermite_e.hermegauss(5 if spread else 1)
    series = np.zeros((len(defocus), *shape))
    for i, f in enumerate(defocus):
        for node, w in zip(nodes, weights / weights.sum()):
            a = amplitude * np.exp(-1j * (chi - np.pi * lam * (f + spread * node) * (kx**2 + ky**2)))
            pairs = (a.conj()[:, None] * gram * a[None]).ravel()
            spectrum = np.bincount(index, pairs.real, side**2) + 1j * np.bincount(index, pairs.imag, side**2)
            series[i] += w * (to_y @ (spectrum.reshape(side, side) * source) @ to_x).real
    return series


def simulate_particle(
    atoms: np.ndarray,
    element: str,
    debye_waller_b: float,
    cell: tuple[float, float],
    microscope: Microscope,
    detector: AnnularDetector,
    configurations: int,
    seed: int,
    sampling: float,
    parametrization: str = "lobato",
    checkpoint: str | Path | None = None,
    progress: Callable = lambda items, **_: items,
) -> tuple[np.ndarray, np.ndarray]:
    """Gram matrices (2, K, K) of two independent halves of the thermal configurations, and their waves (K, 2).

    The difference of the halves measures the data's own Monte-Carlo error. With `checkpoint` the sums are kept after every
    configuration and a rerun goes on from them.
    """
    halves = [thermal_displacements(atoms, debye_waller_b, (configurations + 1 - h) // 2, 2 * seed + h) for h in (0, 1)]
    total, done, waves = None, 0, None
    if checkpoint and Path(checkpoint).exists():
        with np.load(checkpoint, allow_pickle=False) as saved:
            total, done, waves = saved["total"].copy(), int(saved["done"]), saved["waves"]
    for i in progress(range(configurations), desc="whole particle", unit="configuration"):
        if i < done:
            continue
        moved = atoms.copy()
        moved[:, :2] += halves[i % 2][i // 2]
        gram, waves = particle_gram(moved, element, cell, microscope, detector, sampling, parametrization)
        total = np.zeros((2, *gram.shape), np.complex128) if total is None else total
        total[i % 2] += gram
        if checkpoint:
            temporary = Path(f"{checkpoint}.{os.getpid()}.tmp.npz")
            np.savez(temporary, total=total, done=i + 1, waves=waves)
            os.replace(temporary, checkpoint)
    counts = np.array([(configurations + 1) // 2, configurations // 2])
    return total / np.maximum(counts, 1)[:, None, None], waves
