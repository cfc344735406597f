"""Work spread over eight devices, which here are threads of one machine, and over two processes that meet over loopback, against one device.

The work is done by this file run as a program, `python test_devices.py LIBRARY RESULT.npz [WORK ...]`; of a job of several processes when the environment says so.
"""

import contextlib
import os
import re
import runpy
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import typer

import depthprob
from depthprob.cli import app
from depthprob.config import read_config
from depthprob.inference import local
from depthprob.inference.problem import make_problem
from depthprob.physics.focal_series import Field, FocalSeries
from depthprob.physics.library import ColumnLibrary
from depthprob.reconstruction.libraries import write_library

LOWEST = 65536 - 4096  # of the ports that JAX takes for jobs of Slurm

# What is spread ----------------------------------------------------------------------------------------------


def field(library):
    """Score and information of a field of 30 columns, window by window."""
    rng = np.random.default_rng(0)
    positions = 3 + 2.9 * np.stack([a.ravel() for a in np.mgrid[:6, :5]], 1) + rng.normal(0, 0.05, (30, 2))
    defocus = np.array([-62.0, -60.0, 58.0, 60.0, 63.0])  # far enough from focus for windows of one size, which compile sooner
    series = FocalSeries(defocus, 0.4, np.full(5, 9612.0), (48, 56))
    field = Field(positions, rng.integers(3, 12, 30), rng.normal(0, 2, 30), np.full(5, 2e-3), np.ones(5), rng.normal(0, 0.3, (5, 2)))
    problem = make_problem(rng.poisson(3.0, (5, 48, 56)), field, ColumnLibrary.load(library), series, dense=False)
    sums = local.evaluate(problem.start, problem)
    return {"rate": sums.rate, "score": sums.score["depth"], "matrix": local.information(problem.start, problem, sums.rate).dense()}


def chains(_, samples=15, chains=5, checkpoint=None):
    """Chains of a bent normal by the package's NUTS: more than there are devices in some settings, fewer in others."""
    import jax
    import jax.numpy as jnp

    from depthprob.inference import sampling

    sampling.log_density = lambda z, target: -jnp.sum((z - 0.1 * jnp.roll(z, 1) ** 2) ** 2) / 2
    z, statistics, _ = sampling.nuts(sampling.Whitened(None, jnp.zeros(3), jnp.eye(3)), jax.random.key(1), samples, chains, 20, checkpoint)
    return {"draws": z, "steps": statistics["n_steps"]}


def kept_chains(folder):
    """Longer ones, with their state in the folder."""
    return chains(None, 400, 2, Path(folder) / "state.npz")


def gram(_):
    """The Gram matrix of tilted columns over sixteen drawn configurations."""
    from depthprob.physics.detector import AnnularDetector
    from depthprob.physics.frozen_phonon import build_gram
    from depthprob.physics.specimen import Column

    return {"blocks": build_gram(Column("C", 2, 2.5, 0.5, (5.0, 0.0)), 100e3, 15.0, AnnularDetector(30.0, 60.0), 8, 2, corrections=2).blocks}


def work(given, result, *names):
    import jax

    jax.config.update("jax_enable_x64", True)
    from depthprob import processes

    many = {"JAX_NUM_PROCESSES", "SLURM_PROCID"} & set(os.environ)
    if many:
        processes.join()
    with processes.ending_together() if many else contextlib.nullcontext():
        found = {key: value for name in names for key, value in globals()[name](given).items()}
        np.savez(result.with_stem(f"{result.stem}_{jax.process_index()}"), devices=jax.local_device_count(), processes=jax.process_count(), **found)


# What comes of it --------------------------------------------------------------------------------------------


def free_port(among=(0,)):
    for port in among:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return probe.getsockname()[1]
    raise OSError("no free port")


def by_environment(i, count, port):
    return {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)}


def by_slurm(i, count, port):
    """What Slurm tells each process; JAX makes its port of the job's number."""
    job = {"SLURM_JOB_ID": str(port - LOWEST), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count)}
    return job | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_STEP_NUM_NODES": "1"}


@contextlib.contextmanager
def at_work(count, devices, *command, how=by_environment, **options):
    """So many processes of one job, each with so many devices; killed at the end if they have not ended."""
    # a matrix product whose threads depend on the number of devices rounds otherwise: one thread each, so that bits can be compared
    own = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {
        "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"
    }
    port = free_port(range(LOWEST + os.getpid() % 4000, 65536)) if how is by_slurm else free_port()
    with contextlib.ExitStack() as stack:
        running = []
        for i in range(count):
            process = subprocess.Popen([sys.executable, *map(str, command)], env=own | (how(i, count, port) if count > 1 else {}), **options)
            running.append(stack.enter_context(process))
            stack.callback(process.kill)
        yield running


@pytest.fixture(scope="module")
def run(library, tmp_path_factory):
    """What each process finds in a setting, by process."""
    folder = tmp_path_factory.mktemp("spread")
    library.save(folder / "library.npz")

    @cache
    def run(devices, count, *names, how=by_environment):
        result = folder / f"{devices}_{count}.npz"
        with at_work(count, devices, __file__, folder / "library.npz", result, *names, how=how) as running:
            assert [process.wait(timeout=300) for process in running] == [0] * count
        found = [dict(np.load(result.with_stem(f"{result.stem}_{i}"))) for i in range(count)]
        assert all((f.pop("devices"), f.pop("processes")) == (devices, count) for f in found)
        return found

    return run


