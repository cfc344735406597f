"""Every notebook's script runs, and its last cell's claims hold."""

import runpy
from pathlib import Path

import matplotlib
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.py"))
WHOLE = ("07_nanorod",)  # has no small size


@pytest.mark.parametrize("script", [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * (p.stem in WHOLE)) for p in NOTEBOOKS])
@pytest.mark.filterwarnings("ignore")
def test_notebook(script, monkeypatch, tmp_path):
    if "tomography" in script.read_text(encoding="utf-8"):
        pytest.importorskip("astra")
    matplotlib.use("Agg")
    monkeypatch.setenv("DEPTHPROB_NOTEBOOKS", "small")
    monkeypatch.setenv("DEPTHPROB_CACHE", str(tmp_path))
    runpy.run_path(str(script))
