"""Settings of an experiment and its analysis, read from TOML.

One frozen dataclass per section, one field per key, the unit in the key. Whatever is absent takes the
default written here; an unknown key or section is an error.
"""

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .checks import Check, angle, chemical_symbol, choice, choices, fail, flag, list_of, nearest, not_negative, number, one_or_list, positive, text
from .errors import InputError
from .table import read_table

ELEMENTARY_CHARGE = 1.602176634e-19  # C, exact since 2019
MAX_IMAGES = 100_000
METHODS = ("mle", "laplace", "svi", "nuts")
STRUCTURES = ("fcc", "bcc", "hcp", "diamond", "cell_file")
NUISANCES = (
    "positions",
    "background",
    "gain",
    "image_shifts",
    "focus_offset",
    "focus_step",
    "source_size",
)
FREE = (*NUISANCES, "image_distortions")
CRLB_NUISANCES = (*NUISANCES, "focal_spread", "debye_waller_B")
DESIGN_VARIABLES = ("defocus", "dose", "convergence_angle", "detector")
PRIORS = ("depth_A", "position_A", "gain", "background", "image_shift_A", "focus_offset_A", "focus_step", "source_variance_A2")
CRLB_PRIORS = (*PRIORS, "focal_variance_A2", "debye_waller_B_A2")
ABERRATIONS = tuple(
    f"C{n}{m}"
    for n, ms in {1: "2", 2: "13", 3: "024", 4: "135", 5: "0246"}.items()
    for m in ms
    if (n, m) != (3, "0")
)


def _aberrations(name: str, value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise fail(name, value, f"a table [{name}] of magnitudes and azimuths")
    known = [f"{a}_A" for a in ABERRATIONS]
    known += [f"phi{a[1:]}_deg" for a in ABERRATIONS if not a.endswith("0")]
    read = {}
    for key, entry in value.items():
        if key not in known:
            special = {
                "C10_A": "Defocus belongs in [focal_series].",
                "C30_A": "Write microscope.spherical_aberration_mm instead.",
            }
            raise InputError(
                f"unknown key {key!r} in [{name}]. {special.get(key) or nearest(key, known)}"
            )
        read[key] = number(at_least=0.0 if key.endswith("_A") else None)(f"{name}.{key}", entry)
    for key in read:
        if key.startswith("phi") and f"C{key[3:5]}_A" not in read:
            raise InputError(
                f"{name}.{key} is given without C{key[3:5]}_A. Give the magnitude too."
            )
    return read


def _key(default: Any, check: Check) -> Any:
    """A field with the check of its value; `None` stands for absent."""
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata={"check": check})
    return dataclasses.field(default=default, metadata={"check": check})


# The sections --------------------------------------------------------------------------------------


def _prior_sd(known: tuple[str, ...]) -> Check:
    def check(name: str, value: Any) -> dict[str, float]:
        if not isinstance(value, Mapping):
            raise fail(name, value, f"a table [{name}] of standard deviations")
        for key in value:
            if key not in known:
                raise InputError(f"unknown key {key!r} in [{name}]. {nearest(key, known)}")
        return {key: number(above=0.0)(f"{name}.{key}", entry) for key, entry in value.items()}

    return check


@dataclasses.dataclass(frozen=True)
class MicroscopeConfig:
    """[microscope]: the probe."""

    energy_keV: float = _key(300.0, number(at_least=1.0, at_most=10_000.0))
    convergence_angle_mrad: float = _key(21.0, angle)
    spherical_aberration_mm: float = _key(0.0, number())
    source_fwhm_A: float = _key(0.7, not_negative)
    focal_spread_A: float = _key(0.0, not_negative)
    aberrations: dict[str, float] = _key({}, _aberrations)


