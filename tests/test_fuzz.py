"""Hostile input: whatever a file holds, it is read or refused with one message.

DEPTHPROB_FUZZ=2000 runs that many new cases of each kind instead of the same few.
"""

import math
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from depthprob import io
from depthprob.config import SECTIONS, Config, check_sampling, check_supported, config_from_dict, read_config
from depthprob.errors import InputError
from depthprob.reconstruction.libraries import column_geometry, detector_of, microscope_of, z_range_of
from depthprob.stack import Stack, read_stack, write_stack

CASES = int(os.environ.get("DEPTHPROB_FUZZ", "0"))
SHAPE, FOCI = (3, 6, 5), [-10.0, 0.0, 10.0]


def cases(few):
    return settings(max_examples=CASES or few, derandomize=not CASES, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def outcome(read):
    """What is read, or None for an input error; its message is one printable line of reasonable length."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other packages' words on what they meet
            return read()
    except InputError as error:
        message = str(error)
        assert 20 < len(message) < 1500 and message.isprintable(), message
        return None


# Config ------------------------------------------------------------------------------------------------------

huge = st.sampled_from([0, -1, 1, 3, 10**9, 2**63, -(2**64), 10**400, 1e-300, 1e300, -1e308, 5e-324, math.nan, math.inf, -math.inf, 0.1])
words = st.text(max_size=12) | st.sampled_from(["Au", "nuts", "../../etc/passwd", "/dev/zero", "a\0b", "~nobody/x", "x" * 5000, "\n\r\x1b[2J", "."])
scalars = huge | st.integers() | st.floats() | st.booleans() | words | st.dates() | st.none()
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=3), max_leaves=8)
numbers = huge | st.floats(-500, 500) | st.integers(-20, 20)
plausible = numbers | st.lists(numbers, max_size=4)
DEFAULTS = Config().as_dict()
KEYS = [(section, key) for section, kind in SECTIONS.items() for key in kind.__dataclass_fields__]


def work_out(config):
    """All that the config says, from first to last, short of physics."""
    check_sampling(config)
    check_supported(config)
    config_from_dict(config.as_dict(), config.folder)
    detector_of(config), microscope_of(config), z_range_of(config), column_geometry(config)
    assert np.all(np.isfinite(config.focal_series.defocus)) and np.all(config.focal_series.dose > 0)
    assert len(config.focal_series.defocus) == len(config.focal_series.dose)


@cases(150)
@given(changes=st.lists(st.tuples(st.sampled_from(KEYS), values | plausible), min_size=1, max_size=3), whole=st.booleans())
def test_any_value_of_any_key_is_taken_or_refused(changes, whole):
    raw = {section: dict(keys) for section, keys in DEFAULTS.items()} if whole else {}
    for (section, key), value in changes:
        raw.setdefault(section, {})[key] = value
    config = outcome(lambda: config_from_dict(raw))
    if config is not None:
        outcome(lambda: work_out(config))


@cases(40)
@given(raw=st.dictionaries(words | st.sampled_from(list(SECTIONS)), values, max_size=3))
def test_any_table_is_taken_or_refused(raw):
    outcome(lambda: config_from_dict(raw))


LITERALS = ["nan", "-inf", "1e999", "9223372036854775808", "0x" + "f" * 40, "[" * 3000, "[]", "[[]]", "{a = 1}", '"\\u0000"', "1979-05-27T07:32:00Z", "''", '"""', "true", "-0.0", "[1, 'a']", "=", "9" * 5000]
LINES = Path(io.__file__).with_name("data").joinpath("demo.toml").read_text(encoding="utf-8").splitlines()


@cases(80)
@given(data=st.data())
def test_any_text_is_a_config_or_refused(tmp_path_factory, data):
    lines = list(LINES)
    for _ in range(data.draw(st.integers(1, 4))):
        i = data.draw(st.integers(0, len(lines) - 1))
        change = data.draw(st.sampled_from(["value", "key", "cut", "twice", "text"]))
        key, _, value = lines[i].partition("=")
        lines[i] = {
            "value": f"{key}= {data.draw(st.sampled_from(LITERALS))}",
            "key": f"{data.draw(words)} = {value}",
            "cut": lines[i][: data.draw(st.integers(0, 30))],
            "twice": f"{lines[i]}\n{lines[i]}",
            "text": data.draw(st.text(max_size=20)),
        }[change]
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    outcome(lambda: read_config(path))


@cases(60)
@given(data=st.data(), suffix=st.sampled_from(["csv", "toml"]))
def test_any_table_of_foci_is_taken_or_refused(tmp_path_factory, data, suffix):
    folder = tmp_path_factory.getbasetemp()
    good = {"csv": "file,defocus_A,dose_e_per_A2\nc.tif,-30,100\na.tif,0.5,200\n", "toml": 'file = ["c.tif", "a.tif"]\ndefocus_A = [-30, 0.5]\ndose_e_per_A2 = [100, 200]\n'}[suffix]
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(good))] * 2)))
    text = good[:start] + data.draw(st.text(max_size=20) | st.sampled_from([*LITERALS, '"', ",,,", "\0", "\r", "-1", "1e400"])) + good[end:]
    (folder / f"fuzz.{suffix}").write_bytes(text.encode("utf-8", "surrogatepass"))
    outcome(lambda: config_from_dict({"focal_series": {"foci_table": f"fuzz.{suffix}"}}, folder))


