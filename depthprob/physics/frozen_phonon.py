"""Gram matrices of isolated columns by frozen-phonon multislice: thermal draws, and the mean over them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import norm, qmc

from .. import processes
from ..devices import SPREAD, WHOLE, on_all, spread
from ..errors import InputError
from ..storage import load_checkpoint, save_checkpoint
from .detector import AnnularDetector
from .electron import wavelength
from .gram import (
    ColumnGram,
    Sweep,
    default_cell,
    default_reach,
    default_sampling,
    has_full_symmetry,
    laguerre_gauss_modes,
    mirrored,
    prepare_sweep,
    required_sampling,
    sweep_column,
    sweep_whole,
)
from .specimen import Column, rms_from_debye_waller_b

LARGEST = 2e9  # bytes of Gram matrices that are no blocks
CHEAP_ANGLE, CHEAP_CELL = 0.78, 0.71  # band limit over outer angle, and cell over accurate cell, of the cheap sweep


def thermal_draws(n_atoms: int, debye_waller_b: float, configurations: int, seed: int) -> np.ndarray:
    """Scrambled Sobol draws of the lateral displacements, (configuration, atom, 2) in Å; Gaussian of rms sqrt(B / 8 pi^2) per axis.

    The atoms nearest the detector vary first: the leading Sobol dimensions are the best distributed.
    """
    sobol = qmc.Sobol(2 * n_atoms, scramble=True, rng=np.random.default_rng(seed))
    uniform = sobol.random(configurations)
    u = float(rms_from_debye_waller_b(debye_waller_b))
    return u * norm.ppf(np.clip(uniform, 1e-12, 1 - 1e-12)).reshape(configurations, n_atoms, 2)


def build_gram(
    column: Column,
    energy: float,
    convergence_angle: float,
    detector: AnnularDetector,
    configurations: int = 16,
    scramblings: int = 8,
    seed: int = 0,
    parametrization: str = "lobato",
    checkpoint: str | Path | None = None,
    progress: Callable = lambda items, **_: items,
    sampling: float | None = None,
    reach: float | None = None,
    cell: float | None = None,
    corrections: int | None = None,
) -> ColumnGram:
    """Gram matrices of isolated columns of 1 to column.n_atoms atoms by frozen-phonon multislice.

    Parameters
    ----------
    column : Column
        Its n_atoms is the largest atom number of the library.
    configurations, scramblings : int
        Thermal configurations in a scrambling, and independent scramblings (at least 8 for a depth error one can trust).
    checkpoint : path, optional
        Sums are kept here every few configurations; a rerun with the same settings goes on from it.
    progress : callable
        Wraps the iteration over configurations, for instance `tqdm.tqdm`.
    corrections : int, optional
        Configurations of each scrambling that are swept at full accuracy, an eighth of them by default; all of them for no control variate.

    Notes
    -----
    Two-level Monte Carlo (Giles, Acta Numerica 24, 259 (2015)): a sweep on a smaller cell with a coarser grid costs an eighth and
    follows the same displacements almost as well, so G = mean over all configurations of the cheap sweep + mean over a few of
    accurate minus cheap. For 12 gold atoms one accurate configuration scatters a fitted depth by 1.0 Å, the difference by 0.1 to 0.2 Å.
    """
    aperture = float(convergence_angle) * 1e-3 / float(wavelength(energy))
    reach = reach or default_reach(column, convergence_angle)
    corrections = min(corrections or max(1, configurations // 8), configurations)
    modes = laguerre_gauss_modes(reach, aperture)
    is_whole = not has_full_symmetry(column, detector)
    if is_whole:
        _check_size(column, len(modes.l), scramblings)
    sampling = sampling or default_sampling(energy, detector.outermost, convergence_angle)
    cell = cell or default_cell(column, energy, aperture, reach)
    # scramblings take turns, so that what is done when interrupted is balanced
    order = [(s, c) for c in range(configurations) for s in range(scramblings)]
    devices = processes.devices_for(len(order))
    width = devices * jax.process_count()
    prepare = lambda sampling, cell: on_all(_traced(prepare_sweep(column, energy, aperture, detector, reach, parametrization, sampling, cell)), devices)
    accurate = prepare(sampling, cell)
    cheap = prepare(max(sampling, required_sampling(energy, CHEAP_ANGLE * detector.outermost)), CHEAP_CELL * cell)
    one = sweep_whole if is_whole else partial(sweep_column, modes=modes)
    each = jax.jit(spread(lambda u, sweep: one(u[0], sweep)[None], (SPREAD, WHOLE), devices))
    size = (len(modes.l),) * 2 if is_whole else (modes.order + 1, *(modes.block_size,) * 2)
    sums = np.zeros((scramblings, column.n_atoms, *size), np.complex128)
    settings = repr((column, energy, convergence_angle, detector.record, configurations, corrections, seed, parametrization, sampling, reach, cell))
    done = 0
    saved = load_checkpoint(checkpoint) if processes.is_first() else {}
    if str(saved.get("settings")) == settings:
        sums, done = saved["sums"], saved["done"]
    sums, done = processes.of_first((sums, done))
    draws = [thermal_draws(column.n_atoms, column.debye_waller_b, configurations, seed * 1000 + i) for i in range(scramblings)]
    for i in progress(range(int(done), len(order), width), desc="column library", unit="configuration", unit_scale=width):
        now = order[i : i + width]
        u = np.array([draws[s][c] + column.leaning for s, c in processes.own_part(now, devices)], np.float32)
        by_cheap = processes.gathered(each(u, cheap)) if corrections < configurations else np.zeros(width)
        by_accurate = processes.gathered(each(u, accurate)) if now[0][1] < corrections else by_cheap
        for (s, c), blocks, better in zip(now, by_cheap, by_accurate, strict=False):
            sums[s] += blocks / configurations
            if c < corrections:
                sums[s] += (better - blocks) / corrections
        end = i + len(now)
        if checkpoint and processes.is_first() and (end // 8 > i // 8 or end == len(order)):
            save_checkpoint(checkpoint, sums=sums, done=end, settings=settings)
    if is_whole and detector.is_round:
        sums = mirrored(sums, modes, column.tilt)
    return ColumnGram.of(sums, column, energy, aperture, detector, reach, configurations, parametrization)


def _check_size(column: Column, n_modes: int, scramblings: int) -> None:
    """Refuse columns whose whole Gram matrices are more than `LARGEST`."""
    need = 16 * scramblings * column.n_atoms * n_modes**2
    if need > LARGEST:
        raise InputError(
            f"columns of up to {column.n_atoms} atoms, tilted or with a detector that is not round, need {scramblings * column.n_atoms} Gram matrices of "
            f"{n_modes} waves without symmetry, {need / 1e9:.1f} GB; allowed are {LARGEST / 1e9:g} GB. Ask for fewer atoms, or for tilt [0, 0] and a round sensitivity."
        )


def _traced(sweep: Sweep) -> Sweep:
    """With the detector's pixels as an array that jit traces, so that sweeps of one shape share a compilation."""
    return sweep._replace(detected=jnp.asarray(sweep.detected))
