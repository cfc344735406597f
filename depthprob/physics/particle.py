"""Full frozen-phonon multislice of a whole particle: the data that a reconstruction may be judged by.

All plane waves of the aperture are carried through the particle once per thermal configuration; their Gram matrix then gives every
focus. SciPy rather than JAX: no derivative is wanted, and its FFTs, taken wave by wave so that they stay in the cache, are as fast
on one core while the Hermitian product costs half. `multislice.exit_waves` is the same in JAX.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import scipy.fft
from jaxtyping import Complex, Float
from scipy.linalg.blas import cherk
from scipy.stats import norm, qmc

from ..errors import InputError
from ..storage import load_checkpoint, save_checkpoint
from .detector import AnnularDetector
from .electron import wavelength
from .multislice import transmission
from .optics import Microscope, aberration_phase
from .specimen import debye_waller_b_from_rms


def thermal_displacements(
    atoms: np.ndarray, debye_waller_b: float | np.ndarray, configurations: int, seed: int
) -> np.ndarray:
    """Lateral displacements (configuration, atom, 2) [Å], B [Å^2] one for all or one for each atom: every column draws its own scrambled Sobol sequence over its atoms.

    Scrambling alone leaves the sequences of different columns correlated (up to 0.9: their leading digits differ by a constant), so
    each takes its points in an order of its own, shuffled within 2^m ... 2^(m+1): any first 2^m points keep their balance, and the
    first configurations are the same whatever their number.
    """
    doublings = max(configurations - 1, 0).bit_length()
    rng = np.random.default_rng(seed)
    columns = np.unique(np.round(atoms[:, :2], 2), axis=0, return_inverse=True)[1].ravel()
    draws = np.empty((configurations, len(atoms), 2))
    for column in range(columns.max() + 1):
        members = np.flatnonzero(columns == column)
        sobol = qmc.Sobol(2 * len(members), scramble=True, rng=rng)
        shuffle = np.random.default_rng(rng.integers(2**63))
        order = np.concatenate(
            [[0], *(2**m + shuffle.permutation(2**m) for m in range(doublings))]
        )[:configurations]
        uniform = sobol.random_base2(doublings)[order].reshape(configurations, len(members), 2)
        draws[:, members] = norm.ppf(np.clip(uniform, 1e-12, 1 - 1e-12))
    rms = np.sqrt(np.asarray(debye_waller_b, float) / debye_waller_b_from_rms(1.0))
    return rms[..., None] * draws


def occupied(atoms: np.ndarray, occupancy: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Which atoms (N,) of positions (N, 3) are there in one draw: each with its probability, and one at most of those that share a site."""
    site = np.unique(np.round(atoms, 2), axis=0, return_inverse=True)[1].ravel()
    ahead = np.array([occupancy[:n][site[:n] == site[n]].sum() for n in range(len(site))])  # of the same site
    draw = rng.random(len(site))[site]
    return (ahead <= draw) & (draw < ahead + occupancy)


