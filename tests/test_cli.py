"""Bad input: status 2, one message, nothing written."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from depthprob.cli import app

CONFIG = (
    "[focal_series]\ndefocus_A = [-10.0, 0.0, 10.0]\npixel_size_A = 0.2\ndose_e_per_A2 = 1000.0\n"
)


@pytest.fixture
def inputs(tmp_path):
    """A good stack and a good config, for each test to spoil."""
    counts = np.random.default_rng(0).poisson(20.0, (3, 32, 32))
    np.savez(tmp_path / "stack.npz", stack=counts)
    (tmp_path / "config.toml").write_text(CONFIG)
    return tmp_path


def refusal(folder, *arguments):
    """Run a command that must fail on its input, and give back its one message."""
    before = sorted(folder.iterdir())
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("depthprob: ") and result.stderr.count("depthprob: ") == 1
    assert len(result.stderr.splitlines()) == 1
    assert sorted(folder.iterdir()) == before
    return result.stderr


def reconstruct(folder, *more):
    options = ["--config", folder / "config.toml", "-o", folder / "out", *more]
    return refusal(folder, "reconstruct", folder / "stack.npz", *options)


def test_a_missing_stack_is_refused(inputs):
    (inputs / "stack.npz").unlink()
    assert "no stack file" in reconstruct(inputs)


def test_a_missing_config_is_refused(inputs):
    (inputs / "config.toml").unlink()
    assert "no config file" in reconstruct(inputs)


def test_a_truncated_stack_is_refused(inputs):
    whole = (inputs / "stack.npz").read_bytes()
    (inputs / "stack.npz").write_bytes(whole[: len(whole) // 2])
    assert "cannot read" in reconstruct(inputs)


def test_a_stack_with_other_than_one_image_a_focus_is_refused(inputs):
    np.savez(inputs / "stack.npz", stack=np.ones((4, 8, 8)))
    message = reconstruct(inputs)
    assert "4 images" in message and "3 foci" in message


def test_nan_is_refused(inputs):
    stack = np.ones((3, 8, 8))
    stack[1, 2, 3] = np.nan
    np.savez(inputs / "stack.npz", stack=stack)
    assert "image 1 at (y, x) = (2, 3)" in reconstruct(inputs)


def test_an_unknown_key_is_refused_with_the_nearest_known_one(inputs):
    (inputs / "config.toml").write_text(CONFIG + "pixel_size = 0.2\n")
    assert "Did you mean 'pixel_size_A'?" in reconstruct(inputs)


@pytest.mark.parametrize("command", ["reconstruct", "simulate", "library", "crlb", "design"])
def test_angles_beyond_the_sampling_are_refused(inputs, command):
    pytest.importorskip("depthprob.physics.electron")
    (inputs / "config.toml").write_text(CONFIG + "[simulation]\npotential_sampling_A = 0.1\n")
    if command == "reconstruct":
        message = reconstruct(inputs)
    else:
        message = refusal(inputs, command, inputs / "config.toml", "-o", inputs / "out.npz")
    assert "potential_sampling_A = 0.0364 or finer" in message


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("--method", "guess", "nuts"),
        ("--memory-limit", "-1", "above 0"),
        ("--memory-limit", "nan", "above 0"),
        ("--library", "nowhere.npz", "no library"),
    ],
)
def test_options_out_of_range_are_refused(inputs, option, value, word):
    assert word in reconstruct(inputs, option, value)


def test_an_output_that_cannot_be_written_is_refused_before_the_work(inputs):
    message = refusal(inputs, "simulate", inputs / "config.toml", "-o", inputs / "no" / "stack.npz")
    assert "no folder" in message
    message = refusal(inputs, "simulate", inputs / "config.toml", "-o", inputs / "stack.png")
    assert ".npz" in message
    (inputs / "out").write_text("a file")
    assert "it is a file" in reconstruct(inputs)


@pytest.mark.parametrize(
    ("command", "section", "word"),
    [
        ("design", "[detector]\ninner_mrad = [48, 120]\nouter_mrad = [90, 180]\n", "one annulus"),
        ("design", "[specimen]\ntilt_mrad = [1, 0]\n", "tilt_mrad"),
        ("design", '[detector]\nsensitivity = "map.npy"\nsensitivity_pixel_mrad = 5.0\n', "sensitivity"),
        ("library", '[specimen]\ntilt_mrad = [1, 0]\n[thermal]\nmodel = "absorptive"\n', "tilt"),
        ("simulate", "[specimen]\nn_atoms = 60\ntilt_mrad = [1, 0]\n", "60 atoms"),
        ("library", '[detector]\nsensitivity = "stack.npz"\nsensitivity_pixel_mrad = 5.0\n', "cannot read"),
        ("library", '[detector]\nsensitivity = "map.npy"\n', "sensitivity_pixel_mrad"),
        ("library", '[detector]\nsensitivity = "map.npy"\nsensitivity_pixel_mrad = 5.0\n', "from 0 to 2"),
    ],
)
def test_settings_that_a_model_cannot_follow_are_refused_not_ignored(inputs, command, section, word):
    np.save(inputs / "map.npy", np.full((9, 9), 255.0))
    (inputs / "config.toml").write_text(CONFIG + section)
    assert word in refusal(inputs, command, inputs / "config.toml", "-o", inputs / "out.npz")


def test_crlb_writes_bounds_on_column_and_atoms(inputs):
    (inputs / "config.toml").write_text(
        """
