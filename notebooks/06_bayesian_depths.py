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
# # Bayesian depths, and whether their error bars are true
#
# All column depths of a field at once, with lateral positions, gain, background and image shifts unknown. First one posterior, by Laplace's method and by
# NUTS; then many simulated fields, to see whether intervals of 90 % contain the truth nine times in ten, and whether the same check catches a model that
# is too sure of itself. The fields are drawn from the model itself, as such calibration wants; it tests the inference, not the physics.

# %%
import dataclasses
import os
from importlib import resources

import arviz as az
import jax
import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import binom

import depthprob as dp

jax.config.update("jax_enable_x64", True)
SMALL = os.environ.get("DEPTHPROB_NOTEBOOKS") == "small"
data = resources.files("depthprob.data")
name = next(f.name for f in data.iterdir() if f.name.startswith("library_"))
with resources.as_file(data / name) as path:
    library = dp.ColumnLibrary.load(path)
defocus = np.arange(-160.0, 161.0, 40.0 if SMALL else 20.0)
images = len(defocus)
series = dp.FocalSeries(defocus, 0.4, np.full(images, 9612.0), (28, 28))
free = ("positions", "background", "gain", "image_shifts")


def random_field(rng):
    """Nine columns of FCC gold along [001], all that is unknown drawn at random."""
    i, j = np.meshgrid(np.arange(5), np.arange(5))
    chosen = ((i + j) % 2 == 0) & (abs(i - 2) + abs(j - 2) <= 2)
    positions = np.stack([2.04 * i[chosen], 2.04 * j[chosen]], 1) + 1.3 + rng.normal(0, 0.05, (chosen.sum(), 2))
    n = rng.integers(3, 12, len(positions))
    shifts = rng.normal(0, 0.2, (images, 2))
    return dp.Field(positions, n, rng.normal(0, 8, len(n)), np.full(images, 1e-3), rng.normal(1, 0.02, images), shifts - shifts.mean(0))


def problem_of(field, rng):
    counts = rng.poisson(np.maximum(np.asarray(dp.expected_counts(field, library, series), float), 0))
    start = dataclasses.replace(field, depths=0 * field.depths, gain=np.ones(images))
    return dp.make_problem(counts, start, library, series, free)


# %% [markdown]
# ## One field, two posteriors
#
# The Laplace posterior is a normal at the mode; NUTS samples without that assumption. They differ by little here, which is worth knowing: Laplace costs
# next to nothing.

# %%
rng = np.random.default_rng(3)
field = random_field(rng)
problem = problem_of(field, rng)
samples = 100 if SMALL else 500
laplace = dp.infer(problem, "laplace", jax.random.key(0), samples, 2, progress_bar=False)
nuts = dp.infer(problem, "nuts", jax.random.key(1), samples, 2, estimate=laplace.estimate, progress_bar=False)
print(f"NUTS: {nuts.diagnostics['divergences']} divergences, largest R-hat {nuts.diagnostics['r_hat_max']:.3f}, least effective samples {nuts.diagnostics['ess_min']:.0f}")
tree = dp.to_arviz(nuts, problem)
print(az.summary(tree, var_names=["depth"]).iloc[:, :4])

# %%
fig, ax = plt.subplots(figsize=(6.5, 3), layout="constrained")
for posterior, colour, shift, label in ((laplace, "#0072B2", -0.1, "Laplace"), (nuts, "#D55E00", 0.1, "NUTS")):
    draws = posterior.of("depth").reshape(-1, len(field.depths))
    low, middle, high = np.quantile(draws, [0.05, 0.5, 0.95], axis=0)
    ax.errorbar(np.arange(len(middle)) + shift, middle - field.depths, [middle - low, high - middle], fmt="o", color=colour, label=f"{label}, 90 %")
ax.axhline(0, color="black", lw=0.8)
ax.set(xlabel="column", ylabel="depth minus truth (Å)")
ax.legend();

# %% [markdown]
# ## Are the error bars true?
#
# Each new field gives every depth's rank among its posterior's draws. If the posterior is right, ranks are uniform (Talts et al., 2018). Beside it
# the same with a mistake from practice, a detector gain of 3 forgotten, so that three raw units pass for three electrons: a model too sure of itself.

