"""Settings: defaults, checks, and messages that help."""

import math

import numpy as np
import pytest

from depthprob.config import Config, check_sampling, config_from_dict, read_config
from depthprob.errors import InputError


def write(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_empty_file_gives_the_papers_settings(tmp_path):
    config = read_config(write(tmp_path, ""))
    assert config == Config()
    np.testing.assert_array_equal(config.focal_series.defocus, np.arange(-200, 201, 10))
    np.testing.assert_array_equal(config.focal_series.dose, np.full(41, 9612.0))
    assert config.specimen.debye_waller_b == 0.63
    assert config.inference.free == ("positions", "background", "gain", "image_shifts")


def test_as_dict_reads_back_to_the_same_config():
    raw = {
        "detector": {"inner_mrad": [30, 60.0], "outer_mrad": [60, 180]},
        "focal_series": {"defocus_A": [5, -5, 0], "probe_current_pA": 40, "dwell_time_us": 10},
        "specimen": {"rms_displacement_A": 0.1, "zone_axis": [1, -1, 0]},
        "microscope": {"aberrations": {"C12_A": 20, "phi12_deg": -30.0}},
        "inference": {"free": [], "method": "nuts"},
    }
    config = config_from_dict(raw)
    assert config_from_dict(config.as_dict()) == config
    assert "dose_e_per_A2" not in config.as_dict()["focal_series"]


def test_current_and_dwell_time_give_the_dose_of_the_papers_experiment():
    """40 pA for 10 µs on pixels of 0.51 Å: 40e-12 * 10e-6 / 1.602176634e-19 / 0.51^2 = 9598.7 e/Å²."""
    series = {"probe_current_pA": 40.0, "dwell_time_us": 10.0, "pixel_size_A": 0.51}
    dose = config_from_dict({"focal_series": series}).focal_series.dose
    np.testing.assert_allclose(dose, 4e-16 / 1.602176634e-19 / 0.2601, rtol=1e-12)


def test_rms_displacement_of_gold_gives_its_b():
    config = config_from_dict({"specimen": {"rms_displacement_A": 0.0893}})
    assert math.isclose(
        config.specimen.debye_waller_b, 0.63, rel_tol=1e-3
    )  # both rounded in the paper


def test_a_descending_range_of_foci_is_fine():
    series = {"defocus_start_A": 10, "defocus_stop_A": -10, "defocus_step_A": -5}
    foci = config_from_dict({"focal_series": series}).focal_series.defocus
    np.testing.assert_allclose(foci, [10, 5, 0, -5, -10])


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"detectr": {}}, ["detectr", "'detector'"]),
        ({"microscope": {"energy_kev": 300}}, ["energy_kev", "'energy_keV'"]),
        ({"microscope": {"energy": 300}}, ["'energy_keV'"]),
        ({"microscope": {"energy_keV": "300"}}, ["'300'", "quotation"]),
        ({"microscope": {"energy_keV": True}}, ["True"]),
        ({"microscope": {"energy_keV": math.nan}}, ["nan"]),
        ({"microscope": {"energy_keV": math.inf}}, ["inf"]),
        ({"microscope": {"energy_keV": 10**400}}, ["energy_keV"]),
        ({"microscope": {"convergence_angle_mrad": 0}}, ["above 0"]),
        ({"microscope": {"aberrations": {"C11_A": 1}}}, ["C11_A"]),
        ({"inference": {"prior_sd": {"depth": 3.0}}}, ["'depth'", "depth_A"]),
        ({"inference": {"free": ["image_distortion"]}}, ["image_distortions"]),
        ({"crlb": {"nuisances": ["image_distortions"]}}, ["'focal_spread'"]),
        ({"inference": {"prior_sd": {"gain": 0}}}, ["prior_sd.gain", "above 0"]),
        ({"inference": {"prior_sd": 0.1}}, ["[inference.prior_sd]"]),
        ({"microscope": {"aberrations": {"C10_A": 1}}}, ["focal_series"]),
        ({"microscope": {"aberrations": {"phi12_deg": 1}}}, ["C12_A"]),
        ({"microscope": 3}, ["[microscope]"]),
        ({"detector": {"inner_mrad": 200}}, ["180", "200"]),
        ({"detector": {"inner_mrad": [10, 20]}}, ["equal length"]),
        ({"detector": {"inner_mrad": [10, 50], "outer_mrad": [20, 40]}}, ["50", "40"]),
        ({"detector": {"inner_mrad": [50, 10], "outer_mrad": [90, 51]}}, ["overlap", "51"]),
        ({"detector": {"sensitivity": "nowhere.npy"}}, ["nowhere.npy"]),
        ({"focal_series": {"defocus_A": []}}, ["defocus_A"]),
        ({"focal_series": {"defocus_A": [1, 2, 1.0]}}, ["distinct"]),
        (
            {"focal_series": {"defocus_A": [1, 2], "defocus_step_A": 1}},
            ["defocus_A", "defocus_step_A"],
        ),
        ({"focal_series": {"defocus_step_A": 0}}, ["zero"]),
        ({"focal_series": {"defocus_step_A": -10}}, ["sign"]),
        ({"focal_series": {"defocus_step_A": 15}}, ["defocus_stop_A = 190"]),
        ({"focal_series": {"defocus_step_A": 1e-300}}, ["images"]),
        ({"focal_series": {"dose_e_per_A2": -1}}, ["above 0"]),
        ({"focal_series": {"dose_e_per_A2": [1.0, 2.0]}}, ["2 doses", "41 foci"]),
        ({"focal_series": {"dwell_time_us": 1.0}}, ["probe_current_pA"]),
        ({"focal_series": {"dwell_time_us": 1.0, "dose_e_per_A2": 5.0}}, ["both"]),
        ({"focal_series": {"signal": "count"}}, ["'counts'", "'fraction'", "'raw'"]),
        ({"focal_series": {"periodic": "true"}}, ["true or false"]),
        ({"specimen": {"element": "au"}}, ["'Au'"]),
        ({"specimen": {"element": "Xx"}}, ["'Xx'"]),
        ({"specimen": {"structure": "FCC"}}, ["'fcc'"]),
        ({"specimen": {"structure": "cell_file"}}, ["cell_file"]),
        ({"specimen": {"zone_axis": [0, 0, 0]}}, ["zero"]),
        ({"specimen": {"zone_axis": [0, 1]}}, ["3 values"]),
        ({"specimen": {"zone_axis": [0, 0, 0.5]}}, ["zone_axis[2]", "whole"]),
        ({"specimen": {"n_atoms": 0}}, ["at least 1"]),
        ({"specimen": {"rms_displacement_A": 0.1, "debye_waller_B_A2": 0.6}}, ["both"]),
        ({"specimen": {"structure_file": "nowhere.xyz"}}, ["nowhere.xyz"]),
        ({"focal_series": {"drift_file": "nowhere.csv"}}, ["focal_series.drift_file", "nowhere.csv"]),
        ({"simulation": {"parametrization": "peng"}}, ["'lobato'"]),
        ({"thermal": {"model": "frozen-phonon"}}, ["'frozen_phonon'"]),
        ({"inference": {"method": "nut"}}, ["'nuts'"]),
        ({"inference": {"free": ["positons"]}}, ["'positions'"]),
        ({"inference": {"free": ["gain", "gain"]}}, ["once"]),
        ({"crlb": {"nuisances": "gain"}}, ["list"]),
        ({"crlb": {"prior_sd": {"focal_varianc_A2": 1.0}}}, ["'focal_variance_A2'"]),
        ({"crlb": {"prior_sd": {"depth_A": 0.0}}}, ["crlb.prior_sd.depth_A", "above 0"]),
    ],
)
def test_a_fault_is_named_with_what_was_given_and_what_is_allowed(raw, words):
    with pytest.raises(InputError) as caught:
        config_from_dict(raw)
    for word in words:
        assert word in str(caught.value)