@dataclasses.dataclass(frozen=True)
class DetectorConfig:
    """[detector]: annulus or annuli, and how raw values come from counts.

    `sensitivity` names a .npy file, the share of an electron (0 to 2, 1 for whole ones) that is recorded where it hits: an array (y, x) with the
    optic axis in its middle, or (angle,) from the axis outwards, pixels `sensitivity_pixel_mrad` apart. It holds between inner_mrad and outer_mrad.
    """

    inner_mrad: float | tuple[float, ...] = _key(
        48.0, one_or_list(number(at_least=0.0, at_most=1000.0))
    )
    outer_mrad: float | tuple[float, ...] = _key(180.0, one_or_list(angle))
    sensitivity: str | None = _key(None, text)
    sensitivity_pixel_mrad: float | None = _key(None, angle)
    gain: float = _key(1.0, positive)
    offset: float = _key(0.0, number())
    read_noise: float = _key(0.0, not_negative)

    @property
    def inner(self) -> np.ndarray:
        """Inner angles [mrad], (annulus,)."""
        return np.atleast_1d(np.asarray(self.inner_mrad, float))

    @property
    def outer(self) -> np.ndarray:
        """Outer angles [mrad], (annulus,)."""
        return np.atleast_1d(np.asarray(self.outer_mrad, float))

    def validate(self) -> None:
        if isinstance(self.inner_mrad, tuple) != isinstance(self.outer_mrad, tuple) or len(
            self.inner
        ) != len(self.outer):
            raise InputError(
                f"detector.inner_mrad is {self.inner_mrad!r} and detector.outer_mrad is {self.outer_mrad!r}; "
                "allowed are two numbers, or two lists of equal length. Give one outer angle for each inner angle."
            )
        for inner, outer in zip(self.inner, self.outer, strict=True):
            if outer <= inner:
                raise InputError(
                    f"detector.outer_mrad is {outer:g} and detector.inner_mrad is {inner:g}; the outer angle "
                    "must be the larger. Exchange them, or widen the annulus."
                )
        if (self.sensitivity is None) != (self.sensitivity_pixel_mrad is None):
            raise InputError(
                f"detector.sensitivity is {self.sensitivity!r} and detector.sensitivity_pixel_mrad is {self.sensitivity_pixel_mrad}; allowed are both, "
                "a .npy file and the angle between its pixels, or neither."
            )
        order = np.argsort(self.inner)
        if np.any(self.inner[order][1:] < self.outer[order][:-1]):
            raise InputError(
                f"detector.inner_mrad is {list(self.inner)} and detector.outer_mrad is {list(self.outer)}: annuli overlap, and would record "
                "an electron twice. Make them one, or move their edges apart."
            )