def particle_gram(
    atoms: np.ndarray,
    element: str | Sequence[str],
    cell: tuple[float, float],
    microscope: Microscope,
    detector: AnnularDetector,
    sampling: float,
    parametrization: str = "lobato",
) -> tuple[np.ndarray, np.ndarray]:
    """Gram matrix of one configuration over the plane waves of the aperture, referred to the plane z = 0.

    Memory is K x (detector pixels) x 8 bytes: 1.4 GB for the paper's settings in a cell of 20 Å, growing as its fourth power.

    Parameters
    ----------
    atoms : (N, 3)
        Displaced atoms [Å], in any order; atoms of equal z share a plane of the multislice.
    element : str, or one for each atom
    cell : (Lx, Ly)
        Periodic cell [Å].
    sampling : float
        Coarsest pixel of the working grid [Å]; taken finer where the FFT is faster.

    Returns
    -------
    gram : (K, K) complex128
        sum_g D(g) conj(psi_k) psi_k', for incident waves of one electron each.
    waves : (K, 2) int
        Their frequencies (x, y) in units of 1 / cell.

    Raises
    ------
    InputError
        If the sampling cannot carry the detector's outer angle.
    """
    lam = float(wavelength(microscope.energy))
    nx, ny = (scipy.fft.next_fast_len(math.ceil(side / sampling)) for side in cell)
    band_limit = min(nx / cell[0], ny / cell[1]) / 3
    outer = detector.outermost * 1e-3 / lam
    if band_limit < outer:
        raise InputError(
            f"A sampling of {sampling:g} Å carries angles up to {band_limit * lam * 1e3:.0f} mrad (two thirds of Nyquist), but the "
            f"detector reaches {detector.outermost:g} mrad. Give a sampling of {1 / (3 * outer):.4f} Å or finer, or a smaller outer angle."
        )
    jx, jy = (np.fft.fftfreq(n, 1 / n).round().astype(int) for n in (nx, ny))
    q2 = (jx / cell[0]) ** 2 + ((jy / cell[1]) ** 2)[:, None]
    mask = q2 < band_limit**2
    rim, to_mrad = 1 / math.sqrt(cell[0] * cell[1]), 1e3 * lam
    sensitivity = detector.sensitivity(jx / cell[0] * to_mrad, (jy / cell[1] * to_mrad)[:, None], rim * to_mrad) * mask
    detected = np.flatnonzero(sensitivity)
    weight = np.sqrt(sensitivity.ravel()[detected]).astype(np.float32)
    iy, ix = np.nonzero(np.sqrt(q2) < float(microscope.convergence_angle) * 1e-3 / lam + rim / 2)
    waves = np.stack([jx[ix], jy[iy]], 1)

    height = np.round(atoms[:, 2], 3)
    planes = np.unique(height) if len(atoms) else np.zeros(1)
    elements = np.broadcast_to(np.asarray(element), len(atoms))
    slices = [
        np.asarray(
            transmission(
                atoms[height == z, :2],
                elements[height == z],
                cell,
                (ny, nx),
                microscope.energy,
                band_limit,
                parametrization,
            )
        )
        for z in planes
    ]
    steps = np.diff(planes).round(3)
    propagators = {
        dz: (mask * np.exp(-1j * np.pi * lam * q2 * dz)).astype(np.complex64)
        for dz in np.unique(steps)
    }
    entrance = np.exp(-1j * np.pi * lam * q2[iy, ix] * planes[0]) / (nx * ny)
    seen = np.empty((len(waves), len(detected)), np.complex64)
    for k, (x, y) in enumerate(waves):
        wave = np.outer(
            (entrance[k] * np.exp(2j * np.pi * y * np.arange(ny) / ny)).astype(np.complex64),
            np.exp(2j * np.pi * x * np.arange(nx) / nx).astype(np.complex64),
        )
        spectrum = scipy.fft.fft2(np.multiply(wave, slices[0], out=wave), overwrite_x=True)
        for dz, transmitted in zip(steps, slices[1:], strict=True):
            spectrum *= propagators[dz]
            wave = scipy.fft.ifft2(spectrum, overwrite_x=True)
            wave *= transmitted
            spectrum = scipy.fft.fft2(wave, overwrite_x=True)
        np.multiply(spectrum.ravel()[detected], weight, out=seen[k])
    return hermitian_product(seen), waves


def hermitian_product(seen: np.ndarray, chunk: int = 16384) -> np.ndarray:
    """sum_g conj(seen_kg) seen_k'g (K, K) complex128 of complex64 waves (K, g): single precision within a chunk of pixels, double across."""
    upper = np.zeros((len(seen),) * 2, np.complex128)
    for start in range(0, seen.shape[1], chunk):
        upper += cherk(1.0, seen[:, start : start + chunk].T, trans=2)
    return np.triu(upper) + np.triu(upper, 1).conj().T


