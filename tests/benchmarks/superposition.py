"""How far the sum of isolated columns is from full multislice, in ångström of fitted depth and per cent of intensity, for the paper's settings.

    python tests/benchmarks/superposition.py [CASE ...] [--configurations N] [--results FILE] [--figure FILE]

A rod of gold in vacuum: a central column of n atoms and its neighbours within 3 Å, heights staggered as in the crystal. Its series less those of its
columns one by one, all with the same displacements, is fitted to first order as the library's maximum likelihood would: depths, amplitudes and
positions of all columns, gain and background of all images. So the central column's depth and amplitude are weighted sums over the pixels of all images:
quadratic forms of the wave in the aperture. Each configuration draws frozen phonons and a few random incident waves whose mean is such a form; no image
is computed, and one wave tells of all foci. Cases are ZONE-ATOMS and tilt-MRAD (12 atoms along [001]).

The sampling carries the whole detector: one that stops at 140 mrad takes 0.8 % of the intensity for superposition's error. Printed: mean over configurations and its standard error, and the bound on the
depth. With `--results` numbers are kept and a rerun adds configurations. Beside it, in untilted cases, what the pipeline's correction by pairs of neighbours finds.
"""

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.fft import next_fast_len

import depthprob as dp
from depthprob.config import config_from_dict
from depthprob.inference.problem import make_problem
from depthprob.physics.focal_series import renderer
from depthprob.physics.multislice import multislice, transmission
from depthprob.reconstruction.superposition import lacking

A, B, DOSE, FOCI = 4.08, 0.63, 9612.0, np.arange(-200.0, 201, 10)
MICROSCOPE, DETECTOR = dp.Microscope(energy=300e3, convergence_angle=21.0, source_fwhm=0.7), dp.AnnularDetector(inner=48.0, outer=180.0)
LAM = float(dp.wavelength(300e3))
SAMPLING, VACUUM = 0.0365, 6.0  # of the potential, and between rods of neighbouring cells [Å]
NEAR = 3.0  # Å, farthest neighbour
WAVES = 6  # random waves in a configuration for each functional and each sign
ZONES = {  # two steps between columns [Å], what they raise in units of the spacing, the spacing [Å]
    "001": ([[A / 2, 0], [0, A / 2]], [1 / 2, 1 / 2], A),
    "110": ([[A / 2, A / 8**0.5], [A / 2, -A / 8**0.5]], [1 / 2, 1 / 2], A / 2**0.5),
    "111": ([[A / 6**0.5, 0], [A / 24**0.5, A / 8**0.5]], [1 / 3, -1 / 3], A * 3**0.5),
}


class Case(NamedTuple):
    zone: str
    n_atoms: int
    tilt: float = 0.0


CASES = {f"001-{n}": Case("001", n) for n in (4, 8, 12, 20, 30, 40)}
CASES |= {f"{zone}-{n}": Case(zone, n) for zone in ("110", "111") for n in (8, 20)}
CASES |= {f"tilt-{mrad}": Case("001", 12, float(mrad)) for mrad in (5, 10, 20)}


def rod(case: Case) -> tuple[np.ndarray, np.ndarray, float]:
    """Columns (C, 3) as x, y and mean z about the central one, the first; side of the cell [Å]."""
    steps, raised, spacing = ZONES[case.zone]
    i = np.stack(np.meshgrid(*[np.arange(-9, 10)] * 2), -1).reshape(-1, 2)
    places, height = i @ np.array(steps), np.mod(i @ np.array(raised) + 0.499, 1) - 0.499
    order = np.argsort(np.hypot(*places.T).round(6), kind="stable")
    order = order[np.hypot(*places[order].T) <= NEAR]
    columns = np.column_stack([places, height * spacing])[order]
    return columns, spacing, float(np.ptp(columns[:, :2], axis=0).max() + VACUUM)


