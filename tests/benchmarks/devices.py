"""What many devices, processes or a GPU gain, and what limits them: the parts of a large field's fit, chains and libraries, side by side.

    python tests/benchmarks/devices.py [settings ...] [--columns N] [--parts NAME ...]

A setting is DEVICESxPROCESSES of the processor, all on this machine, or `gpu`, one process with every GPU (default 1x1 2x1 1x2). The field (default 400 columns) is a
rod as in large_fields.py of the packaged library's columns, 11 images. Each part runs twice and the second run counts, so compilation is left out. Prints seconds,
processor seconds of all processes together, the speed-up over the first setting, and the largest difference from its numbers, of the largest of them (chains part ways
by rounding). Where processor seconds grow with the devices, these compute the same things twice or wait for each other; where neither changes, the part is not spread.
"""

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from importlib import resources

import numpy as np

IMAGES = 11


def parts(n_columns: int):
    """Names, functions that are a part of the work each, and what of their results is compared, if anything."""
    import jax
    import jax.numpy as jnp
    from large_fields import rod

    from depthprob.inference import density, drawing, local
    from depthprob.inference.arrow import ArrowFactor, plus_diagonal
    from depthprob.inference.likelihood import maximum
    from depthprob.inference.problem import make_problem, prior_curvature, to_vector
    from depthprob.inference.sampling import Whitened, nuts
    from depthprob.physics.detector import AnnularDetector
    from depthprob.physics.focal_series import Field, FocalSeries
    from depthprob.physics.frozen_phonon import build_gram
    from depthprob.physics.library import ColumnLibrary
    from depthprob.physics.specimen import Column
    from depthprob.physics.thermal import thermal_gram

    name = next(f for f in resources.files("depthprob.data").iterdir() if f.name.startswith("library_"))
    with resources.as_file(name) as path:
        library = ColumnLibrary.load(path)
    rng = np.random.default_rng(0)

    def field(n, dense):
        positions, atoms, depths = (a[:n] for a in rod(2 * n, library.n_max))
        shape = tuple(int(np.ceil((positions[:, a].max() + 16) / 0.51)) for a in (1, 0))
        series = FocalSeries(np.linspace(-200, 200, IMAGES), 0.51, np.full(IMAGES, 9612.0), shape)
        truth = Field(positions, atoms, depths, np.full(IMAGES, 1e-3), np.ones(IMAGES), rng.normal(0, 0.2, (IMAGES, 2)))
        problem = make_problem(np.zeros((IMAGES, *shape)), truth, library, series, dense=False)
        return make_problem(rng.poisson(local.rates(problem.start, problem)), truth, library, series, dense=dense)

    @cache
    def target():
        small = field(4, True)
        estimate = maximum(small)
        return Whitened(small, jnp.asarray(to_vector(estimate.parameters, small)), jnp.asarray(estimate.factor))

    large = field(n_columns, False)
    windows = drawing.windows_about(large.start, large)
    rate = local.rates(large.start, large, windows)
    matrix = local.select(local.information(large.start, large, rate), large)
    posterior, mode = density.windowed(large.start, large), jnp.asarray(to_vector(large.start, large))
    gradient = jax.jit(jax.grad(density.log_posterior))
    column, detector = Column("C", 2, 2.5, 0.5, (5.0, 0.0)), AnnularDetector(30.0, 60.0)
    return {
        "score of all images": (lambda: local.evaluate(large.start, large, windows), lambda sums: np.concatenate([np.ravel(s) for s in sums.score.values()])),
        "Fisher matrix": (lambda: local.information(large.start, large, rate), lambda m: np.concatenate([np.ravel(a) for a in (*m.diagonal, *m.lower, m.border)])),
        "its Cholesky factor": (lambda: ArrowFactor(plus_diagonal(matrix, prior_curvature(large), local.gauge(large))), lambda f: f.variances()),
        "gradient of the posterior": (lambda: jax.block_until_ready(gradient(mode, posterior)), np.asarray),
        "NUTS, four chains": (lambda: nuts(target(), jax.random.key(0), 10, 4, 10), None),
        "sixteen drawn configurations": (lambda: build_gram(column, 100e3, 15.0, detector, 2, 8, corrections=2), lambda gram: np.asarray(gram.blocks)),
        "closed thermal average": (lambda: thermal_gram(Column("C", 6, 2.5, 0.5), 100e3, 15.0, detector), lambda gram: np.asarray(gram.blocks)),
    }


def work(columns: int, chosen: list[str], kept: str) -> None:
    import jax

    jax.config.update("jax_enable_x64", True)
    from depthprob import processes

    if "JAX_NUM_PROCESSES" in os.environ:
        processes.join()
    times, results, every = {}, {}, parts(columns)
    if unknown := set(chosen) - set(every):
        raise SystemExit(f"no parts {sorted(unknown)}; there are {list(every)}")
    for name, (part, compared) in every.items():
        if chosen and name not in chosen:
            continue
        part()
        processes.total(np.zeros(1))  # all are here
        start, used = time.perf_counter(), sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        result = part()
        own = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - used
        times[name] = time.perf_counter() - start, float(processes.total(np.array(own)))
        if compared:
            results[name] = compared(result)
        if processes.is_first():
            print(name, times[name], file=sys.stderr)
    if processes.is_first():
        np.savez(kept, **results)
        print(json.dumps(times))


def measured(setting: str, columns: int, chosen: list[str]) -> tuple[dict, dict]:
    """Seconds and processor seconds of every part, and what they computed."""
    devices, count = ("1", "1") if setting == "gpu" else setting.split("x")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    own = os.environ | ({"JAX_PLATFORMS": "cuda"} if setting == "gpu" else {"JAX_NUM_CPU_DEVICES": devices, "JAX_PLATFORMS": "cpu"})
    of_job = lambda i: {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": count, "JAX_PROCESS_ID": str(i)} if count != "1" else {}
    with tempfile.NamedTemporaryFile(suffix=".npz") as kept:
        command = [sys.executable, __file__, "--columns", str(columns), "--kept", kept.name, *(["--parts", *chosen] if chosen else [])]
        running = [subprocess.Popen(command, env=own | of_job(i), stdout=subprocess.PIPE if i == 0 else None) for i in range(int(count))]
        output = running[0].communicate()[0].decode()
        if any(process.wait() for process in running):
            raise SystemExit(f"{setting} failed")
        return json.loads(output.splitlines()[-1]), dict(np.load(kept.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", default=["1x1", "2x1", "1x2"])
    parser.add_argument("--columns", type=int, default=400)
    parser.add_argument("--parts", nargs="+", default=[], help="all by default")
    parser.add_argument("--kept", help=argparse.SUPPRESS)  # where a process of one setting writes what it computed
    given = parser.parse_args()
    if given.kept:
        return work(given.columns, given.parts, given.kept)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start; seconds (processor seconds) speed-up, difference, by DEVICESxPROCESSES")
    found = {setting: measured(setting, given.columns, given.parts) for setting in given.settings}
    first, reference = found[given.settings[0]]
    print(f"{'':30}" + "".join(f"{s:>32}" for s in given.settings))
    for name in first:
        row = []
        for times, results in found.values():
            off = f"{abs(results[name] - reference[name]).max() / abs(reference[name]).max():.0e}" if name in results else "-"
            row.append(f"{times[name][0]:.2f} ({times[name][1]:.2f}) {first[name][0] / times[name][0]:.2f} {off:>6}")
        print(f"{name:30}" + "".join(f"{r:>32}" for r in row))


if __name__ == "__main__":
    main()