# Stacks ------------------------------------------------------------------------------------------------------

SETTINGS = {signal: config_from_dict({"focal_series": {"defocus_A": FOCI, "pixel_size_A": 0.2, "dose_e_per_A2": 1000.0, "signal": signal}}) for signal in ("counts", "fraction", "raw")}


def good_file(folder, kind):
    counts = np.random.default_rng(1).poisson(20.0, SHAPE)
    path = folder / f"good_{kind}.{kind.partition('_')[0]}"
    if kind == "nc_classic":
        import xarray

        xarray.Dataset({"stack": (("defocus", "y", "x"), counts.astype("i4"))}).to_netcdf(path, engine="scipy")
    elif kind == "tif_imagej":
        import tifffile

        tifffile.imwrite(path, counts.astype("u2"), imagej=True, resolution=(50, 50), metadata={"unit": "nm", "axes": "ZYX"})
    elif kind == "tif_deflate":
        import tifffile

        tifffile.imwrite(path, counts.astype("u2"), photometric="minisblack", compression="zlib")
    else:
        write_stack(path, Stack(counts, np.array(FOCI), 0.2, {"dose_e_per_A2": np.full(3, 1000.0)}))
    return path


# HDF5's own library may end the process on a damaged file, or never come back from it: altered bytes of .h5 are for the long run alone
KINDS = ["npz", "tif", "tif_imagej", "tif_deflate", "nc_classic"] + ["h5", "nc"] * bool(CASES)


