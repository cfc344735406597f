"""Work spread over eight devices, which here are threads of one machine, against one."""

import os
import subprocess
import sys

import numpy as np

FIELD = """
import sys
import jax
jax.config.update("jax_enable_x64", True)
import numpy as np
from depthprob.inference import local
from depthprob.inference.likelihood import make_problem
from depthprob.physics.focal_series import Field, FocalSeries
from depthprob.physics.library import ColumnLibrary

rng = np.random.default_rng(0)
library = ColumnLibrary.load(sys.argv[1])
positions = 3 + 2.9 * np.stack([a.ravel() for a in np.mgrid[:6, :5]], 1) + rng.normal(0, 0.05, (30, 2))
defocus = np.arange(-90.0, 91.0, 45.0)
series = FocalSeries(defocus, 0.4, np.full(5, 9612.0), (48, 56))
field = Field(positions, rng.integers(3, 12, 30), rng.normal(0, 5, 30), np.full(5, 2e-3), np.ones(5), rng.normal(0, 0.3, (5, 2)))

counts = rng.poisson(3.0, (5, 48, 56))
problem = make_problem(counts, field, library, series, dense=False)
sums = local.evaluate(problem.start, problem)
matrix = local.information(problem.start, problem, sums.rate).dense()
np.savez(sys.argv[2], devices=jax.device_count(), rate=sums.rate, score=sums.score["depth"], matrix=matrix)
"""


def test_eight_devices_give_the_numbers_of_one(library, tmp_path):
    library.save(tmp_path / "library.npz")
    found = []
    for count in (1, 8):
        command = [sys.executable, "-c", FIELD, str(tmp_path / "library.npz"), str(tmp_path / f"{count}.npz")]
        subprocess.run(command, check=True, env=os.environ | {"JAX_NUM_CPU_DEVICES": str(count), "JAX_PLATFORMS": "cpu"})
        found.append(np.load(tmp_path / f"{count}.npz"))
    one, eight = found
    assert one["devices"] == 1 and eight["devices"] == 8
    # sums of float32, in another order
    np.testing.assert_allclose(eight["rate"], one["rate"], rtol=2e-6, atol=1e-6 * one["rate"].max())
    np.testing.assert_allclose(eight["score"], one["score"], rtol=2e-4, atol=2e-4 * abs(one["score"]).max())
    np.testing.assert_allclose(eight["matrix"], one["matrix"], rtol=1e-5, atol=1e-5 * abs(one["matrix"]).max())
