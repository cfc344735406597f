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
# # The tip of a gold nanorod
#
# The experiment of Alania et al. (2017), section 3.2, told again with a rod whose every atom is known: a focal series of the rounded tip of a gold nanorod, its
# axis across the beam, taken to atoms as the paper takes it, and held against tomography, against an image along <110>, and here also against the truth.
#
# The series is full frozen-phonon multislice of the whole rod at the paper's settings (300 kV, 21 mrad, 48-180 mrad, 41 foci 10 Å apart, B = 0.63 Å²),
# never a sum of columns. It is packaged; `python -m depthprob.data.make_nanorod FOLDER` makes it again. Lengths are in Å; the beam runs along +z, a cube
# axis, and the rod lies along x, a cube axis too, so that a turn by 45° about it brings a <110> direction into the beam.

# %%
from importlib import resources
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from scipy.cluster.hierarchy import fclusterdata

import depthprob as dp
from depthprob import plotting
from depthprob.config import config_from_dict
from depthprob.data import make_nanorod as rod
from depthprob.inference.gaussian_peak import disc_radius
from depthprob.reconstruction import tomography
from depthprob.reconstruction.drift import shift_images
from depthprob.reconstruction.lattice import snap
from depthprob.reconstruction.libraries import column_geometry
from depthprob.stack import Stack

jax.config.update("jax_enable_x64", True)
with resources.as_file(resources.files("depthprob.data")) as folder:
    halves, atoms = rod.load(Path(folder) / "nanorod.npz")
    library = dp.ColumnLibrary.load(next(Path(folder).glob("library_*")))
truth = rod.columns_of(atoms)  # x, y, number of atoms, depth
print(f"{len(atoms)} atoms in {len(truth)} columns of {truth[:, 2].min():.0f} to {truth[:, 2].max():.0f}; {np.ptp(atoms[:, 0]):.1f} Å long, {np.ptp(atoms[:, 1]):.1f} Å wide")

# %% [markdown]
# ## How large, and what the paper's width would cost
#
# The rod is 18 Å across where the paper's is 175 Å. One thermal configuration carries every plane wave of the aperture through every plane of atoms: the number of waves
# and the grid of each grow with the cell's area, the planes with the thickness. The eight configurations here took 18 minutes of one core.

# %%
microscope = dp.Microscope(energy=300e3, convergence_angle=21.0, source_fwhm=0.7)
detector = dp.AnnularDetector(inner=48.0, outer=180.0)
wider = 175 / (2 * rod.RADIUS)
days = 18 / 8 * wider ** (2 + 2 + 1) / 60 / 24
print(f"{wider:.1f} times as wide, thick and long: about {days:.0f} days of one core for each configuration")

# %% [markdown]
# ## The series: drift and noise
#
# The images carry nothing finer than 0.47 Å, so the paper's 51 pm pixels would hold no more than these of 0.204 Å at the same dose per area, and cost the fit
# sixteen times as much. The rod drifts at random, and 9612 e/Å² per image make Poisson counts.

# %%
pixel = rod.PIXEL
defocus = rod.DEFOCUS
rng = np.random.default_rng(2017)
drift = np.cumsum(rng.normal(0, 0.1, (len(defocus), 2)), 0)  # Å
drift -= drift.mean(0)
expected = shift_images(halves.mean(0), drift / pixel, periodic=True)
shape = expected.shape[1:]
counts = rng.poisson(np.maximum(expected, 0) * 9612.0 * pixel**2).astype(float)
print(f"{counts.shape} pixels, {counts.mean():.2f} electrons in the mean pixel, drift of {np.ptp(drift, 0).max():.1f} Å")

# %% [markdown]
# ## Drift, columns, counts, depths, atoms
#
# The five steps of the paper's section 3.1 in one call: drift by iterative phase correlation; columns and atom counts from the average of the eight central
# images; depths by the Gaussian peak with its correction from simulation, as the paper does, and beside it jointly by the likelihood of all pixels; and atoms
# relaxed to planes of the crystal.

# %%
config = config_from_dict({"focal_series": {"defocus_A": defocus.tolist(), "pixel_size_A": pixel, "periodic": True}, "inference": {"method": "laplace"}})
found = dp.reconstruct(Stack(counts, defocus, pixel), config, library, quiet=True)
print(*found.warnings, sep="\n")

# %% [markdown]
# ### How right is it?

# %%
distance = np.hypot(*(found.positions[:, None] - truth[None, :, :2]).transpose(2, 0, 1))
matched = distance.argmin(1)
assert len(set(matched)) == len(matched) == len(truth), "not the rod's columns, each once"
assert distance.min(1).max() < 0.8
true_depth, right = truth[matched, 3], found.n_atoms == truth[matched, 2]
bound = np.sqrt(np.mean(found.crlb[right] ** 2))