@pytest.mark.parametrize(("devices", "count", "how"), [(4, 2, by_slurm), *(pytest.param(*setting, marks=pytest.mark.slow) for setting in ((8, 1, None), (1, 2, by_environment)))])
def test_fields_and_chains_over_devices_and_processes_give_the_numbers_of_one(run, devices, count, how):
    (alone,), of_each = run(1, 1, "field", "chains"), run(devices, count, "field", "chains", how=how)
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


@pytest.mark.slow
def test_when_one_process_is_killed_the_other_ends_with_an_error_and_a_rerun_ends_where_an_undisturbed_run_ends(tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    job = lambda name, result, count: at_work(count, 1, __file__, tmp_path / name, tmp_path / result, "kept_chains", stderr=subprocess.PIPE, text=True)
    with job("killed", "killed.npz", 2) as running:
        while not (tmp_path / "killed" / "state.npz").exists():
            assert [process.poll() for process in running] == [None, None]
            time.sleep(0.01)
        running[1].kill()
        assert "another process of this job has ended" in running[0].communicate(timeout=60)[1] and running[0].returncode == 1
    assert not list(tmp_path.glob("killed*.npz"))
    for name, result, count in (("killed", "again.npz", 2), ("whole", "alone.npz", 1)):
        with job(name, result, count) as running:
            assert [process.wait(timeout=300) for process in running] == [0] * count
    again, alone = (np.load(tmp_path / f"{name}_0.npz") for name in ("again", "alone"))
    np.testing.assert_array_equal(again["draws"], alone["draws"])


def test_one_that_is_to_share_the_work_with_nobody_is_refused(tmp_path):
    (tmp_path / "config.toml").write_text("[focal_series]\npixel_size_A = 0.2\n")
    alone = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "JAX_"))}
    command = [sys.executable, "-m", "depthprob.cli", "library", "config.toml", "-o", "library.npz", "--distributed"]
    result = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("depthprob: this is no process of a job of several")
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


# The job script ----------------------------------------------------------------------------------------------

SCRIPT = Path(depthprob.__file__).parent / "data" / "slurm.sh"
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & done
wait -n && wait -n
"""


def test_every_option_of_the_job_script_exists():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    (command,) = re.findall(r"^ +depthprob (\w+) (.*)$", SCRIPT.read_text(), re.MULTILINE)
    known = {option for parameter in typer.main.get_command(app).commands[command[0]].params for option in parameter.opts}
    assert "--distributed" in (given := re.findall(r"(?<= )--?[\w-]+", command[1])) and set(given) <= known


@pytest.mark.slow
def test_two_processes_under_the_job_script_find_the_columns_that_one_finds(library, tmp_path):
    rod = runpy.run_path(str(Path(__file__).parent / "benchmarks" / "large_fields.py"))["rod"]
    positions, n, depths = (a[:230] for a in rod(460, library.n_max))
    defocus, shape = np.arange(-160.0, 161.0, 40.0), tuple(int(np.ceil((positions[:, a].max() + 16) / 0.51)) for a in (1, 0))
    series = FocalSeries(defocus, 0.51, np.full(9, 9612.0), shape)
    problem = make_problem(np.zeros((9, *shape)), Field(positions, n, depths, np.full(9, 1e-3), np.ones(9), np.zeros((9, 2))), library, series, dense=False)
    np.savez(tmp_path / "stack.npz", stack=np.random.default_rng(0).poisson(local.rates(problem.start, problem)))
    (tmp_path / "config.toml").write_text(f"[focal_series]\ndefocus_A = {defocus.tolist()}\npixel_size_A = 0.51\n[inference]\nmethod = 'laplace'\nsamples = 50\nmax_atoms = 12\n")
    for name, text in {"srun": SRUN, "depthprob": f'#!/bin/bash\nexec {sys.executable} -m depthprob.cli "$@"\n'}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = os.environ | by_slurm(0, 2, free_port(range(LOWEST + os.getpid() % 4000, 65536))) | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    job |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_CPUS_PER_TASK": "1"}
    write_library(tmp_path / "library.npz", read_config(tmp_path / "config.toml"), lambda items, **_: items)
    subprocess.run(["bash", SCRIPT, "stack.npz", "config.toml", "two", "--library", "library.npz"], cwd=tmp_path, env=job, check=True)
    alone = [tmp_path / "depthprob", "reconstruct", "stack.npz", "--config", "config.toml", "-o", "one", "--library", "library.npz", "--quiet"]
    subprocess.run(alone, cwd=tmp_path, check=True)
    two, one = (np.genfromtxt(tmp_path / name / "columns.csv", delimiter=",", names=True) for name in ("two", "one"))
    assert len(one) > 200 and np.array_equal(two["n_atoms"], one["n_atoms"])
    for name in ("x_A", "y_A", "depth_A", "depth_sd_A", "crlb_A"):
        np.testing.assert_allclose(two[name], one[name], atol=1e-3)  # of fits that end within 0.03 standard deviations, from sums of float32


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
