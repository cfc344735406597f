# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How far can the forward model be trusted?
#
# Every depth that leaves this package is a comparison with simulated images. How large is the Monte-Carlo error of drawn thermal configurations, in ångström
# of depth, and do they converge to the closed form that libraries are made of? What does a model with a single inelastic event cost? What do aberrations and the choice of detector do? And may a particle be a sum of isolated columns?
#
# Gold along [001], 300 kV, 21 mrad, 48-180 mrad; positive defocus is underfocus, lengths in Å.

# %%
import os
from importlib import resources
from itertools import pairwise

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import depthprob as dp
from depthprob.physics.column_images import column_images
from depthprob.physics.frozen_phonon import CHEAP_ANGLE, CHEAP_CELL, thermal_draws
from depthprob.physics.gram import default_cell, default_reach, laguerre_gauss_modes, prepare_sweep, required_sampling, sweep_column
from depthprob.physics.particle import images_from_gram, particle_gram
from depthprob.physics.rings import ring_grams
from depthprob.physics.thermal import absorptive_gram

SMALL = os.environ.get("DEPTHPROB_NOTEBOOKS") == "small"
microscope = dp.Microscope(energy=300e3, convergence_angle=21.0, source_fwhm=0.7)
detector = dp.AnnularDetector(inner=48.0, outer=180.0)
aperture = 21e-3 / dp.wavelength(300e3)
B, SPACING, STEP = 0.63, 4.08, 4.0
foci = np.arange(-80.0, 81.0, 40.0)
with resources.as_file(resources.files("depthprob.data").joinpath("gram_Au_001.npz")) as path:
    closed = dp.load_gram(path)  # thermal motion averaged over all configurations at once


def depth_fit(reference, above, below):
    """Depth [Å] of series (..., focus, y, x) that differ little from the reference: a Poisson-weighted fit of depth and amplitude.

    `above` and `below` are the reference at foci STEP smaller and larger, which is the column moved down and up.
    """
    slope, weight = (above - below) / (2 * STEP), 1 / np.maximum(reference, 1e-3 * reference.max())
    inner = lambda a, b: (a * b * weight).sum((-3, -2, -1))
    across = slope - reference * inner(slope, reference) / inner(reference, reference)
    return lambda series: inner(across, series - reference) / inner(across, across)


# %% [markdown]
# ## Convergence, in ångström of depth
#
# One thermal configuration after the other through a whole column, in plane waves. Independent groups, each with random displacements or with scrambled
# Sobol points (the atoms nearest the detector vary first); images as they are, or averaged over the eight turns and mirrors of the square that the thermal mean
# has. The spread of the groups' mean depth is the error. Then all configurations together against the closed form: it has to lie within that error.

# %%
n_atoms = 2 if SMALL else 4
groups, most = (2, 2) if SMALL else (6, 8)
cell, sampling = 6.0, 0.0365
pixels = 26
z = (np.arange(n_atoms) - (n_atoms - 1) / 2) * SPACING


def series_of(atoms, side=cell, size=pixels, planes=None):
    """Focal series (focus, y, x) of displaced atoms at `planes`."""
    gram, waves = particle_gram(atoms, "Au", (side, side), microscope, detector, sampling)
    return images_from_gram(gram, waves, (side, side), microscope, np.concatenate([foci, foci - STEP, foci + STEP]) if planes is None else planes, (size, size))


def turned(series):
    """Mean over the symmetries of the square about pixel (0, 0)."""
    mirror = lambda s: np.roll(s[..., ::-1], 1, -1)
    for _ in range(2):
        series = (series + mirror(series)) / 2
        series = (series + series.swapaxes(-1, -2)) / 2
    return series


