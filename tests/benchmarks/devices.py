"""What many devices and processes gain, and what limits them: the parts of a large field's fit, chains and drawn library configurations, side by side.

    python tests/benchmarks/devices.py [columns [settings ...]]

A setting is DEVICESxPROCESSES, all on this machine (default 1x1 2x1 1x2). The field (default 400 columns) is a rod as in
large_fields.py of the packaged library's columns, 11 images. Each part runs twice and the second run counts, so compilation is left out. Prints seconds, processor
seconds of all processes together and the speed-up over the first setting. Where processor seconds grow with the devices, these compute the same things twice or
wait for each other; where neither changes, the part is not spread.
"""

import json
import os
import resource
import socket
import subprocess
import sys
import time
from importlib import resources

import numpy as np

IMAGES = 11


def parts(n_columns: int):
    """Names and functions, each a part of the work."""
    import jax
    import jax.numpy as jnp
    from large_fields import rod

    from depthprob.inference import local
    from depthprob.inference.arrow import ArrowFactor, plus_diagonal
    from depthprob.inference.likelihood import make_problem, maximum, prior_curvature, to_vector
    from depthprob.inference.sampling import Whitened, nuts
    from depthprob.physics.detector import AnnularDetector
    from depthprob.physics.focal_series import Field, FocalSeries
    from depthprob.physics.library import ColumnLibrary, build_gram
    from depthprob.physics.specimen import Column

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

    large, small = field(n_columns, False), field(4, True)
    windows = local.plan_windows(library, large.series, np.asarray(large.start["depth"]))
    rate = local.rates(large.start, large, windows)
    matrix = local.select(local.information(large.start, large, rate), large)
    estimate = maximum(small)
    target = Whitened(small, jnp.asarray(to_vector(estimate.parameters, small)), jnp.asarray(estimate.factor))
    return {
        "score of all images": lambda: local.evaluate(large.start, large, windows),
        "Fisher matrix": lambda: local.information(large.start, large, rate),
        "its Cholesky factor": lambda: ArrowFactor(plus_diagonal(matrix, prior_curvature(large), local.gauge(large))),
        "NUTS, four chains": lambda: nuts(target, jax.random.key(0), 10, 4, 10),
        "sixteen drawn configurations": lambda: build_gram(Column("C", 2, 2.5, 0.5, (5.0, 0.0)), 100e3, 15.0, AnnularDetector(30.0, 60.0), 2, 8, corrections=2),
    }


def work(n_columns: str) -> None:
    import jax

    jax.config.update("jax_enable_x64", True)
    from depthprob import processes

    if "JAX_NUM_PROCESSES" in os.environ:
        processes.join()
    found = {}
    for name, part in parts(int(n_columns)).items():
        part()
        processes.total(np.zeros(1))  # all are here
        start, used = time.perf_counter(), sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        part()
        own = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - used
        found[name] = time.perf_counter() - start, float(processes.total(np.array(own)))
        if processes.is_first():
            print(name, found[name], file=sys.stderr)
    if processes.is_first():
        print(json.dumps(found))


def measured(setting: str, n_columns: str) -> dict:
    devices, count = setting.split("x")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    own = os.environ | {"JAX_NUM_CPU_DEVICES": devices, "JAX_PLATFORMS": "cpu"}
    of_job = lambda i: {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": count, "JAX_PROCESS_ID": str(i)} if count != "1" else {}
    command = [sys.executable, __file__, "--work", n_columns]
    running = [subprocess.Popen(command, env=own | of_job(i), stdout=subprocess.PIPE if i == 0 else None) for i in range(int(count))]
    output = running[0].communicate()[0].decode()
    if any(process.wait() for process in running):
        raise SystemExit(f"{setting} failed")
    return json.loads(output.splitlines()[-1])


def main(n_columns: str = "400", *settings: str) -> None:
    settings = settings or ("1x1", "2x1", "1x2")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start; seconds (processor seconds) speed-up, by DEVICESxPROCESSES")
    found = {setting: measured(setting, n_columns) for setting in settings}
    print(f"{'':30}" + "".join(f"{s:>24}" for s in settings))
    for name, (alone, _) in found[settings[0]].items():
        print(f"{name:30}" + "".join("{:>24}".format(f"{f[name][0]:.2f} ({f[name][1]:.2f}) {alone / f[name][0]:.2f}") for f in found.values()))


if __name__ == "__main__":
    work(sys.argv[2]) if sys.argv[1:2] == ["--work"] else main(*sys.argv[1:])
