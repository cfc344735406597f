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
# # The focal series of one column
#
# How does a column of gold atoms look as the focus moves through it, and what of that tells its depth?
#
# Conventions: the beam runs along +z; defocus f is positive for underfocus, and the probe then crosses over in the plane z = +f; the depth
# of a column is the mean z of its atoms. Lengths are in Å.

# %%
from importlib import resources

import matplotlib.pyplot as plt
import numpy as np

import depthprob as dp

data = resources.files("depthprob.data")
name = next(f.name for f in data.iterdir() if f.name.startswith("library_"))
with resources.as_file(data / name) as path:
    library = dp.ColumnLibrary.load(path)
defocus = np.arange(-200.0, 201.0, 10.0)
x = np.linspace(-5, 5, 101)
series = library.series(10, defocus, x, np.zeros(1))[:, 0]  # (defocus, x) through the column's axis

# %% [markdown]
# ## A depth profile
#
# The depth of field is nanometres (wavelength / angle² = 45 Å at 300 kV and 21 mrad), so the ten atoms, 37 Å from top to bottom, blur into one streak.

# %%
fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
drawn = ax.imshow(series, extent=(x[0], x[-1], defocus[-1], defocus[0]), aspect="auto", cmap="cividis")
fig.colorbar(drawn, label="fraction of the beam on the detector")
ax.set(xlabel="x (Å)", ylabel="defocus (Å)", title="ten gold atoms, 48-180 mrad");

# %% [markdown]
# ## The peak is not the centre
#
# The column's centre of mass lies at z = 0, but channelling makes the upper atoms shine brighter, so the peak through focus lies elsewhere, by an amount that
# depends on the number of atoms. The classical method needs this curve from simulation; a likelihood has it built in.

# %%
fine = np.arange(-60.0, 60.5, 0.5)
peaks = np.array([fine[np.argmax(library.series(n, fine, np.zeros(1), np.zeros(1))[:, 0, 0])] for n in range(1, 13)])
fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
ax.plot(range(1, 13), peaks, "o-", color="#0072B2")
ax.axhline(0, color="black", lw=0.8)
ax.set(xlabel="atoms in the column", ylabel="on-axis peak (Å)");

# %% [markdown]
# ## How well can the depth be known?
#
# Each pixel's count is Poisson. A shift in depth by d changes the expected counts λ by (dλ/dd) d, and the Fisher information is Σ (dλ/dd)² / λ; no
# unbiased estimator does better than one over its root (the Cramér-Rao bound).

# %%
pixel, dose = 0.2, 9612.0
grid = np.arange(-6, 6.01, pixel)


def bound(n, step=1.0):
    rate = library.series(n, defocus, grid, grid) * dose * pixel**2
    slope = (library.series(n, defocus - step, grid, grid) - library.series(n, defocus + step, grid, grid)) * dose * pixel**2 / (2 * step)
    return 1 / np.sqrt(np.sum(slope**2 / np.maximum(rate, 1e-9)))


atoms = np.arange(1, 13)
bounds = np.array([bound(n) for n in atoms])
fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
ax.errorbar(atoms, bounds, library.depth_error, fmt="o-", color="#D55E00")
ax.set(xlabel="atoms in the column", ylabel="bound on depth, sd (Å)", ylim=(0, None));

# %% [markdown]
# The bars are the library's own Monte-Carlo error in depth. The bound is well under an ångström, and falls as atoms are added: this is what depth
# sectioning with atom counting lives on.

# %%
assert bounds[-1] < bounds[0] < 1.0
assert abs(peaks[9]) > 1.0
print(f"bound for one atom {bounds[0]:.2f} Å, for twelve {bounds[-1]:.2f} Å; peak of ten atoms at {peaks[9]:.1f} Å")