def functionals(case: Case, columns: np.ndarray, spacing: float, cell: float, size: int) -> tuple[np.ndarray, float]:
    """Weights (2, focus, y, x) whose sums over a small change of the series give the central column's depth [Å] and amplitude; the depth's bound [Å]."""
    library = dp.build_library(dp.Column("Au", max(case.n_atoms, 12), spacing, B, (case.tilt, 0.0)), MICROSCOPE, DETECTOR, z_range=(-210.0, 210.0))
    series = dp.FocalSeries(FOCI, cell / size, np.full(len(FOCI), DOSE), (size, size), periodic=True)
    draw, ones = renderer(library, series), jnp.ones(len(FOCI))
    field = lambda r, z: dp.Field(r, jnp.full(len(r), case.n_atoms), z, 1e-4 * ones, ones, jnp.zeros((len(FOCI), 2)))
    signal = lambda r, z: dp.expected_counts(field(r, z), library, series, draw) - 1e-4 * DOSE * series.pixel_size**2
    of_one = jax.jit(lambda r, z: jnp.stack([signal(r[None], z[None]), jax.jvp(lambda z: signal(r[None], z[None]), (z,), (jnp.ones_like(z),))[1],
                     *(jax.jvp(lambda r: signal(r[None], z[None]), (r,), (way,))[1] for way in jnp.eye(2))]))  # fmt: skip
    each = np.array([of_one(jnp.asarray(c[:2] + cell / 2), jnp.asarray(c[2])) for c in columns], float)
    total = each[:, 0].sum(0)
    scale = DOSE * series.pixel_size**2
    derivatives = each.transpose(1, 0, 2, 3, 4).reshape(4 * len(columns), *total.shape)
    by_image = np.eye(len(FOCI))[:, :, None, None]
    derivatives = np.concatenate([derivatives, by_image * total, by_image * np.full_like(total, scale)]).reshape(4 * len(columns) + 2 * len(FOCI), -1)
    derivatives = derivatives / np.sqrt(total + 1e-4 * scale).ravel()
    fisher = derivatives @ derivatives.T
    gain = np.zeros(len(fisher))
    gain[4 * len(columns) : 4 * len(columns) + len(FOCI)] = 1.0
    fisher += np.outer(gain, gain) * fisher.diagonal().max()  # the mean gain is one
    unit = np.sqrt(fisher.diagonal())
    wanted = np.zeros((len(fisher), 2))
    wanted[len(columns), 0] = wanted[0, 1] = 1.0  # amplitudes, then depths, x, y of all columns
    solved = np.linalg.solve(fisher / np.outer(unit, unit), wanted / unit[:, None]) / unit[:, None]
    weights = (solved.T @ derivatives).reshape(2, *total.shape) / np.sqrt(total + 1e-4 * scale) * scale
    return weights, math.sqrt(solved[len(columns), 0])


def quadratic_forms(weights: np.ndarray, cell: float) -> tuple[np.ndarray, np.ndarray]:
    """Hermitian forms (2, K, K) that weigh the images, and the plane waves they refer to (K, 2), in units of 1 / cell.

    A pixel R at focus f records sum_kk' conj(a_k) G_kk' a_k' S(k - k') exp(2 pi i (k - k').R), as `particle.images_from_gram` has it.
    """
    aperture = 21e-3 / LAM
    j = np.arange(-math.ceil(aperture * cell), math.ceil(aperture * cell) + 1)
    waves = np.stack(np.meshgrid(j, j), -1).reshape(-1, 2)
    share = np.clip(aperture * cell - np.hypot(*waves.T) + 0.5, 0, 1)
    waves, share = waves[share > 0], share[share > 0]
    defocused = np.exp(1j * np.pi * LAM * (waves**2).sum(1) / cell**2 * FOCI[:, None])
    a = share / np.sqrt((share**2).sum()) * defocused
    x, y = (waves[:, None] - waves[None]).transpose(2, 0, 1)
    source = np.exp(-2 * (np.pi * MICROSCOPE.source_fwhm / np.sqrt(8 * np.log(2)) / cell) ** 2 * (x**2 + y**2))
    spectra = np.fft.ifft2(weights, norm="forward")
    forms = [sum(b.conj()[:, None] * s[y, x] * b for b, s in zip(a, spectrum, strict=True)) * source for spectrum in spectra]
    return np.array(forms), waves


class Setup(NamedTuple):
    """What the configurations of a case share; `roots` (2, 2, K, K) turn random phases into waves whose mean product is the positive or negative part of a form."""

    columns: np.ndarray
    spacing: float
    cell: float
    n: int
    roots: np.ndarray
    waves: np.ndarray
    bound: float


def prepare(case: Case) -> Setup:
    """Of a case, all that does not depend on the configuration."""
    columns, spacing, cell = rod(case)
    weights, bound = functionals(case, columns, spacing, cell, math.ceil(4 * cell))
    forms, waves = quadratic_forms(weights, cell)
    values, vectors = np.linalg.eigh(forms.conj())  # sum P_kk' <k|D|k'> = sum over eigenvectors c of P* of value times <c|D|c>
    roots = np.stack([vectors * np.sqrt(np.maximum(sign * values, 0))[:, None] for sign in (1, -1)], 1)
    n = next_fast_len(math.ceil(cell / SAMPLING))
    return Setup(columns, spacing, cell, n, roots, waves, bound)