def altered(data, whole):
    """The bytes after up to five cuts, insertions, copies and overwritten numbers."""
    whole = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(whole)))
        kind = data.draw(st.sampled_from(["flip", "write", "cut", "insert", "end", "copy"]))
        if kind == "flip" and at < len(whole):
            whole[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "write":
            number = data.draw(st.sampled_from([0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1]))
            put = number.to_bytes(8, data.draw(st.sampled_from(["little", "big"])))[: data.draw(st.sampled_from([1, 2, 4, 8]))]
            whole[at : at + len(put)] = put
        elif kind == "cut":
            del whole[at : at + data.draw(st.integers(1, 64))]
        elif kind == "insert":
            whole[at:at] = data.draw(st.binary(min_size=1, max_size=16))
        elif kind == "end":
            del whole[at:]
        elif kind == "copy":
            start = data.draw(st.integers(0, max(0, len(whole) - 1)))
            part = whole[start : start + 32]
            whole[at : at + len(part)] = part
    return bytes(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_an_altered_stack_is_read_or_refused(tmp_path, kind):
    path = good_file(tmp_path, kind)
    whole = path.read_bytes()
    assert outcome(lambda: read_stack(path, SETTINGS["counts"])) is not None

    @cases(60)
    @given(data=st.data())
    def check(data):
        path.write_bytes(altered(data, whole))
        stack = outcome(lambda: read_stack(path, SETTINGS["counts"]))
        if stack is not None:
            assert stack.data.ndim == 3 and len(stack.data) == 3 and np.all(np.isfinite(stack.data)) and stack.data.min() >= 0

    check()


anything = hnp.arrays(
    hnp.scalar_dtypes() | st.sampled_from([np.dtype("U3"), np.dtype("S3"), np.dtype("f2"), np.dtype([("a", "f8"), ("b", "i2")])]),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6) | st.just(SHAPE) | st.just((3,)),
)


@cases(60)
@given(stack=anything, entries=st.dictionaries(st.sampled_from(["defocus_A", "pixel_size_A", "dose_e_per_A2", "allow_pickle", "stack/x"]), anything, max_size=3), signal=st.sampled_from(sorted(SETTINGS)), suffix=st.sampled_from(["npz", "h5"]))
def test_any_arrays_are_a_stack_or_refused(tmp_path_factory, stack, entries, signal, suffix):
    path = tmp_path_factory.getbasetemp() / f"fuzz.{suffix}"
    if suffix == "npz":
        np.savez(path, **{"stack": stack} | entries)
    else:
        import h5py

        try:
            with h5py.File(path, "w") as file:
                for name, value in ({"stack": stack} | entries).items():
                    file[name.replace("/", "_")] = value
        except (TypeError, ValueError):  # HDF5 has no such type
            return
    outcome(lambda: read_stack(path, SETTINGS[signal]))


# Structures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["atoms.xyz", "atoms.cif", "POSCAR"])
def test_an_altered_structure_is_read_or_refused(tmp_path, name):
    from ase.build import bulk

    path = tmp_path / name
    bulk("Au", cubic=True).write(path, format={"atoms.xyz": "extxyz", "atoms.cif": "cif", "POSCAR": "vasp"}[name])
    whole = path.read_bytes()
    assert len(io.read_atoms(path)) == 4

    @cases(40)
    @given(data=st.data())
    def check(data):
        path.write_bytes(altered(data, whole))
        outcome(lambda: io.read_atoms(path))

    check()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("atoms.xyz", "1000000000\n\nAu 0 0 0\n", "declares 1000000000 atoms in 3 lines"),
        ("atoms.xyz", "1\n\nAu 0 0 0\n-5\n\n", "declares -5 atoms"),
        ("atoms.xyz", "1\nProperties=species:S:1:pos:R:3:x:R:1000000000000\nAu 0 0 0\n", "declares 1000000000004 columns in lines of"),
        ("atoms.xyz", "", "cannot read"),
        ("atoms.xyz", "0\n\n", "holds no atoms"),
        ("POSCAR", "Au\n1.0\n4 0 0\n0 4 0\n0 0 4\nAu\n1000000000\nDirect\n0 0 0\n", "declares 1000000000 atoms in 9 lines"),
        ("atoms.cif", "data_\n", "cannot read"),
        *[(f"atoms.{kind}", "- of UlmASE-Trajectory", "as a structure: allowed are .xyz") for kind in ("traj", "bundle", "db", "json", "py", "out")],
    ],
)
def test_a_structure_that_claims_too_much_or_may_run_code_is_refused_unread(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=said):
        io.read_atoms(tmp_path / name)


def test_a_structures_name_is_a_name_not_a_selection(tmp_path):
    (tmp_path / "at@0.xyz").write_text("1\n\nAu 0 0 0\n")
    assert len(io.read_atoms(tmp_path / "at@0.xyz")) == 1