def test_faults_of_the_file_itself_are_input_errors(tmp_path):
    with pytest.raises(InputError, match="no config file"):
        read_config(tmp_path / "none.toml")
    with pytest.raises(InputError, match="cannot read config"):
        read_config(tmp_path)
    with pytest.raises(InputError, match="no valid TOML"):
        read_config(write(tmp_path, "[microscope\nenergy_keV = 300"))
    (tmp_path / "config.toml").write_bytes(b"\xff\xfe#")
    with pytest.raises(InputError, match="UTF-8"):
        read_config(tmp_path / "config.toml")


def test_named_files_count_from_the_folder_of_the_config(tmp_path):
    (tmp_path / "particle.xyz").write_text("0\n\n")
    config = read_config(write(tmp_path, '[specimen]\nstructure_file = "particle.xyz"'))
    assert config.resolve("particle.xyz").is_file()


def test_sampling_must_carry_the_detectors_outer_angle():
    """wavelength(300 keV) = 0.0196875 Å (Reimer, table 2.2), so 180 mrad needs 0.0196875 / (3 * 0.18) = 0.03645 Å."""
    pytest.importorskip("depthprob.physics.electron")
    check_sampling(config_from_dict({}))
    check_sampling(config_from_dict({"simulation": {"potential_sampling_A": 0.0364}}))
    with pytest.raises(InputError, match=r"0\.0364 or finer"):
        check_sampling(config_from_dict({"simulation": {"potential_sampling_A": 0.0366}}))