@partial(jax.jit, static_argnames=("cell", "n"))
def planes_of(places: jax.Array, cell: float, n: int) -> jax.Array:
    """Transmissions (plane, y, x) of planes of equally many atoms (plane, atom, 2)."""
    return jax.lax.map(lambda r: transmission(r, "Au", (cell,) * 2, (n,) * 2, 300e3, n / cell / 3), places)


@partial(jax.jit, static_argnames=("cell", "n"))
def detected(spectra: jax.Array, planes: jax.Array, depths: jax.Array, cell: float, n: int) -> jax.Array:
    """Detected part of each of the incident waves, referred to z = 0."""
    q = np.fft.fftfreq(n, cell / n) * LAM * 1e3
    sensitivity = jnp.asarray(DETECTOR.sensitivity(q, q[:, None], LAM * 1e3 / cell), jnp.float32)
    one = lambda s: (jnp.abs(multislice(s, planes, depths, (cell,) * 2, LAM, n / cell / 3)) ** 2 * sensitivity).sum()
    return jax.lax.map(one, spectra, batch_size=8)


def signals(spectra: jax.Array, atoms: np.ndarray, setup: Setup) -> np.ndarray:
    """Detected part of the waves behind displaced atoms (N, 3)."""
    heights = atoms[:, 2].round(3)
    depths, number = np.unique(heights, return_counts=True)
    planes = np.empty((len(depths), setup.n, setup.n), np.complex64)
    for many in np.unique(number):
        places = np.stack([atoms[heights == z, :2] for z in depths[number == many]])
        planes[number == many] = planes_of(jnp.asarray(places), setup.cell, setup.n)
    return np.asarray(detected(spectra, jnp.asarray(planes), jnp.asarray(depths), setup.cell, setup.n), float)


def one_configuration(case: Case, setup: Setup, seed: int) -> list[float]:
    """Depth [Å] and amplitude of the central column that the rod has and the sum of its columns has not."""
    rng = np.random.default_rng(seed)
    phases = np.exp(2j * np.pi * rng.random((*setup.roots.shape[:2], len(setup.waves), WAVES)))
    mixtures = (setup.roots @ phases).swapaxes(-1, -2).reshape(-1, len(setup.waves))
    spectra = np.zeros((len(mixtures), setup.n, setup.n), np.complex64)
    spectra[:, setup.waves[:, 1], setup.waves[:, 0]] = mixtures
    z = (np.arange(case.n_atoms) - (case.n_atoms - 1) / 2) * setup.spacing + setup.columns[:, 2:]
    rms = float(np.sqrt(B / (8 * np.pi**2)))
    lateral = setup.columns[:, None, :2] + z[..., None] * [case.tilt * 1e-3, 0] + rms * rng.normal(size=(*z.shape, 2)) + setup.cell / 2
    atoms = np.concatenate([lateral, z[..., None]], -1)
    whole, *alone = (signals(jnp.asarray(spectra), a, setup) for a in (atoms.reshape(-1, 3), *atoms))
    positive, negative = (whole - sum(alone)).reshape(2, 2, WAVES).mean(-1).T
    return (positive - negative).tolist()


def of_pairs(case: Case) -> tuple[float, float]:
    """What the pipeline's correction, by pairs of neighbours, finds for the depth [Å] and amplitude of the central column."""
    columns, spacing, cell = rod(case)
    size = math.ceil(4 * cell)
    library = dp.build_library(dp.Column("Au", max(case.n_atoms, 12), spacing, B), MICROSCOPE, DETECTOR, z_range=(-210.0, 210.0))
    series, ones = dp.FocalSeries(FOCI, cell / size, np.full(len(FOCI), DOSE), (size, size), periodic=True), np.ones(len(FOCI))
    field = dp.Field(columns[:, :2] + cell / 2, np.full(len(columns), case.n_atoms), columns[:, 2], 1e-4 * ones, ones, np.zeros((len(FOCI), 2)))
    problem = make_problem(np.zeros((len(FOCI), size, size)), field, library, series)
    config = config_from_dict({"specimen": {"zone_axis": [int(i) for i in case.zone]}})
    change, _ = lacking(problem.start, problem, config)
    weights, _ = functionals(case, columns, spacing, cell, size)
    depth, amplitude = (weights * change / (DOSE * series.pixel_size**2)).sum((1, 2, 3))
    return float(depth), float(amplitude)


