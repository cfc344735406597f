"""Every notebook's script runs, and its last cell's claims hold."""

import runpy
from pathlib import Path

import matplotlib
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.py"))


@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda p: p.stem)
@pytest.mark.filterwarnings("ignore")
def test_notebook(script, monkeypatch, tmp_path):
    matplotlib.use("Agg")
    monkeypatch.setenv("DEPTHPROB_NOTEBOOKS", "small")
    monkeypatch.setenv("DEPTHPROB_CACHE", str(tmp_path))
    runpy.run_path(str(script))