def images_from_gram(
    gram: np.ndarray,
    waves: np.ndarray,
    cell: tuple[float, float],
    microscope: Microscope,
    defocus: np.ndarray,
    shape: tuple[int, int],
    shifts: np.ndarray | None = None,
) -> np.ndarray:
    """Focal series (F, y, x), fraction of the beam, of the cell sampled at shape pixels from the corner (float64).

    `shifts` (F, 2) [Å] displace the object in each image, exactly.

    The aperture's rim is one pixel of the reciprocal cell wide, which makes the probe's peak higher by 1 / (3 k0 L), k0 the aperture and L the cell's side: 2 % in a
    cell of 16 Å under 21 mrad at 300 kV, though not the image's sum.

    The probe at R holds a_k exp(-2 pi i k.R) with a_k = exp(-i chi(k)), so every pair (k, k') adds conj(a_k) G a_k' to the Fourier
    coefficient at q = k - k' of the image. Source size multiplies by exp(-2 pi^2 s^2 q^2), focal spread by
    exp(-(pi wavelength s_f)^2 (k^2 - k'^2)^2 / 2).

    Parameters
    ----------
    gram, waves
        As `particle_gram` gives them.
    defocus : (F,)
        [Å], positive is underfocus.
    """
    spectra, x, y = focal_spectra(gram, waves, cell, microscope, defocus)
    across, down = (np.exp(2j * np.pi * np.outer(np.arange(n) / n, side * q)) for n, side, q in zip(shape[::-1], cell, (x, y), strict=True))
    shifts = np.zeros((len(defocus), 2)) if shifts is None else shifts
    series = np.empty((len(defocus), *shape))
    for i, spectrum in enumerate(spectra):
        moved = spectrum * np.exp(-2j * np.pi * (x * shifts[i, 0] + y[:, None] * shifts[i, 1]))
        series[i] = (down @ moved @ across.T).real
    return series


def probe_amplitudes(
    waves: np.ndarray, cell: tuple[float, float], microscope: Microscope, defocus: np.ndarray, turn: float = 0.0
) -> Complex[np.ndarray, "F K"]:
    """Amplitudes a_k = exp(-i chi(k)) of a probe of one electron, over the aperture, whose edge is one pixel wide.

    `turn` [rad] is the angle from the lens's x to that of the cell.
    """
    lam = float(wavelength(microscope.energy))
    kx, ky = waves[:, 0] / cell[0], waves[:, 1] / cell[1]
    rim = np.sqrt(cell[0] * cell[1])
    amplitude = np.clip((float(microscope.convergence_angle) * 1e-3 / lam - np.hypot(kx, ky)) * rim + 0.5, 0, 1)
    amplitude = amplitude / np.sqrt((amplitude**2).sum())
    chi = np.asarray(aberration_phase(microscope, kx * np.cos(turn) - ky * np.sin(turn), kx * np.sin(turn) + ky * np.cos(turn), 0.0))
    return amplitude * np.exp(-1j * (chi - np.pi * lam * np.asarray(defocus, float)[:, None] * (kx**2 + ky**2)))


def focal_damping(waves: np.ndarray, cell: tuple[float, float], microscope: Microscope) -> Float[np.ndarray, "K K"]:
    """What focal spread leaves of each two waves' product."""
    k2 = (waves[:, 0] / cell[0]) ** 2 + (waves[:, 1] / cell[1]) ** 2
    spread = np.pi * float(wavelength(microscope.energy)) * float(microscope.focal_spread)
    return np.exp(-((spread * (k2[:, None] - k2)) ** 2) / 2)


def source_damping(qx: np.ndarray, qy: np.ndarray, microscope: Microscope) -> Float[np.ndarray, "y x"]:
    """What the source's width leaves of an image's Fourier coefficients at frequencies (x,), (y,) [1/Å]."""
    s = float(microscope.source_fwhm) / np.sqrt(8 * np.log(2))
    return np.exp(-2 * (np.pi * s) ** 2 * (qx**2 + qy[:, None] ** 2))


