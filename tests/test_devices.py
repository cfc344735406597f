"""Work spread over eight devices, which here are threads of one machine, and over two processes that meet over loopback, against one device.

The work is done by this file run as a program, `python test_devices.py LIBRARY RESULT.npz [WORK ...]`; of a job of several processes when the environment says so.
"""

import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

# What is spread ----------------------------------------------------------------------------------------------


def field(library):
    """Score and information of a field of 30 columns, window by window."""
    from depthprob.inference import local
    from depthprob.inference.likelihood import make_problem
    from depthprob.physics.focal_series import Field, FocalSeries
    from depthprob.physics.library import ColumnLibrary

    rng = np.random.default_rng(0)
    positions = 3 + 2.9 * np.stack([a.ravel() for a in np.mgrid[:6, :5]], 1) + rng.normal(0, 0.05, (30, 2))
    defocus = np.array([-62.0, -60.0, 58.0, 60.0, 63.0])  # far enough from focus for windows of one size, which compile sooner
    series = FocalSeries(defocus, 0.4, np.full(5, 9612.0), (48, 56))
    field = Field(positions, rng.integers(3, 12, 30), rng.normal(0, 2, 30), np.full(5, 2e-3), np.ones(5), rng.normal(0, 0.3, (5, 2)))
    problem = make_problem(rng.poisson(3.0, (5, 48, 56)), field, ColumnLibrary.load(library), series, dense=False)
    sums = local.evaluate(problem.start, problem)
    return {"rate": sums.rate, "score": sums.score["depth"], "matrix": local.information(problem.start, problem, sums.rate).dense()}


def chains(_):
    """Five chains of a bent normal by the package's NUTS, more than there are devices in some settings, fewer in others."""
    import jax
    import jax.numpy as jnp

    from depthprob.inference import sampling

    sampling.log_density = lambda z, target: -jnp.sum((z - 0.1 * jnp.roll(z, 1) ** 2) ** 2) / 2
    z, statistics, _ = sampling.nuts(sampling.Whitened(None, jnp.zeros(3), jnp.eye(3)), jax.random.key(1), 15, 5, 20)
    return {"draws": z, "steps": statistics["n_steps"]}


def gram(_):
    """The Gram matrix of tilted columns over sixteen drawn configurations."""
    from depthprob.physics.detector import AnnularDetector
    from depthprob.physics.library import build_gram
    from depthprob.physics.specimen import Column

    return {"blocks": build_gram(Column("C", 2, 2.5, 0.5, (5.0, 0.0)), 100e3, 15.0, AnnularDetector(30.0, 60.0), 8, 2, corrections=2).blocks}


def work(library, result, *names):
    import jax

    jax.config.update("jax_enable_x64", True)
    from depthprob import processes

    if "JAX_NUM_PROCESSES" in os.environ:
        processes.join()
    found = {key: value for name in names for key, value in globals()[name](library).items()}
    np.savez(result.with_stem(f"{result.stem}_{jax.process_index()}"), devices=jax.local_device_count(), processes=jax.process_count(), **found)


# What comes of it --------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def started(count, devices, *command):
    """So many processes of one job, each with so many devices."""
    own = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    if count > 1:
        own |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(count)}
    return [subprocess.Popen([sys.executable, *map(str, command)], env=own | ({"JAX_PROCESS_ID": str(i)} if count > 1 else {})) for i in range(count)]


@pytest.fixture(scope="module")
def run(library, tmp_path_factory):
    """What each process finds in a setting, by process."""
    folder = tmp_path_factory.mktemp("spread")
    library.save(folder / "library.npz")

    @cache
    def run(devices, count, *names):
        result = folder / f"{devices}_{count}.npz"
        running = started(count, devices, __file__, folder / "library.npz", result, *names)
        assert [process.wait(timeout=300) for process in running] == [0] * count
        found = [dict(np.load(result.with_stem(f"{result.stem}_{i}"))) for i in range(count)]
        assert all((f.pop("devices"), f.pop("processes")) == (devices, count) for f in found)
        return found

    return run


@pytest.mark.parametrize(("devices", "count"), [(8, 1), (1, 2), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_fields_and_chains_over_devices_and_processes_give_the_numbers_of_one(run, devices, count):
    (alone,), of_each = (run(*setting, "field", "chains") for setting in ((1, 1), (devices, count)))
    for found in of_each:
        # sums of float32, in another order
        np.testing.assert_allclose(found["rate"], alone["rate"], rtol=2e-6, atol=1e-6 * alone["rate"].max())
        np.testing.assert_allclose(found["score"], alone["score"], rtol=2e-4, atol=2e-4 * abs(alone["score"]).max())
        np.testing.assert_allclose(found["matrix"], alone["matrix"], rtol=1e-5, atol=1e-5 * abs(alone["matrix"]).max())
        # a chain is one device's alone
        np.testing.assert_array_equal(found["draws"], alone["draws"])
        np.testing.assert_array_equal(found["steps"], alone["steps"])
        for name, values in found.items():  # all take their next step from these
            np.testing.assert_array_equal(values, of_each[0][name])


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "count"), [(8, 1), (1, 2), (3, 2)])
def test_drawn_configurations_add_up_in_one_order_over_devices_and_processes(run, devices, count):
    (alone,), of_each = (run(*setting, "gram") for setting in ((1, 1), (devices, count)))
    for found in of_each:
        np.testing.assert_array_equal(found["blocks"], alone["blocks"])


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
