"""Drift between the images of a focal series by iterative phase correlation, safe on a crystal.

A crystal correlates with itself one lattice period away, so the first pass sees the particle's envelope alone (the lattice is
filtered out), and the second, which sees the lattice too, may only search well inside one period of where the first pass ended.
"""

import numpy as np
from scipy.ndimage import median_filter

ENVELOPE = 1.3  # Å, Gaussian sd that leaves the particle's outline and removes a lattice of 2 Å
SHARP = 0.35  # Å, for the refining pass
SEARCH = 0.6  # Å, largest refinement of the envelope's answer: under a third of a lattice period


def estimate_drift(stack: np.ndarray, pixel_size: float, defocus: np.ndarray, periodic: bool = False, rounds: int = 4) -> np.ndarray:
    """Displacement of the object in every image, (F, 2) as (dx, dy) in pixels, mean zero.

    Parameters
    ----------
    stack : (F, ny, nx)
        Images in any unit.
    pixel_size : float
        [Å].
    defocus : (F,)
        [Å]; images near in focus are compared with each other.
    periodic : bool
        Whether images wrap around; otherwise they are tapered to their edges.
    """
    images = np.asarray(stack, float)
    images = images - np.quantile(images, 0.05, axis=(1, 2), keepdims=True)
    if not periodic:
        images = (images - images.mean((1, 2), keepdims=True)) * _taper(images.shape[1:])
    spectra = np.fft.fft2(images)
    shifts = np.zeros((len(images), 2))
    for _ in range(2 * rounds):  # of three images each round halves what is left, of many two are enough
        before = shifts
        shifts = _register(spectra, shifts, pixel_size, ENVELOPE, np.inf, range(len(images)), np.full(len(images), np.inf))
        if abs(shifts - before).max() < 0.1:
            break
    contrast = images.var((1, 2))
    resolved = np.flatnonzero(contrast > np.quantile(contrast, 0.5))
    neighbours = np.full(len(images), 60.0)
    centre = defocus[np.argmax(contrast)]
    near = [i for i in resolved if abs(defocus[i] - centre) <= 80.0]
    for _ in range(rounds):
        refined = _register(spectra, shifts, pixel_size, SHARP, SEARCH, near, neighbours, defocus)
        refined -= refined.mean(0)
        if abs(refined - shifts).max() < 0.02:
            shifts = refined
            break
        shifts = refined
    return _mend(shifts - shifts.mean(0))


def _register(spectra, shifts, pixel_size, blur, search, which, reach, defocus=None) -> np.ndarray:
    """One round: every image of `which` against the mean of the others, each moved back by its present shift."""
    ny, nx = spectra.shape[1:]
    qy, qx = np.fft.fftfreq(ny)[:, None], np.fft.fftfreq(nx)
    soften = np.exp(-2 * np.pi**2 * (blur / pixel_size) ** 2 * (qx**2 + qy**2))
    back = np.exp(2j * np.pi * (qx * shifts[:, 0, None, None] + qy * shifts[:, 1, None, None]))
    aligned = spectra * back * soften
    total = aligned.sum(0)
    out = shifts.copy()
    for i in which:
        if defocus is None:
            reference = total - aligned[i]
        else:
            near = (abs(defocus - defocus[i]) <= reach[i]) & (np.arange(len(shifts)) != i)
            reference = aligned[near].sum(0)
        if not reference.any():  # no other image so near in focus
            continue
        cross = aligned[i] * reference.conj()
        # phase correlation, weighted by the square root of the power: sharp where there is signal, deaf where there is noise
        cross = cross / np.sqrt(np.abs(cross) + 1e-12 * np.abs(cross).max())
        limit = search / pixel_size if np.isfinite(search) else None
        out[i] = shifts[i] + _peak(cross, limit)
    return out


def _peak(cross: np.ndarray, limit: float | None) -> np.ndarray:
    """Position (x, y) of the correlation's maximum within `limit` pixels of zero, by Newton steps on its Fourier sum."""
    ny, nx = cross.shape
    correlation = np.fft.ifft2(cross).real
    y, x = np.fft.fftfreq(ny, 1 / ny), np.fft.fftfreq(nx, 1 / nx)
    if limit is not None:
        correlation = np.where(np.hypot(x, y[:, None]) <= max(limit, 1.0), correlation, -np.inf)
    iy, ix = np.unravel_index(np.argmax(correlation), correlation.shape)
    at = np.array([x[ix], y[iy]])
    qy, qx = np.fft.fftfreq(ny)[:, None], np.fft.fftfreq(nx)
    for _ in range(8):
        wave = cross * np.exp(2j * np.pi * (qx * at[0] + qy * at[1]))
        gradient = np.array([(-2 * np.pi * q * wave.imag).sum() for q in (qx, qy)])
        hessian = -4 * np.pi**2 * np.array([[(a * b * wave.real).sum() for b in (qx, qy)] for a in (qx, qy)])
        if np.linalg.eigvalsh(hessian)[-1] >= 0:
            break
        step = -np.linalg.solve(hessian, gradient)
        at = at + np.clip(step, -0.5, 0.5)
        if abs(step).max() < 1e-4:
            break
    if limit is not None and np.hypot(*at) > limit:
        at = at * limit / np.hypot(*at)
    return at


def _mend(shifts: np.ndarray) -> np.ndarray:
    """Replace single images that jump away from both neighbours by the median of their neighbourhood."""
    if len(shifts) < 5:
        return shifts
    smooth = median_filter(shifts, size=(5, 1), mode="nearest")
    jump = np.hypot(*(shifts - smooth).T)
    typical = 1.4826 * np.median(jump) + 0.2
    shifts = np.where((jump > 8 * typical)[:, None], smooth, shifts)
    return shifts - shifts.mean(0)


def _taper(shape: tuple[int, int], share: float = 0.15) -> np.ndarray:
    """Cosine edges over `share` of each side."""
    rows = []
    for n in shape:
        edge = np.minimum(np.arange(n) + 0.5, n - np.arange(n) - 0.5) / (share * n)
        rows.append(np.sin(np.pi / 2 * np.clip(edge, 0, 1)) ** 2)
    return rows[0][:, None] * rows[1]


def shift_images(stack: np.ndarray, shifts: np.ndarray, periodic: bool = False) -> np.ndarray:
    """Images moved by (dx, dy) pixels, for pictures and averages only: the likelihood moves the model instead.

    Fourier shift where the stack is periodic, else cubic interpolation with the edge value beyond the edge.
    """
    if periodic:
        ny, nx = stack.shape[1:]
        qy, qx = np.fft.fftfreq(ny)[:, None], np.fft.fftfreq(nx)
        ramp = np.exp(-2j * np.pi * (qx * shifts[:, 0, None, None] + qy * shifts[:, 1, None, None]))
        return np.fft.ifft2(np.fft.fft2(stack) * ramp).real
    from scipy.ndimage import shift

    return np.stack([shift(image, (dy, dx), order=3, mode="nearest") for image, (dx, dy) in zip(stack, shifts, strict=True)])