def errors(depth):
    """Depth errors of columns of the right count, after their median, for a common shift is gauge; nan where a fit failed."""
    error = (depth - true_depth)[right]
    return error - np.nanmedian(error)


rms = lambda x: float(np.sqrt(np.nanmean(np.square(x))))
score = {name: errors(depth) for name, depth in (("joint fit", found.depth), ("Gaussian peak", found.gaussian_depth))}
print(f"columns found: {len(found.depth)} of {len(truth)}; counts right: {right.sum()}; rms of the bounds {bound:.2f} Å")
for name, error in score.items():
    print(f"{name:14s} error {rms(error):.2f} Å rms, {rms(error) / bound:.2f} times the bound, {np.mean(abs(error) < rod.LATTICE / 2):.0%} on the right lattice plane, {np.sum(np.isnan(error))} failed")
off = np.median((found.depth - true_depth)[right])
covered = np.mean((found.depth_q05 - off < true_depth)[right] & (found.depth_q95 - off > true_depth)[right])
drift_error = rms(np.hypot(*(found.drift_px * pixel - drift).T))
print(f"90 % intervals of the joint fit cover {covered:.2f}; drift error {drift_error:.3f} Å rms")

# %% [markdown]
# Two halves of the thermal configurations, fitted without noise, would differ in depth as well: the truth itself is only known so well from so few. That part
# of the error is in no error bar.

# %%
fig, ax = plt.subplots(figsize=(10, 3.2), layout="constrained")
plotting.plot_estimates(ax, found.depth, found.depth_sd, found.gaussian_depth, found.gaussian_depth_sd, true_depth)

# %% [markdown]
# ## Figure 3: the corrected stack, and one column through focus
#
# The images far from focus, like the one on top, resolve no columns. The marked column is followed through the stack on the right: crosses are its mean
# intensity with one standard deviation of its counts, the dashed Gaussian gives the paper's estimate, the line is the joint fit, which also knows the neighbours' light.

# %%
corrected = shift_images(counts, -found.drift_px, periodic=True)
column = int(np.argmin(np.hypot(*(found.positions - [12.24, 10.2]).T)))
measured = found.column_series[column]
noise = np.sqrt(measured / (np.asarray(found.dose) * np.pi * disc_radius(found.positions) ** 2))  # of Poisson counts in the disc that it is the mean of
fig, (left, right_ax) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
plotting.plot_stack_volume(left, corrected, defocus, pixel, found.positions[column])
plotting.plot_column_series(
    right_ax, defocus, measured, found.gaussian_fit_series[column], found.joint_fit_series[column],
    f"{found.n_atoms[column]} atoms at {found.depth[column]:.2f} ± {found.depth_sd[column]:.2f} Å, in truth {true_depth[column]:.2f} Å", noise,
)

# %% [markdown]
# ## Figure 4: average of the eight central images, and the map of counts
#
# Columns whose count is less than 95 % sure would be ringed.

# %%
fig, (left, right_ax) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
plotting.plot_image(left, found.average_image, pixel)
fig.colorbar(left.images[0], ax=left, label="fraction of the beam")
drawn = plotting.plot_count_map(right_ax, found.positions, found.n_atoms, found.n_probability[np.arange(len(found.n_atoms)), found.n_atoms - 1])
fig.colorbar(drawn, ax=right_ax, label="atoms in the column", ticks=np.unique(found.n_atoms));

# %% [markdown]
# ## Tomography beside it
#
# The rod is put into another holder, turned by 25° about the beam and displaced, and projected from -74° to 74° by 2° at a resolution of 6 Å (the paper's nanometre
# would blur a rod as thin as this to a ball), 1.5 Å pixels, 2 % noise. SIRT restores a volume; the model of depth sectioning is laid on it.

# %%
voxel, resolution, bulk = 1.5, 6.0, 4 / rod.LATTICE**3
size = round(48 / voxel)
middle = np.append((np.array(counts.shape[:0:-1]) - 1) / 2 * pixel, rod.AXIS[1])
holder = tomography.Alignment(25.0, np.array([2.0, -3.0, 1.5]), 1.0, 1.0)
tilt_series = tomography.project(holder(atoms - middle), tomography.TILTS, (size, size), voxel, resolution)
tilt_series += rng.normal(0, 0.02 * tilt_series.max(), tilt_series.shape)
tomogram = tomography.sirt(tilt_series, tomography.TILTS, voxel, 100)
model = found.atoms - middle
laid = tomography.align(tomogram, model, voxel, resolution)
print(f"the model lies turned by {laid.rotation:.1f}°, shifted by {laid.shift.round(1)} Å; densities correlate to {laid.correlation:.3f}")

