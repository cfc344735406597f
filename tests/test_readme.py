"""What README shows runs."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from depthprob.config import config_from_dict

README = Path(__file__).parents[1] / "README.md"
pytestmark = pytest.mark.usefixtures("double_precision")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_python_of_readme_runs():
    (code,) = blocks("python")
    names: dict = {}
    exec(code, names)
    assert names["expected"].shape == (41, 20, 26)
    assert np.all(abs(names["fit"].of("depth").mean((0, 1)) - names["field"].depths) < 5 * names["bound"])
    np.testing.assert_allclose(names["same"], names["bound"], rtol=1e-4)
    assert np.all(abs(names["peaks"].depth - names["field"].depths) < 5)
    assert {(row.n_atoms, row.estimator) for row in names["rows"]} == {(2, "middle"), (10, "middle")}


def test_the_settings_of_readme_are_settings():
    shown = [tomllib.loads(block) for block in blocks("") if block.lstrip().startswith("[")]
    assert [list(settings) for settings in shown] == [["focal_series"], ["design"]]
    assert config_from_dict(shown[1]).design.annuli == 1