@dataclasses.dataclass(frozen=True)
class FocalSeriesConfig:
    """[focal_series]: foci, pixels and dose."""

    defocus_A: tuple[float, ...] | None = _key(None, list_of(number()))
    defocus_start_A: float | None = _key(-200.0, number())
    defocus_stop_A: float | None = _key(200.0, number())
    defocus_step_A: float | None = _key(10.0, number())
    pixel_size_A: float = _key(0.1, positive)
    dose_e_per_A2: float | tuple[float, ...] | None = _key(9612.0, one_or_list(positive))
    probe_current_pA: float | None = _key(None, positive)
    dwell_time_us: float | None = _key(None, positive)
    signal: str = _key("counts", choice(("counts", "fraction", "raw")))
    periodic: bool = _key(False, flag)
    field_of_view_A: float = _key(12.0, positive)
    foci_table: str | None = _key(None, text)
    image_files: tuple[str, ...] | None = _key(None, list_of(text))
    drift_file: str | None = _key(None, text)  # shifts found elsewhere, as in drift.csv; the fit starts from them

    @property
    def defocus(self) -> np.ndarray:
        """Foci [Å], (focus,); positive is underfocus."""
        if self.defocus_A is not None:
            return np.asarray(self.defocus_A, float)
        start, step = self.defocus_start_A, self.defocus_step_A
        assert start is not None and step is not None
        return start + step * np.arange(self._number_of_images())

    @property
    def dose(self) -> np.ndarray:
        """Dose of every image [e/Å²], (focus,); current times dwell time per pixel area where those are given."""
        foci = len(self.defocus)
        if self.probe_current_pA is not None and self.dwell_time_us is not None:
            charge = self.probe_current_pA * 1e-12 * self.dwell_time_us * 1e-6  # C per pixel
            return np.full(foci, charge / ELEMENTARY_CHARGE / self.pixel_size_A**2)
        return np.broadcast_to(np.asarray(self.dose_e_per_A2, float), (foci,)).copy()

    def _number_of_images(self) -> int:
        start, stop, step = self.defocus_start_A, self.defocus_stop_A, self.defocus_step_A
        assert start is not None and stop is not None and step is not None
        return round((stop - start) / step) + 1

    def validate(self) -> None:
        if self.defocus_A is None:
            self._validate_range()
        elif len(set(self.defocus_A)) != len(self.defocus_A):
            twice = next(f for f in self.defocus_A if self.defocus_A.count(f) > 1)
            raise InputError(
                f"focal_series.defocus_A holds {twice:g} more than once; every focus must be distinct. "
                "Remove the repetition, and its image from the stack."
            )
        if (self.probe_current_pA is None) != (self.dwell_time_us is None):
            given, other = "probe_current_pA", "dwell_time_us"
            if self.probe_current_pA is None:
                given, other = other, given
            raise InputError(
                f"focal_series.{given} is given without {other}. Give both, or dose_e_per_A2 alone."
            )
        if isinstance(self.dose_e_per_A2, tuple) and len(self.dose_e_per_A2) != len(self.defocus):
            raise InputError(
                f"focal_series.dose_e_per_A2 lists {len(self.dose_e_per_A2)} doses for {len(self.defocus)} foci; "
                "allowed is one number, or one for every image."
            )
        if self.image_files is not None and len(self.image_files) != len(self.defocus):
            raise InputError(
                f"focal_series.image_files names {len(self.image_files)} files for {len(self.defocus)} foci; "
                "allowed is one file for every focus, in the same order."
            )

    def _validate_range(self) -> None:
        start, stop, step = self.defocus_start_A, self.defocus_stop_A, self.defocus_step_A
        if start is None or stop is None or step is None:
            raise InputError(
                "focal_series needs defocus_A, or defocus_start_A, _stop_A and _step_A together."
            )
        given = f"defocus_start_A = {start:g}, defocus_stop_A = {stop:g}, defocus_step_A = {step:g}"
        if step == 0 or (stop - start) / step < 0:
            raise InputError(
                f"focal_series has {given}: this step never leads from start to stop. "
                "Allowed is a step other than zero, with the sign of stop - start."
            )
        steps = (stop - start) / step
        if steps >= MAX_IMAGES:
            raise InputError(
                f"focal_series has {given}: {steps:.3g} images; allowed are {MAX_IMAGES}."
            )
        if abs(steps - round(steps)) > 1e-6 * max(1.0, steps):
            raise InputError(
                f"focal_series has {given}: stop is not a whole number of steps from start. "
                f"Set defocus_stop_A = {start + step * math.floor(steps):g}, or list the foci in defocus_A."
            )


@dataclasses.dataclass(frozen=True)
class SpecimenConfig:
    """[specimen]: the crystal, or an isolated column of it."""

    element: str = _key("Au", chemical_symbol)
    structure: str = _key("fcc", choice(STRUCTURES))
    cell_file: str | None = _key(None, text)
    lattice_constant_A: float = _key(4.08, number(above=0.0, at_most=1000.0))
    lattice_constant_c_A: float | None = _key(None, number(above=0.0, at_most=1000.0))  # hcp; ideal by default
    zone_axis: tuple[int, ...] = _key((0, 0, 1), list_of(number(at_least=-9, at_most=9, whole=True), 3))
    debye_waller_B_A2: float | None = _key(0.63, not_negative)
    rms_displacement_A: float | None = _key(None, not_negative)
    n_atoms: int = _key(10, number(at_least=1, whole=True))
    tilt_mrad: tuple[float, ...] = _key((0.0, 0.0), list_of(number(at_least=-50.0, at_most=50.0), 2))
    structure_file: str | None = _key(None, text)

    @property
    def debye_waller_b(self) -> float:
        """B [Å²] = 8 pi² u², u the rms displacement along one axis."""
        if self.rms_displacement_A is not None:
            return 8 * math.pi**2 * self.rms_displacement_A**2
        assert self.debye_waller_B_A2 is not None
        return self.debye_waller_B_A2

    def validate(self) -> None:
        if not any(self.zone_axis):
            raise fail(
                "specimen.zone_axis", list(self.zone_axis), "three whole numbers not all zero"
            )
        if self.lattice_constant_c_A is not None and self.structure != "hcp":
            raise fail("specimen.lattice_constant_c_A", self.lattice_constant_c_A, "left out unless structure = 'hcp'")
        if (self.structure == "cell_file") != (self.cell_file is not None):
            raise InputError(
                f"specimen.structure is {self.structure!r} and specimen.cell_file is {self.cell_file!r}; a unit "
                "cell from a file needs both structure = 'cell_file' and cell_file = 'name.cif'."
            )