# %%
fields = 12 if SMALL else 150
ranks = {"all unknown": [], "gain of 3 forgotten": []}
for k in range(fields):
    rng = np.random.default_rng(1000 + k)
    field = random_field(rng)
    right = problem_of(field, rng)
    wrong = dp.make_problem(3 * right.counts, dataclasses.replace(field, depths=0 * field.depths), library, dataclasses.replace(series, dose=3 * series.dose), free)
    for name, problem in zip(ranks, (right, wrong), strict=True):
        draws = dp.infer(problem, "laplace", jax.random.key(k), 199, 1, progress_bar=False).of("depth")[0]
        ranks[name].append((draws < field.depths).sum(0))
ranks = {name: np.concatenate(r) for name, r in ranks.items()}

# %%
fig, axes = plt.subplots(1, 2, figsize=(7, 2.8), sharey=True, layout="constrained")
bins = 10
for ax, (name, r) in zip(axes, ranks.items(), strict=True):
    ax.hist(r, bins=np.linspace(0, 200, bins + 1), color="#0072B2", edgecolor="white")
    low, high = binom.ppf([0.005, 0.995], len(r), 1 / bins)
    ax.axhspan(low, high, color="#E69F00", alpha=0.4, label="99 % of uniform")
    ax.set(xlabel="rank of the true depth among 199 draws", title=name)
axes[0].set_ylabel(f"columns of {len(r)}")
axes[0].legend();

# %%
covered = {}
for name, r in ranks.items():
    covered[name] = {level: np.mean(abs((r + 0.5) / 200 - 0.5) < level / 2) for level in (0.5, 0.8, 0.9, 0.95)}
    print(f"{name:28s}", "  ".join(f"{level:.0%} interval covers {share:.3f}" for level, share in covered[name].items()))

# %% [markdown]
# ## The same check for every method
#
# `dp.calibrate` draws truths from the problem's own prior, which is what simulation-based calibration asks for, and ranks every parameter; `dp.uniformity` is the
# probability of ranks so uneven if the posterior is right. Four overlapping columns of a periodic crystal, 40 unknowns, so that NUTS takes a second.

# %%
few = np.linspace(-150, 150, 7)
small_series = dp.FocalSeries(few, 0.34, np.full(7, 9612.0), (24, 12), True)
four = np.array([[0.0, 0.0], [2.04, 2.04], [0.0, 4.08], [2.04, 6.12]]) + 0.7
centre = dp.Field(four, np.array([4, 7, 5, 9]), np.zeros(4), np.full(7, 2e-3), np.ones(7), np.zeros((7, 2)))
prior_sd = {"depth": 8.0, "x": 0.1, "y": 0.1, "log_gain": 0.03, "log_background": 0.3, "shift_x": 0.2, "shift_y": 0.2}
prior = dp.make_problem(np.zeros((7, 24, 12)), centre, library, small_series, free, prior_sd=prior_sd)


def forget_gain(problem):
    forgotten = dataclasses.replace(small_series, dose=3 * small_series.dose)
    return dataclasses.replace(problem, counts=3 * problem.counts, series=forgotten)


fits, draws = (8, 29) if SMALL else (100, 99)
checks = {method: dp.calibrate(prior, method, jax.random.key(11), fits, draws) for method in ("laplace", "svi", "nuts")}
checks["nuts, gain of 3 forgotten"] = dp.calibrate(prior, "nuts", jax.random.key(12), fits, draws, mistake=forget_gain)

# %%
fig, axes = plt.subplots(1, 4, figsize=(11, 2.6), sharey=True, layout="constrained")
for ax, (name, check) in zip(axes, checks.items(), strict=True):
    dp.plot_ranks(ax, check.ranks["depth"], check.draws, f"{name}: p = {dp.uniformity(check.places['depth']):.2g}")
    shares = "  ".join(f"{level:.0%} interval covers {check.coverage('depth', level)[0]:.3f}" for level in (0.5, 0.8, 0.95))
    print(f"{name:28s} depth: {shares}; least p of any parameter {min(dp.uniformity(p) for p in check.places.values()):.2g}")

# %%
for method in ("laplace", "svi", "nuts"):
    assert min(dp.uniformity(places) for places in checks[method].places.values()) > 1e-4  # seven parameters each: one alarm in 1400
if not SMALL:  # eight fits are too few to tell
    assert dp.uniformity(checks["nuts, gain of 3 forgotten"].places["depth"]) < 1e-4
for level, share in covered["all unknown"].items():
    margin = 3.5 * np.sqrt(level * (1 - level) / len(r))
    assert abs(share - level) < margin, (level, share)
assert covered["gain of 3 forgotten"][0.9] < 0.9 - 3.5 * np.sqrt(0.09 / len(r))  # the over-confident model is caught
assert nuts.diagnostics["divergences"] == 0