def main() -> None:
    """Print a row a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE", help=" ".join(CASES))
    parser.add_argument("--configurations", type=int, default=8)
    parser.add_argument("--results", type=Path, help="JSON that holds every configuration's depth and amplitude")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    kept = json.loads(options.results.read_text()) if options.results and options.results.exists() else {}
    print("case      depth error (Å)    intensity error (%)   of pairs (Å, %)   bound (Å)   configurations")
    for name in options.cases:
        start, setup = time.perf_counter(), prepare(CASES[name])
        found = kept.setdefault(name, {"bound": setup.bound, "errors": []})
        for seed in range(len(found["errors"]), options.configurations):
            found["errors"].append(one_configuration(CASES[name], setup, seed))
            if options.results:
                options.results.write_text(json.dumps(kept))
        if not CASES[name].tilt:
            found["of_pairs"] = found.get("of_pairs") or of_pairs(CASES[name])
            if options.results:
                options.results.write_text(json.dumps(kept))
        (depth, amplitude), (d_se, a_se) = summary(found)
        pairs = "{:7.3f} {:6.2f}".format(*found["of_pairs"] * np.array([1, 100])) if "of_pairs" in found else " " * 14
        print(f"{name:9s} {depth:7.3f} ± {d_se:.3f}   {100 * amplitude:9.2f} ± {100 * a_se:.2f}    {pairs}   {setup.bound:9.3f}   {len(found['errors']):9d}   {time.perf_counter() - start:.0f} s", flush=True)
    if options.figure:
        draw(kept, options.figure)


def summary(found: dict) -> tuple[np.ndarray, np.ndarray]:
    """Mean over configurations of depth [Å] and amplitude, and its standard error."""
    errors = np.array(found["errors"])
    return errors.mean(0), errors.std(0, ddof=1) / len(errors) ** 0.5


def draw(kept: dict, path: Path) -> None:
    """Errors against thickness for each zone axis, as they are and less the correction, and against tilt, with standard errors, beside half the bound."""
    import matplotlib.pyplot as plt

    kept = {name: found for name, found in kept.items() if len(found["errors"]) > 1}
    wide = 1 + any(CASES[name].tilt for name in kept)
    fig, axes = plt.subplots(2, wide, figsize=(4.5 * wide + 1, 6), sharex="col", squeeze=False, layout="constrained")
    groups = [(f"[{zone}]", colour, [n for n in CASES if n in kept and n.startswith(zone)]) for zone, colour in zip(ZONES, ("#0072B2", "#D55E00", "#009E73"), strict=True)]
    groups += [("tilted", "black", [n for n in CASES if n in kept and (n == "001-12" or n.startswith("tilt"))])] * (wide - 1)
    for label, colour, names in groups:
        if not names:
            continue
        side = int(label == "tilted")
        at = [CASES[n].tilt if side else CASES[n].n_atoms * ZONES[CASES[n].zone][2] for n in names]
        means, errors = np.array([summary(kept[n]) for n in names]).transpose(1, 2, 0)
        known = np.array([kept[n].get("of_pairs", (np.nan, np.nan)) for n in names]).T
        for ax, mean, error, pairs, scale in zip(axes[:, side], means, errors, known, (1, 100), strict=True):
            ax.errorbar(at, scale * mean, scale * error, fmt="o--", capsize=3, color=colour, mfc="white", label=label)
            if not side:
                ax.errorbar(at, scale * (mean - pairs), scale * error, fmt="s-", capsize=3, color=colour, label=f"{label}, corrected")
                ax.axhline(0, color="grey", lw=0.8)
        for sign in (-1, 1):
            axes[0, side].plot(at, [sign * kept[n]["bound"] / 2 for n in names], ":", color=colour)
    axes[0, 0].set(ylabel="error of the depth (Å)", title="dotted: half the bound at 9612 e/Å²")
    axes[1, 0].set(xlabel="thickness (Å)", ylabel="error of the intensity (%)")
    if wide > 1:
        axes[0, 1].set(title="12 atoms, [001]")
        axes[1, 1].set(xlabel="tilt (mrad)")
    axes[0, 0].legend()
    fig.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