@dataclasses.dataclass(frozen=True)
class SimulationConfig:
    """[simulation]: numerics; absent samplings are chosen from the detector."""

    parametrization: str = _key("lobato", choice(("lobato", "kirkland")))
    potential_sampling_A: float | None = _key(None, positive)
    cell_A: float | None = _key(None, positive)
    memory_limit_GB: float | None = _key(None, positive)


@dataclasses.dataclass(frozen=True)
class ThermalConfig:
    """[thermal]: how atoms shake.

    `configurations` and `seed` are drawn for structure files, tilted columns and detectors that are not round; other columns are averaged
    over all configurations in closed form.
    """

    model: str = _key("frozen_phonon", choice(("frozen_phonon", "absorptive")))
    configurations: int = _key(32, number(at_least=1, whole=True))
    seed: int = _key(0, number(at_least=0, at_most=2**32 - 1, whole=True))


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
    """[inference]: the estimator and what it leaves free beside the depths.

    Noise "over_dispersed" has a variance in proportion to the mean, by a factor inferred from the residuals. A "smooth" background varies slowly over
    each image, as that of a support film. Superposition "corrected" takes from the depths what a sum of isolated columns gets wrong, "plain" leaves it, and "auto"
    corrects fields with columns thick enough for it to matter, where that takes minutes. `prior_sd` replaces standard deviations of the normal priors: of depths about zero, of positions, shifts and the logarithms of backgrounds about where
    the fit starts, of the logarithms of gains about zero, of the focus step about one, of distortions about zero.

    "image_distortions" in `free` lets each image be stretched and sheared against the others, as drift during its scan does.
    """

    method: str = _key("laplace", choice(METHODS))
    free: tuple[str, ...] = _key(NUISANCES[:4], choices(FREE))
    noise: str = _key("poisson", choice(("poisson", "over_dispersed")))
    background: str = _key("constant", choice(("constant", "smooth")))
    superposition: str = _key("auto", choice(("auto", "corrected", "plain")))
    prior_sd: dict[str, float] = _key({}, _prior_sd((*PRIORS, "image_distortion")))
    max_atoms: int | None = _key(None, number(at_least=1, whole=True))
    samples: int = _key(500, number(at_least=1, whole=True))
    chains: int = _key(2, number(at_least=1, whole=True))
    seed: int = _key(0, number(at_least=0, at_most=2**32 - 1, whole=True))

    def validate(self) -> None:
        if self.background == "smooth" and "background" not in self.free:
            raise InputError(f"inference.background is 'smooth', but inference.free is {list(self.free)}; a smooth background is fitted. Add \"background\" to free.")


@dataclasses.dataclass(frozen=True)
class CrlbConfig:
    """[crlb]: which bounds.

    `prior_sd` are standard deviations of what is known beforehand; their precisions add to the information on the column's depth and the nuisances.
    """

    atoms: bool = _key(True, flag)
    max_atoms: int | None = _key(None, number(at_least=1, whole=True))
    nuisances: tuple[str, ...] = _key(("positions", "background"), choices(CRLB_NUISANCES))
    prior_sd: dict[str, float] = _key({}, _prior_sd(CRLB_PRIORS))