[focal_series]
defocus_start_A = -120
defocus_stop_A = 120
defocus_step_A = 20
pixel_size_A = 0.3
field_of_view_A = 6
[detector]
inner_mrad = 40
outer_mrad = 90
[specimen]
n_atoms = 2
[thermal]
model = "absorptive"
[crlb]
max_atoms = 3
nuisances = ["positions", "gain", "source_size", "focus_offset"]
"""
    )
    subprocess.run(
        [sys.executable, "-m", "depthprob.cli", "crlb", inputs / "config.toml", "-o", inputs / "b.json"],
        check=True,
        timeout=300,
    )
    bounds = json.loads((inputs / "b.json").read_text())
    alone, others = bounds["column_depth_sd_A"], bounds["column_depth_sd_with_nuisances_A"]
    assert abs(bounds["column_depth_sd_of_atom_model_A"] / alone - 1) < 0.02  # two ways to the same images
    curve = bounds["column_depth_sd_by_n_atoms_A"]
    assert curve[1] == alone and curve[0] > curve[1] > curve[2]  # more atoms, more counts
    assert alone < others["gain"] < 1.2 * alone
    assert alone <= others["source_size"]
    assert others["focus_offset"] is None and "focus_offset" in bounds["undefined"]
    assert bounds["configurations"] == 0
    assert len(bounds["atom_depth_sd_A"]) == 2 and min(bounds["atom_depth_sd_A"]) > alone


def test_the_command_itself_leaves_with_status_2_and_no_traceback(inputs):
    command = [sys.executable, "-m", "depthprob.cli", "crlb", str(inputs / "none.toml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_ctrl_c_leaves_with_status_130_one_line_and_no_half_result(tmp_path):
    command = [sys.executable, "-u", "-m", "depthprob.cli", "demo", "-o", str(tmp_path / "out")]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores Ctrl-C, and so do its children
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while "depthprob: joint fit" not in (line := running.stdout.readline()):
        assert line, "it ended before it could be interrupted"
    running.send_signal(signal.SIGINT)
    rest, _ = running.communicate(timeout=100)
    assert running.returncode == 130, rest
    assert rest.splitlines()[-1].startswith("depthprob: interrupted") and "Traceback" not in rest
    assert not list(tmp_path.iterdir())


def test_a_series_above_the_memory_limit_is_refused(inputs):
    assert "(--memory-limit) is 0.5; series of " in reconstruct(inputs, "--memory-limit", "0.5")
    (inputs / "config.toml").write_text(CONFIG + "[simulation]\nmemory_limit_GB = 0.5\n")
    assert "simulation.memory_limit_GB (--memory-limit) is 0.5" in reconstruct(inputs)
