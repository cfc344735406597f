"""What several test modules stand on."""

import os
import shutil
import tempfile
from importlib import resources

if "PYTEST_XDIST_WORKER" not in os.environ:  # for workers, and commands that tests run
    COMPILED = tempfile.mkdtemp()  # a function is compiled once for all
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": COMPILED, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    # there is a worker for every core: threads of NumPy beside them wait for each other in loops that cost half of all processor time
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

import jax
import pytest

from depthprob.physics.library import ColumnLibrary


def pytest_unconfigure():
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(COMPILED, ignore_errors=True)


@pytest.fixture(scope="module")
def double_precision():
    """For a module's `pytestmark = pytest.mark.usefixtures(...)`: 64-bit floats in all its fixtures and tests."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def library():
    """The packaged library: 1 to 12 atoms of gold."""
    name = next(f for f in resources.files("depthprob.data").iterdir() if f.name.startswith("library_"))
    with resources.as_file(name) as path:
        return ColumnLibrary.load(path)
