"""Tables, structures and JSON: written as the contract says, and refused where they contradict the series."""

import json

import numpy as np
import pytest

from depthprob import io
from depthprob.errors import InputError

FOCI = np.array([-10.0, 0.0, 10.0])


def test_columns_csv_has_the_order_of_the_contract(tmp_path):
    rows = {name: np.full(2, 0.5) for name in reversed(io.COLUMNS) if name != "column"}
    rows |= {"n_atoms": np.array([4, 5]), "extra": np.array(["a", "b"])}
    io.write_columns_csv(tmp_path / "columns.csv", rows)
    lines = (tmp_path / "columns.csv").read_text().splitlines()
    assert lines[0] == ",".join([*io.COLUMNS, "extra"])
    assert lines[1] == "0,0.5,0.5,0.5,0.5,4,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,a"
    with pytest.raises(ValueError, match="crlb_A"):
        io.write_columns_csv(tmp_path / "columns.csv", {"x_A": [1.0]})


def test_drift_csv_has_the_columns_of_the_contract(tmp_path):
    io.write_drift_csv(
        tmp_path / "drift.csv", FOCI, np.array([[1, 2], [0, 0], [-1, -2.5]]), np.full(3, 0.1)
    )
    lines = (tmp_path / "drift.csv").read_text().splitlines()
    assert lines[0] == "image,defocus_A,dx_px,dy_px,sd_px"
    assert lines[3] == "2,10,-1,-2.5,0.1"
    io.write_drift_csv(tmp_path / "drift.csv", FOCI, np.zeros((3, 2)), np.full(3, 0.1), images=np.array([1, 2, 5]))
    assert [line.split(",")[0] for line in (tmp_path / "drift.csv").read_text().splitlines()[1:]] == ["1", "2", "5"]
    scan = np.arange(12).reshape(3, 2, 2) / 100
    io.write_drift_csv(tmp_path / "drift.csv", FOCI, np.zeros((3, 2)), np.full(3, 0.1), scan, scan / 10)
    lines = (tmp_path / "drift.csv").read_text().splitlines()
    assert lines[0] == "image,defocus_A,dx_px,dy_px,sd_px,distortion_xx,distortion_xy,distortion_yx,distortion_yy,distortion_xx_sd,distortion_xy_sd,distortion_yx_sd,distortion_yy_sd"
    assert lines[2] == "1,0,0,0,0.1,0.04,0.05,0.06,0.07,0.004,0.005,0.006,0.007"
    np.testing.assert_array_equal(io.read_drift_csv(tmp_path / "drift.csv", FOCI, (16, 16)), np.zeros((3, 2)))


def test_structure_xyz_is_read_by_ase(tmp_path):
    import ase.io

    positions = np.array([[1.0, 2.0, -3.0], [4.0, 5.0, 6.5]])
    io.write_xyz(
        tmp_path / "structure.xyz",
        "Au",
        positions,
        np.full((2, 3), 0.1),
        np.array([0.9, 1.0]),
        np.array([0, 3]),
        np.array([7, 12]),
        'absolute: z = 0 is "in focus" at defocus 0',
    )
    atoms = ase.io.read(tmp_path / "structure.xyz")
    assert list(atoms.symbols) == ["Au", "Au"]
    np.testing.assert_allclose(atoms.positions, positions, atol=1e-6)
    np.testing.assert_allclose(atoms.arrays["position_sd"], 0.1)
    np.testing.assert_array_equal(atoms.arrays["column"], [0, 3])
    np.testing.assert_array_equal(atoms.arrays["coordination"], [7, 12])
    assert "in focus" in atoms.info["gauge"] and not atoms.pbc.any()


def test_json_writes_null_for_what_is_not_finite(tmp_path):
    content = {"bound": np.inf, "depths": np.array([1.0, np.nan]), "n": np.int64(3), "ok": np.True_}
    io.write_json(tmp_path / "a.json", content)
    read = json.loads((tmp_path / "a.json").read_text())
    assert read == {"bound": None, "depths": [1.0, None], "n": 3, "ok": True}


def test_shifts_come_back_from_drift_csv_in_the_order_of_the_images(tmp_path):
    shifts = np.array([[1.5, 2.0], [0.0, -0.5], [-1.5, -1.5]])
    io.write_drift_csv(tmp_path / "drift.csv", FOCI, shifts, np.full(3, np.nan))
    np.testing.assert_allclose(io.read_drift_csv(tmp_path / "drift.csv", FOCI, (16, 16)), shifts)
    (tmp_path / "other.csv").write_text("image,dx_px,dy_px\n2,4,0\n0,7,3.5\n1,5.5,1\n")  # the gauge is mean zero
    np.testing.assert_allclose(io.read_drift_csv(tmp_path / "other.csv", FOCI, (16, 16)), shifts)


@pytest.mark.parametrize(
    ("text", "said"),
    [("image,dx_px,dy_px\n0,1,1\n1,0,0\n", "the series has 3"), ("image,dx_px,dy_px\n0,1,1\n1,0,0\n1,2,2\n", "numbered from 0 to 2"),
     ("image,dx_px,dy_px\n1,1,1\n2,0,0\n3,2,2\n", "numbered from 0 to 2"), ("image,dx_px\n0,1\n1,0\n2,0\n", "needed is dy_px"),
     ("image,dx_A,dy_px\n0,1,1\n", "Did you mean 'dx_px'"), ("image,dx_px,dy_px\n0,one,1\n1,0,0\n2,0,0\n", "allowed are numbers"),
     ("image,dx_px,dy_px\n0,nan,1\n1,0,0\n2,0,0\n", "allowed is less than half"), ("image,dx_px,dy_px\n0,0,0\n1,0,15\n2,0,0\n", "image 1 displaced by .* field of 32 x 16 px"),
     ("image,defocus_A,dx_px,dy_px\n0,-10,1,1\n1,1,0,0\n2,10,0,0\n", "image 1 at defocus 1 Å, the config at 0 Å")],
)  # fmt: skip
def test_shifts_that_contradict_the_series_are_refused_with_both_named(tmp_path, text, said):
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(InputError, match=said):
        io.read_drift_csv(tmp_path / "d.csv", np.array([-10.0, 0.0, 10.0]), (16, 32))
