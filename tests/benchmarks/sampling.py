"""Effective samples per second of the preconditioned NUTS against a plain NumPyro model of the same posterior.

    python tests/benchmarks/sampling.py [columns [images [samples]]]

A periodic crystal of a multiple of four columns (default 4, 15 images, 300 samples of one chain), all parameters free. Both start at the mode and
read the same likelihood. The plain model samples the parameters themselves, with NumPyro's own adaptation of step and diagonal mass matrix in
500 draws of warm-up and trees of depth up to 10; its image shifts sum to zero exactly. Seconds include warm-up and, for the preconditioned one,
the mode and its Fisher matrix; compilation of either is left out. Prints one JSON object.
"""

import dataclasses
import json
import sys
import time
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS, init_to_value

jax.config.update("jax_enable_x64", True)

from depthprob.inference.likelihood import log_likelihood, maximum  # noqa: E402
from depthprob.inference.posterior import infer  # noqa: E402
from depthprob.inference.problem import BACKGROUND_SHAPE, PRIOR_SD, Problem, make_problem  # noqa: E402
from depthprob.physics.focal_series import Field, FocalSeries, expected_counts  # noqa: E402
from depthprob.physics.library import ColumnLibrary  # noqa: E402


def problem_of(columns: int, images: int) -> Problem:
    name = next(f for f in resources.files("depthprob.data").iterdir() if f.name.startswith("library_"))
    with resources.as_file(name) as path:
        library = ColumnLibrary.load(path)
    rng = np.random.default_rng(0)
    cells = columns // 4
    positions = np.concatenate([[[0, 4.08 * 2 * c], [2.04, 4.08 * 2 * c + 2.04], [0, 4.08 * 2 * c + 4.08], [2.04, 4.08 * 2 * c + 6.12]] for c in range(cells)]) + 0.7
    series = FocalSeries(np.linspace(-150, 150, images), 0.34, np.full(images, 9612.0), (24 * cells, 12), True)
    nothing = np.zeros((images, 2))
    field = Field(positions, rng.integers(3, 12, columns), rng.normal(0, 8, columns), np.full(images, 2e-3), np.ones(images), nothing)
    counts = rng.poisson(np.maximum(np.asarray(expected_counts(field, library, series), float), 0))
    return make_problem(counts, dataclasses.replace(field, depths=0 * field.depths), library, series)


def plain_model(problem: Problem) -> None:
    parameters = dict(problem.start)
    for name in problem.free:
        start = problem.start[name]
        if name == "log_background":
            parameters[name] = numpyro.sample(name, dist.ImproperUniform(dist.constraints.real_vector, (), start.shape))
            numpyro.factor("background_prior", BACKGROUND_SHAPE * parameters[name].sum())
        elif name.startswith("shift"):
            parameters[name] = numpyro.sample(name, dist.ZeroSumNormal(PRIOR_SD[name], start.shape))
        else:
            parameters[name] = numpyro.sample(name, dist.Normal(0 * start if name == "depth" else start, PRIOR_SD[name]).to_event(1))
    numpyro.factor("log_likelihood", log_likelihood(parameters, problem))


def plain(problem: Problem, mode: dict, key: jax.Array, samples: int, warmup: int = 500) -> tuple[np.ndarray, float, int]:
    start = {name: jnp.asarray(mode[name]) for name in problem.free}
    mcmc = MCMC(NUTS(plain_model, init_strategy=init_to_value(values=start)), num_warmup=warmup, num_samples=samples, progress_bar=False, jit_model_args=True)
    for run_key in jax.random.split(key):  # the first run compiles
        begin = time.perf_counter()
        mcmc.warmup(run_key, problem, extra_fields=("num_steps",), collect_warmup=True)
        warm = int(mcmc.get_extra_fields()["num_steps"].sum())
        mcmc.run(run_key, problem, extra_fields=("num_steps",))
        jax.block_until_ready(mcmc.get_samples()["depth"])
        seconds = time.perf_counter() - begin
    return np.asarray(mcmc.get_samples()["depth"])[None], seconds, warm + int(mcmc.get_extra_fields()["num_steps"].sum())


def preconditioned(problem: Problem, key: jax.Array, samples: int) -> tuple[np.ndarray, float, int]:
    for run_key in jax.random.split(key):
        begin = time.perf_counter()
        result = infer(problem, "nuts", run_key, samples, 1, progress_bar=False)
        seconds = time.perf_counter() - begin
    each = result.diagnostics["gradients_per_draw"]
    return result.of("depth"), seconds, int(each * (samples + result.diagnostics["warmup"]))


def main(columns: str = "4", images: str = "15", samples: str = "300") -> None:
    problem = problem_of(int(columns), int(images))
    mode = maximum(problem).parameters
    rows = {}
    for name, (depth, seconds, gradients) in (
        ("preconditioned", preconditioned(problem, jax.random.key(1), int(samples))),
        ("plain", plain(problem, mode, jax.random.key(2), int(samples))),
    ):
        effective = numpyro.diagnostics.effective_sample_size(depth)
        rows[name] = {
            "seconds": round(seconds, 2), "gradients": gradients, "least effective samples of a depth": round(float(effective.min()), 1),
            "per second": float(effective.min()) / seconds, "per 1000 gradients": 1e3 * float(effective.min()) / gradients,
            "depth sd, mean (A)": round(float(depth.std((0, 1)).mean()), 4),
        }  # fmt: skip
    ratio = {key: round(rows["preconditioned"][key] / rows["plain"][key], 1) for key in ("per second", "per 1000 gradients")}
    print(json.dumps({"columns": int(columns), "images": int(images), "parameters": sum(problem.start[n].size for n in problem.free), **rows, "ratio": ratio}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