rms = float(np.sqrt(B / (8 * np.pi**2)))
draws = {
    "random": [rms * np.random.default_rng(100 + g).normal(size=(most, n_atoms, 2)) for g in range(groups)],
    "Sobol": [thermal_draws(n_atoms, B, most, g) for g in range(groups)],
}
column = lambda u: np.column_stack([u, z])
raw = {kind: np.array([[series_of(column(u)) for u in group] for group in drawn]) for kind, drawn in draws.items()}
mean = turned(sum(r.mean((0, 1)) for r in raw.values()) / 2)
fit = depth_fit(*np.split(mean, 3))
numbers = 2 ** np.arange(int(np.log2(most)) + 1)
spread = {}
for kind, r in raw.items():
    for name, images in ((f"{kind}, as it is", r), (f"{kind}, symmetrised", turned(r))):
        per_group = np.cumsum(images[:, :, : len(foci)], 1) / np.arange(1, most + 1)[:, None, None, None]
        bright = per_group[:, :, len(foci) // 2, 0, 0] / mean[len(foci) // 2, 0, 0]
        spread[name] = [(fit(per_group[:, m - 1]).std(ddof=1), bright[:, m - 1].std(ddof=1)) for m in numbers]

# %% [markdown]
# Turning and mirroring hardly changes a fitted depth, since a fit to a symmetric reference does not see what has no symmetry; it matters where derivatives by
# single atoms are compared (notebook 03). With so few configurations Sobol points are as good as random ones; their gain comes with the numbers that a library
# uses.
#
# Two levels: a coarse sweep on a small cell follows the same displacements. Its difference from an accurate sweep scatters much less than either, so a few
# differences correct many cheap sweeps.

# %%
model = dp.Column("Au", n_atoms, SPACING, B)
reach = default_reach(model, 21.0)
modes = laguerre_gauss_modes(reach, aperture)
levels = {}
for name, (s, c) in {"cheap": (required_sampling(300e3, CHEAP_ANGLE * 180.0), CHEAP_CELL), "accurate": (0.0342, 1.0)}.items():
    sweep = prepare_sweep(model, 300e3, aperture, detector, reach, sampling=s, cell=c * default_cell(model, 300e3, aperture, reach))
    run = jax.jit(lambda u, sweep=sweep: sweep_column(u, sweep, modes)[-1])
    levels[name] = np.array([run(jnp.asarray(draws["Sobol"][g][0], jnp.float32)) for g in range(groups)])
planes = np.concatenate([foci, foci - STEP, foci + STEP])
swept = {name: column_images(blocks, modes, microscope, planes, 10.0, 44) for name, blocks in levels.items()}
level_fit = depth_fit(*np.split(swept["accurate"].mean(0), 3))
depths = {name: level_fit(s[:, : len(foci)]) for name, s in swept.items()}
alone, difference = depths["accurate"].std(ddof=1), (depths["accurate"] - depths["cheap"]).std(ddof=1)
fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for (name, values), marker, colour in zip(spread.items(), "osos", ("#D55E00", "#D55E00", "#0072B2", "#0072B2"), strict=True):
    for ax, column_values in zip(axes, np.array(values).T, strict=True):
        ax.loglog(numbers, column_values, marker + ("-" if marker == "s" else ":"), color=colour, label=name)
axes[0].axhline(difference, color="black", lw=0.8, label="one two-level difference")
axes[0].set(xlabel="configurations", ylabel="error of the depth (Å)", title=f"{n_atoms} gold atoms")
axes[1].set(xlabel="configurations", ylabel="error of the on-axis intensity (fraction)")
for ax in axes:
    ax.set_xticks(numbers, map(str, numbers))
    ax.xaxis.set_minor_formatter("")
axes[0].legend(fontsize=7)
everything = mean[: len(foci)]
exact = column_images(closed.blocks[0, n_atoms - 1 : n_atoms].astype(complex), closed.modes, microscope, np.concatenate([foci, foci - STEP, foci + STEP]) + closed.centre_of_mass[n_atoms - 1], cell, pixels)[0]
off = float(depth_fit(*np.split(exact, 3))(everything))
error = min(values[-1][0] for values in spread.values()) / np.sqrt(2 * groups)  # of the mean of all groups of both kinds
print(f"all {2 * groups * most} configurations together fit the closed form at {off:.3f} ± {error:.3f} Å")
print("configurations" + " " * 14 + " ".join(f"{m:7d}" for m in numbers))
for name, values in spread.items():
    print(f"{name:22s} depth (Å) " + " ".join(f"{d:7.3f}" for d, _ in values) + "; intensity (%) " + " ".join(f"{100 * i:6.2f}" for _, i in values))
print(f"one symmetrised configuration scatters the depth by {alone:.3f} Å, accurate minus cheap by {difference:.3f} Å")

# %% [markdown]
# ## Thermal models
#
# The absorptive model lets an electron scatter diffusely once; the closed thermal average lets it go on. The first is exact for one atom and too bright for
# more: an electron that one atom throws to the detector may be brought back by the next.

# %%
still = absorptive_gram(dp.Column("Au", 2 if SMALL else 6, SPACING, B), 300e3, 21.0, detector)
ratios, moved = [], []
for n in range(1, still.n_max + 1):
    frozen = column_images(closed.blocks.mean(0)[n - 1 : n], closed.modes, microscope, planes + closed.centre_of_mass[n - 1], 10.0, 44)[0]
    quick = column_images(still.blocks[0, n - 1 : n], still.modes, microscope, planes + still.centre_of_mass[n - 1], 10.0, 44)[0]
    ratios.append(quick[len(foci) // 2, 0, 0] / frozen[len(foci) // 2, 0, 0] - 1)
    moved.append(float(depth_fit(*np.split(frozen, 3))(quick[: len(foci)])))
fig, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
axes[0].plot(range(1, still.n_max + 1), 100 * np.array(ratios), "o-", color="#0072B2")
axes[0].set(xlabel="atoms", ylabel="excess on axis, in focus (%)")
axes[1].plot(range(1, still.n_max + 1), moved, "o-", color="#D55E00")
axes[1].set(xlabel="atoms", ylabel="depth it would be fitted (Å)")
print("atoms          " + " ".join(f"{n:6d}" for n in range(1, still.n_max + 1)))
print("excess (%)     " + " ".join(f"{100 * r:6.2f}" for r in ratios))
print("depth (Å)      " + " ".join(f"{d:6.2f}" for d in moved))

# %% [markdown]
# ## Aberrations
#
# The same Gram matrix under other lenses. Twofold astigmatism makes a cross of over- and underfocus, coma a tail; both move the brightest focus or place.

# %%
n = 5
lenses = {
    "round": {},
    "C12 = 30 Å": {"C12_A": 30.0, "phi12_deg": 20.0},
    "C21 = 600 Å": {"C21_A": 600.0, "phi21_deg": 70.0},
    "C23 = 600 Å": {"C23_A": 600.0, "phi23_deg": 0.0},
}
side, size = 16.0, 80
fig, axes = plt.subplots(2, len(lenses), figsize=(11, 4.6), sharex=True, sharey=True, layout="constrained")
totals = {}
for (name, aberrations), pair in zip(lenses.items(), axes.T, strict=True):
    lens = dp.Microscope(300e3, 21.0, 0.7, aberrations=aberrations)
    shown = np.array([0.0, 60.0]) + closed.centre_of_mass[n - 1]
    images = column_images(closed.blocks.mean(0)[n - 1 : n], closed.modes, lens, shown, side, size)[0]
    totals[name] = images.sum((-1, -2)) * (side / size) ** 2
    for ax, image, focus in zip(pair, images, (0, 60), strict=True):
        ax.imshow(np.fft.fftshift(image), extent=(-side / 2, side / 2, side / 2, -side / 2), cmap="cividis", vmin=0)
        ax.set(title=f"{name}, focus {focus} Å", xlabel="x (Å)", ylabel="y (Å)", xlim=(-4, 4), ylim=(4, -4))
        ax.title.set_fontsize(9)
        ax.label_outer()
        fig.colorbar(ax.images[0], ax=ax, shrink=0.7, label="fraction of the beam" if ax in axes[:, -1] else "")
print("integral over the image (Å²): " + "; ".join(f"{name} {t[0]:.3f}, {t[1]:.3f}" for name, t in totals.items()))

# %% [markdown]
# The integral hardly knows the lens: a lens only moves the beam about. What little it does know is channelling.
#
# ## Detectors
#
# One sweep gives any set of rings, and signals of rings add. The inner rings are brighter, and their light comes from a wider neighbourhood of the column.

# %%
edges = (48.0, 80.0, 120.0, 180.0)
n = 2 if SMALL else 4
model = dp.Column("Au", n, SPACING, B)
rings, ring_modes = ring_grams(model, 300e3, aperture, edges)
whole, _ = ring_grams(model, 300e3, aperture, (48.0, 180.0))
profiles = column_images(np.concatenate([rings, whole])[:, -1], ring_modes, microscope, np.arange(-100.0, 101.0, 10.0), 10.0, 44)
fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
names = [f"{a:g}-{b:g} mrad" for a, b in pairwise(edges)] + ["48-180 mrad"]
for name, p, colour in zip(names, profiles, ("#0072B2", "#D55E00", "#009E73", "black"), strict=True):
    axes[0].plot(np.arange(-100.0, 101.0, 10.0), p[:, 0, 0], color=colour, label=name)
    axes[1].plot(np.arange(22) * 10 / 44, p[10, 0, :22] / p[10, 0, 0], color=colour)
axes[0].set(xlabel="defocus (Å)", ylabel="fraction of the beam, on axis")
axes[1].set(xlabel="x (Å)", ylabel="in focus, normalised")
axes[0].legend(fontsize=7)
shares = profiles[:3, 10, 0, 0] / profiles[3, 10, 0, 0]
print("shares of the in-focus signal: " + ", ".join(f"{name} {share:.3f}" for name, share in zip(names, shares, strict=False)))

# %% [markdown]
# ## Superposition of columns
#
# A small piece of gold, its columns 2.04 Å apart along each axis in a square, once whole and once as the sum of its columns one by one, with the same
# displacements: what differs is the beam that one column's atoms scatter through its neighbours, not the draw. Depths from a joint fit of all columns' depths
# and amplitudes.

# %%
side, size = (8.16 if SMALL else 10.2), 44
middle = side / 2
places = middle + 2.04 * np.array([[0, 0], [1, 1], [-1, 1], [1, -1], [-1, -1]])
tall = 1 if SMALL else 4
configurations = 1
rng = np.random.default_rng(3)
columns = [np.column_stack([np.tile(p, (tall, 1)), (np.arange(tall) - (tall - 1) / 2) * SPACING + (SPACING / 2) * (i > 0)]) for i, p in enumerate(places)]
wide = np.arange(-200.0, 201.0, 100.0)  # far out of focus the beam crosses the neighbours
full, parts = 0.0, 0.0
for _ in range(configurations):
    displaced = [c + np.column_stack([rms * rng.normal(size=(tall, 2)), np.zeros(tall)]) for c in columns]
    full = full + series_of(np.concatenate(displaced), side, size, wide) / configurations
    parts = parts + np.array([series_of(c, side, size, np.concatenate([wide, wide - STEP, wide + STEP])) for c in displaced]) / configurations
series, above, below = np.split(parts, 3, axis=1)
summed = series.sum(0)
weight = 1 / np.sqrt(np.maximum(summed, 1e-3 * summed.max())).ravel()
design = np.concatenate([(above - below) / (2 * STEP), series]).reshape(2 * len(places), -1).T * weight[:, None]
errors = np.linalg.lstsq(design, (full - summed).ravel() * weight, rcond=None)[0]
relative = np.sqrt(np.mean((full - summed) ** 2)) / np.sqrt(np.mean(full**2))
depth_errors, amplitudes = errors[: len(places)], errors[len(places) :]
fig, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
for ax, image, name in zip(axes, (full[0], summed[0], (full - summed)[0]), ("whole", "sum of columns", "difference"), strict=True):
    limit = abs(image).max() if name == "difference" else None  # white is none
    drawn = ax.imshow(image, extent=(0, side, side, 0), cmap="PuOr" if limit else "cividis", vmin=-limit if limit else None, vmax=limit)
    fig.colorbar(drawn, ax=ax, label="fraction of the beam")
    ax.set(title=f"{name}, focus {wide[0]:g} Å", xlabel="x (Å)", ylabel="y (Å)")
by_focus = np.sqrt(((full - summed) ** 2).mean((1, 2)) / (full**2).mean((1, 2)))
print("rms difference by focus (%): " + ", ".join(f"{f:g} Å {100 * b:.2f}" for f, b in zip(wide, by_focus, strict=True)))
print(f"{len(places)} columns of {tall} atoms, {configurations} configuration: intensity differs by {100 * relative:.2f} % rms")
print("fitted depths are off by (Å): " + " ".join(f"{d:.3f}" for d in depth_errors) + f"; rms {np.sqrt(np.mean(depth_errors**2)):.3f}")
print("amplitudes by (%): " + " ".join(f"{100 * a:.2f}" for a in amplitudes))

# %%
if not SMALL:
    last = {name: values[-1][0] for name, values in spread.items()}
    assert max(last.values()) < 0.5
    assert abs(last["Sobol, symmetrised"] / last["Sobol, as it is"] - 1) < 0.05  # symmetry is not what a depth lacks
    assert difference < 0.5 * alone  # the control variate works
    assert abs(off) < 4 * error + 0.05  # periodic images of the column are in these, 0.05 Å
    assert max(ratios) < 0.15
assert abs(ratios[0]) < 0.01  # exact for one atom
np.testing.assert_allclose(profiles[:3].sum(0), profiles[3], rtol=1e-3, atol=1e-6)
assert all(abs(t / totals["round"] - 1).max() < 0.03 for t in totals.values())
assert relative < 0.05