def _columns(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    pairs = list_of(list_of(number(), 2))(name, value)
    count = number(at_least=1, whole=True)
    return tuple((count(f"{name}[{i}][0]", given[0]), pair[1]) for i, (given, pair) in enumerate(zip(value, pairs, strict=True)))


@dataclasses.dataclass(frozen=True)
class DesignConfig:
    """[design]: what may vary, for which columns, and what counts.

    `columns` lists [atoms, depth in Å]; absent, those of specimen.structure_file, else one of specimen.n_atoms at depth zero. Each
    stands for itself and for depths `depth_range_A` above and below, since no depth is known before the measurement. `spread_share` of
    the dose stays on the config's own foci, for drift, counts and goodness of fit.
    """

    vary: tuple[str, ...] = _key(DESIGN_VARIABLES, choices(DESIGN_VARIABLES))
    columns: tuple[tuple[int, float], ...] | None = _key(None, _columns)
    depth_range_A: float = _key(10.0, not_negative)
    goal: str = _key("mean", choice(("mean", "worst")))
    nuisances: tuple[str, ...] = _key(("positions", "background", "gain"), choices(NUISANCES))
    defocus_range_A: tuple[float, ...] | None = _key(None, list_of(number(), 2))
    convergence_angle_range_mrad: tuple[float, ...] = _key((15.0, 30.0), list_of(angle, 2))
    detector_range_mrad: tuple[float, ...] = _key((35.0, 200.0), list_of(angle, 2))
    annuli: int = _key(1, number(at_least=1, at_most=4, whole=True))
    spread_share: float = _key(0.2, number(at_least=0.0, at_most=0.9))
    join_foci_closer_than_A: float = _key(5.0, positive)
    target_depth_sd_A: float = _key(0.5, positive)
    steps: int = _key(60, number(at_least=1, whole=True))

    def validate(self) -> None:
        for key in ("defocus_range_A", "convergence_angle_range_mrad", "detector_range_mrad"):
            pair = getattr(self, key)
            if pair is not None and pair[0] >= pair[1]:
                raise fail(f"design.{key}", list(pair), "[smallest, largest]")
        if "focus_offset" in self.nuisances:
            raise InputError("design.nuisances holds 'focus_offset', but the depth of an isolated column and a free focus offset cannot be told apart. Leave it out.")


@dataclasses.dataclass(frozen=True)
class Config:
    """All sections, with the folder from which relative file names count.

    Attributes
    ----------
    folder : Path
        Where the config lay.
    """

    microscope: MicroscopeConfig = dataclasses.field(default_factory=MicroscopeConfig)
    detector: DetectorConfig = dataclasses.field(default_factory=DetectorConfig)
    focal_series: FocalSeriesConfig = dataclasses.field(default_factory=FocalSeriesConfig)
    specimen: SpecimenConfig = dataclasses.field(default_factory=SpecimenConfig)
    simulation: SimulationConfig = dataclasses.field(default_factory=SimulationConfig)
    thermal: ThermalConfig = dataclasses.field(default_factory=ThermalConfig)
    inference: InferenceConfig = dataclasses.field(default_factory=InferenceConfig)
    crlb: CrlbConfig = dataclasses.field(default_factory=CrlbConfig)
    design: DesignConfig = dataclasses.field(default_factory=DesignConfig)
    folder: Path = dataclasses.field(default=Path(), compare=False)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Sections and keys as in the file, defaults filled in, absent keys left out."""
        sections = {}
        for section in SECTIONS:
            values = dataclasses.asdict(getattr(self, section)).items()
            sections[section] = {
                k: list(v) if isinstance(v, tuple) else v for k, v in values if v is not None
            }
        return sections

    def resolve(self, name: str) -> Path:
        """Path of a file named in the config, relative to the config's own folder."""
        return self.folder / Path(name).expanduser()


SECTIONS = {f.name: f.default_factory for f in dataclasses.fields(Config) if f.name != "folder"}

# Two ways of saying the same: either side may be given, never both.
ALTERNATIVES = {
    "focal_series": (
        (("defocus_A",), ("defocus_start_A", "defocus_stop_A", "defocus_step_A")),
        (("probe_current_pA", "dwell_time_us"), ("dose_e_per_A2",)),
    ),
    "specimen": ((("rms_displacement_A",), ("debye_waller_B_A2",)),),
}


def _read_section(section: str, raw: Any) -> Any:
    """One section from its TOML table, checked."""
    kind: Any = SECTIONS[section]
    if not isinstance(raw, Mapping):
        raise fail(section, raw, f"a table [{section}] of keys")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in fields:
            raise InputError(f"unknown key {key!r} in [{section}]. {nearest(key, fields)}")
        values[key] = fields[key].metadata["check"](f"{section}.{key}", value)
    for special, usual in ALTERNATIVES.get(section, ()):
        given = [k for k in special if k in values]
        both = [k for k in usual if k in values]
        if given and both:
            raise InputError(
                f"[{section}] gives both {given[0]} and {both[0]}; allowed is one. Remove the other."
            )
        if given:
            values |= dict.fromkeys(usual)
    read = kind(**values)
    if hasattr(read, "validate"):
        read.validate()
    return read


def _with_foci_table(table: Any, folder: Path) -> Any:
    """[focal_series] with what its foci_table says."""
    if not isinstance(table, Mapping) or not isinstance(table.get("foci_table"), str):
        return table
    names = {"defocus_A": "defocus_A", "dose_e_per_A2": "dose_e_per_A2", "file": "image_files"}
    columns = read_table(folder / Path(table["foci_table"]).expanduser(), "foci_table", ("defocus_A",), ("dose_e_per_A2",), ("file",))
    found = {names[name]: values for name, values in columns.items()}
    rivals = [k for k in table if k in found or (k.startswith("defocus_") and "defocus_A" in found)]
    if rivals:
        raise InputError(f"[focal_series] gives both foci_table and {rivals[0]}; allowed is one. Remove the other.")
    return {**table, **found}


def config_from_dict(raw: Mapping[str, Any], folder: str | Path = ".") -> Config:
    """Config from sections of keys, as `tomllib` reads them.

    Raises
    ------
    InputError
        Unknown section or key (the nearest known one is named), wrong type, value out of range, two
        keys that exclude each other, or a named file that does not exist.
    """
    for section in raw:
        if section not in SECTIONS:
            raise InputError(f"unknown section {section!r}. {nearest(section, SECTIONS)}")
    if "focal_series" in raw:
        raw = {**raw, "focal_series": _with_foci_table(raw["focal_series"], Path(folder))}
    sections = {section: _read_section(section, table) for section, table in raw.items()}
    config = Config(**sections, folder=Path(folder))
    for name, value in {
        "specimen.structure_file": config.specimen.structure_file,
        "specimen.cell_file": config.specimen.cell_file,
        "detector.sensitivity": config.detector.sensitivity,
        "focal_series.drift_file": config.focal_series.drift_file,
    }.items():
        if value is not None and not config.resolve(value).is_file():
            raise InputError(
                f"{name} is {value!r}, but there is no file {str(config.resolve(value))!r}. "
                "Relative names count from the folder of the config."
            )
    return config


def read_config(path: str | Path) -> Config:
    """Read and check a TOML file of settings.

    Raises
    ------
    InputError
        No such file, not TOML, or any fault that `config_from_dict` finds; the message names the file.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise InputError(f"no config file {str(path)!r}. Give the path of a TOML file.") from None
    except OSError as error:
        raise InputError(f"cannot read config {str(path)!r}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text ({error.reason}). Save it as UTF-8.") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits and brackets in thousands are no TOMLDecodeError
        raise InputError(f"{path} is no valid TOML: {error}.") from None
    try:
        return config_from_dict(raw, path.parent)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def check_supported(config: Config) -> None:
    """Refuse settings that are part of the config's contract but that no model here follows yet, rather than ignore them.

    Raises
    ------
    InputError
        Naming the setting and what to give instead.
    """
    if config.thermal.model == "absorptive" and config.specimen.structure_file:
        raise fail("thermal.model", "absorptive", "'frozen_phonon' for a structure file; isolated columns take both")


def check_sampling(config: Config) -> None:
    """Refuse a `potential_sampling_A` whose 2/3 band limit does not reach the detector's outer angle.

    A grid of step s carries q up to 1 / (2 s), two thirds of it free of aliasing: angles up to
    wavelength / (3 s).

    Raises
    ------
    InputError
        Naming the sampling that would do.
    """
    sampling = config.simulation.potential_sampling_A
    if sampling is None:
        return
    from .physics.electron import wavelength

    wave = float(wavelength(config.microscope.energy_keV * 1e3))
    reach = 1e3 * wave / (3 * sampling)
    outer = float(config.detector.outer.max())
    if reach < outer:
        needed = math.floor(1e7 * wave / (3 * outer)) / 1e4
        raise InputError(
            f"simulation.potential_sampling_A is {sampling:g} Å, whose 2/3 band limit is {reach:.1f} mrad at "
            f"{config.microscope.energy_keV:g} keV, but detector.outer_mrad is {outer:g}. "
            f"Set potential_sampling_A = {needed:.4f} or finer, or leave it out to have it chosen."
        )