# %%
volume = laid.in_model_frame(tomogram, voxel)
solid, of_model, of_truth = (v > bulk / 2 for v in (volume, *(tomography.model_density(a, volume.shape, voxel, resolution) for a in (model, atoms - middle))))
shared, distance_of = {}, {}
for name, other in (("tomogram and model", solid), ("truth and model", of_truth)):
    shared[name] = tomography.overlap(other, of_model)
    distance_of[name] = tomography.surface_distance(of_model, other, voxel)[1]
    print(f"{name}: Dice {shared[name].dice:.3f}, Jaccard {shared[name].jaccard:.3f}; surfaces apart by {distance_of[name].mean():+.2f} Å in the mean, {rms(distance_of[name]):.2f} Å rms")

# %% [markdown]
# ## The independent image along <110>
#
# The paper also took one image along <110>, 45° about the rod's axis from the series: there depth becomes a place in the image. Here it is simulated from the true atoms and from
# the reconstructed, columns along <110> superposed, in focus at the rod's middle, and the two are compared; for the paper's estimator as well.

# %%
spacing = rod.LATTICE / np.sqrt(2)
library_110 = dp.build_library(dp.Column("Au", n_atoms=8, spacing=spacing, debye_waller_b=0.63), microscope, detector)


def image_along_110(atoms):
    """Image of atoms about the middle, turned by 45° about x: every straight row of neighbours is a column."""
    x, y, z = atoms.T
    x, y, z = x + middle[0], (y - z) / np.sqrt(2) + middle[1], (y + z) / np.sqrt(2)
    rows = fclusterdata(np.stack([x, y], 1), 0.5, "distance", method="single")
    columns = []
    for row in np.unique(rows):
        member = np.flatnonzero(rows == row)
        member = member[np.argsort(z[member])]
        for part in np.split(member, np.flatnonzero(np.diff(z[member]) > 1.5 * spacing) + 1):
            columns.append((x[part].mean(), y[part].mean(), len(part), z[part].mean()))
    x, y, n, depth = np.array(columns).T
    one = np.zeros(1)
    field = dp.Field(np.stack([x, y], 1), n.astype(int), depth, one, one + 1, np.zeros((1, 2)))
    return np.asarray(dp.expected_counts(field, library_110, dp.FocalSeries(one, pixel, one + 1 / pixel**2, shape, True)))[0]


by_gauss = snap(found.positions, found.gaussian_depth, found.gaussian_depth_sd, found.n_atoms, column_geometry(config)).atoms - middle
by_gauss = by_gauss[np.isfinite(by_gauss).all(1)]  # none of a column whose peak was not found
images = {"truth": image_along_110(atoms - middle), "joint fit": image_along_110(model), "Gaussian peak": image_along_110(by_gauss)}
alike = {}
for name in ("joint fit", "Gaussian peak"):
    alike[name] = np.corrcoef(images["truth"].ravel(), images[name].ravel())[0, 1], rms(images[name] - images["truth"]) / images["truth"].max()
    print(f"<110> image, {name} against truth: correlation {alike[name][0]:.4f}, rms difference {alike[name][1]:.2%} of the peak")

# %% [markdown]
# ## Figure 5: tomogram, image, depth sectioning; along the beam, and along <110>
#
# The image along <110> is that of the true rod. Bars on atoms are one standard deviation across the tilt axis; the line is the tomogram's outline at half the crystal's density.

# %%
fig, axes = plt.subplots(2, 3, figsize=(11, 7), layout="constrained")
plotting.plot_views(axes, volume, voxel, bulk / 2, (found.average_image, images["truth"]), pixel, model, found.atom_sd)

# %% [markdown]
# As in the paper, the rod's shape comes back, seen from a side that no image of the series shows. All atoms are counted right; the joint fit comes within a tenth of its
# bound, where the paper's estimator is nearly twice above it, finds no peak for four columns and puts every fifth on a wrong plane or none. The image along <110> of the joint fit's atoms is nearly
# the true one; that of the Gaussian peaks' atoms is not.

# %%
assert len(found.depth) == len(truth) and laid.correlation > 0.98 and abs(laid.rotation - 25.0) < 1.0
assert right.all()
assert rms(score["joint fit"]) < 1.15 * bound and rms(score["Gaussian peak"]) > 1.7 * bound
assert np.mean(abs(score["joint fit"]) < rod.LATTICE / 2) >= 0.97 and np.mean(abs(score["Gaussian peak"]) < rod.LATTICE / 2) < 0.85
assert 0.8 < covered < 0.97 and drift_error < 0.03
assert alike["joint fit"][0] > 0.98 > 0.9 > alike["Gaussian peak"][0]
assert shared["tomogram and model"].dice > 0.95