def focal_spectra(
    gram: np.ndarray, waves: np.ndarray, cell: tuple[float, float], microscope: Microscope, defocus: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fourier coefficients (F, y, x) of the images of `images_from_gram`, and their frequencies (x,), (y,) [1/Å]."""
    side = 4 * int(abs(waves).max()) + 3
    dx, dy = (waves[:, None] - waves[None]).transpose(2, 0, 1)
    index = ((dy % side) * side + dx % side).ravel()
    frequency = np.fft.fftfreq(side, 1 / side)
    qx, qy = frequency / cell[0], frequency / cell[1]
    source, gram = source_damping(qx, qy, microscope), gram * focal_damping(waves, cell, microscope)
    spectra = np.empty((len(defocus), side, side), complex)
    for spectrum, a in zip(spectra, probe_amplitudes(waves, cell, microscope, defocus), strict=True):
        pairs = (a.conj()[:, None] * gram * a[None]).ravel()
        summed = np.bincount(index, pairs.real, side**2) + 1j * np.bincount(index, pairs.imag, side**2)
        spectrum[:] = summed.reshape(side, side) * source
    return spectra, qx, qy


def simulate_particle(
    atoms: np.ndarray,
    element: str | Sequence[str],
    debye_waller_b: float | np.ndarray,
    cell: tuple[float, float],
    microscope: Microscope,
    detector: AnnularDetector,
    configurations: int,
    seed: int,
    sampling: float,
    parametrization: str = "lobato",
    checkpoint: str | Path | None = None,
    progress: Callable = lambda items, **_: items,
    occupancy: float | np.ndarray = 1.0,
    tilt: tuple[float, float] = (0.0, 0.0),
) -> tuple[np.ndarray, np.ndarray]:
    """Gram matrices (2, K, K) of two independent halves of the thermal configurations, and their waves (K, 2).

    The difference of the halves measures the data's own Monte-Carlo error. With `checkpoint` the sums are kept after every
    configuration, a rerun goes on from them, and a larger number of configurations extends them. The order of the atoms plays no part.

    Parameters
    ----------
    atoms : (N, 3)
        Mean positions [Å].
    element, debye_waller_b, occupancy : one for all, or one for each atom
        Symbol, B [Å^2], and probability to be there, drawn anew in every configuration; of atoms that share a site one at most is there.
    tilt : (x, y)
        Small angles [mrad]: every plane moves aside by z * tilt, so that the cell stays periodic and what lies at z = 0 in its place.

    Raises
    ------
    InputError
        If the checkpoint was made with other settings.
    """
    of_each = lambda values, kind: np.broadcast_to(np.asarray(values, kind), len(atoms))
    order = np.lexsort((of_each(element, str), *np.asarray(atoms, float).T))
    atoms = np.asarray(atoms, float)[order]
    elements, b, share = of_each(element, str)[order], of_each(debye_waller_b, float)[order], of_each(occupancy, float)[order]
    numbers = (
        *cell,
        sampling,
        microscope.energy,
        microscope.convergence_angle,
        *tilt,
    )
    digest = hashlib.sha256(b"".join(a.tobytes() for a in (atoms, b, share)) + " ".join(elements).encode()).hexdigest()[:16]
    settings = f"{' '.join(np.unique(elements))}, {parametrization}, seed {seed}, atoms {digest}, detector {detector.record}, " + ", ".join(
        f"{float(n):.10g}" for n in numbers
    )
    total, done, waves = None, 0, None
    if saved := load_checkpoint(checkpoint):
        theirs = str(saved.get("settings", "unknown"))
        if theirs != settings:
            raise InputError(
                f"The checkpoint {checkpoint} was made with other settings ({theirs}) than those asked for ({settings}). "
                "Delete it to start afresh, or give another checkpoint."
            )
        total, done, waves = saved["total"], int(saved["done"]), saved["waves"]
    configurations = max(configurations, done)
    halves = [
        thermal_displacements(atoms, b, (configurations + 1 - h) // 2, 2 * seed + h)
        for h in (0, 1)
    ]
    for i in progress(
        range(done, configurations),
        desc="whole particle",
        unit="configuration",
        initial=done,
        total=configurations,
    ):
        moved = atoms.copy()
        moved[:, :2] += np.outer(atoms[:, 2], tilt) * 1e-3
        moved[:, :2] += halves[i % 2][i // 2]
        there = occupied(atoms, share, np.random.default_rng([seed, i]))
        gram, waves = particle_gram(
            moved[there], elements[there], cell, microscope, detector, sampling, parametrization
        )
        total = np.zeros((2, *gram.shape), np.complex128) if total is None else total
        total[i % 2] += gram
        if checkpoint:
            save_checkpoint(checkpoint, total=total, done=i + 1, waves=waves, settings=settings)
    counts = np.array([(configurations + 1) // 2, configurations // 2])
    return total / np.maximum(counts, 1)[:, None, None], waves
