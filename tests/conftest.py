"""What several test modules stand on."""

from importlib import resources

import jax
import pytest

from depthprob.physics.library import ColumnLibrary


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
