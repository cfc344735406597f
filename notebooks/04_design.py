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
# # Designing a focal series
#
# Which foci, and how much dose at each, tell most about the depth of a column? The Cramér-Rao bound is a differentiable function of all of them and of the
# angles, so its gradient leads to the best series of the same total dose. Then the promise is tested: columns are simulated under both
# series and fitted.

# %%
import os

import jax
import matplotlib.pyplot as plt
import numpy as np

import depthprob as dp
from depthprob.config import config_from_dict
from depthprob.plotting import plot_design_angles, plot_plan
from depthprob.reconstruction.planning import design_series

jax.config.update("jax_enable_x64", True)
SMALL = os.environ.get("DEPTHPROB_NOTEBOOKS") == "small"
n_atoms = 2 if SMALL else 10


def designed(**wishes):
    settings = {
        "focal_series": {"pixel_size_A": 0.3, "field_of_view_A": 8.0 if SMALL else 12.0, "defocus_step_A": 40.0 if SMALL else 10.0},
        "specimen": {"n_atoms": n_atoms},
        "design": {"spread_share": 0.0, "steps": 10 if SMALL else 60} | wishes,
    }
    return design_series(config_from_dict(settings))


# %% [markdown]
# ## Foci and dose
#
# Where the column's depth is known beforehand to 10 Å. The orange curves say what an electron per Å² is worth at each defocus: nothing in focus, where the
# image does not change with depth to first order, most on the flanks.

# %%
timing = designed(vary=["defocus", "dose"])
fig, ax = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
plot_plan(ax, timing)
print(f"the same precision with {100 / timing['gain_in_dose']:.0f} % of the dose; {len(timing['best']['defocus_A'])} foci: {np.round(timing['best']['defocus_A'])} Å")
print(f"no other split of the dose over foci in this range gains more than {100 * timing['further_gain_in_dose_at_most']:.2f} %")

# %% [markdown]
# The less is known of the depth beforehand, the wider the best foci spread, and the less there is to gain.

# %%
by_ignorance = {10.0: timing} | {d: designed(vary=["defocus", "dose"], depth_range_A=d) for d in (() if SMALL else (0.0, 30.0))}
for d, result in sorted(by_ignorance.items()):
    print(f"depth known to {d:4.0f} Å: gain in dose {result['gain_in_dose']:.2f}, bound {result['best']['depth_sd_A']:.3f} Å, foci {np.round(result['best']['defocus_A'])} Å")

# %% [markdown]
# ## The promise kept?
#
# Columns at random depths within 10 Å, simulated and fitted by maximum likelihood, under the given series and under the best one of the same total dose. The
# images come from the library, by way of plane waves or Hankel transforms; the design came from its own radial signals.

# %%
microscope = dp.Microscope(energy=300e3, convergence_angle=21.0, source_fwhm=0.7)
library = dp.build_library(dp.Column("Au", n_atoms, 4.08, 0.63), microscope, dp.AnnularDetector(48.0, 180.0), model="absorptive")
rng = np.random.default_rng(0)
depths = rng.choice([-10.0, 0.0, 10.0], 300 if SMALL else 3000)
along = (np.arange(27) - 13) * 0.3
spread = {}
for name in ("given", "best"):
    found = timing[name]
    series = dp.FocalSeries(found["defocus_A"], 0.3, found["dose_e_per_A2"], (27, 27))
    scale = (np.asarray(found["dose_e_per_A2"]) * 0.3**2)[:, None, None]
    images = {d: np.maximum(library.series(n_atoms, found["defocus_A"] - d, along, along), 0) * scale for d in np.unique(depths)}
    counts = rng.poisson(np.stack([images[d] for d in depths]) + 1e-4 * scale)
    errors = dp.fit_single_columns(counts, np.full(len(depths), n_atoms), library, series).depth - depths
    spread[name] = errors.std(), errors.std() / np.sqrt(2 * len(errors))
    print(f"{name:6s} series: errors' sd {spread[name][0]:.3f} ± {spread[name][1]:.3f} Å, bound promised {found['depth_sd_A']:.3f} Å")

# %% [markdown]
# ## Angles too
#
# A wider convergence angle shortens the depth of field, a detector that begins lower catches more electrons. A fifth of the dose stays on the given foci,
# for drift, counts and goodness of fit.

# %%
if not SMALL:
    everything = designed(spread_share=0.2, convergence_angle_range_mrad=[15.0, 30.0], detector_range_mrad=[35.0, 200.0])
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    plot_plan(axes[0], everything)
    plot_design_angles(axes[1], everything)
    best = everything["best"]
    print(f"gain in dose {everything['gain_in_dose']:.2f}: {best['convergence_angle_mrad']:.1f} mrad, detector {np.round(best['detector_edges_mrad'], 1)} mrad")

# %%
assert timing["gain_in_dose"] > 1.1
assert all(by_ignorance[near]["gain_in_dose"] >= by_ignorance[wide]["gain_in_dose"] for near, wide in zip(sorted(by_ignorance)[:-1], sorted(by_ignorance)[1:], strict=True))
for name in ("given", "best"):
    sd, error = spread[name]
    assert abs(sd / timing[name]["depth_sd_A"] - 1) < 0.03 + 3.5 * error / sd, name
if not SMALL:
    assert timing["further_gain_in_dose_at_most"] < 0.01
