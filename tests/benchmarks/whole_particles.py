"""Error bars on whole particles: reconstructions of full multislice beside the truth, pooled over particles of several crystals and shapes.

    python tests/benchmarks/whole_particles.py FOLDER [CASE | FILE.npz ...]

A case is a particle cut from a crystal that ase builds, carried through full frozen-phonon multislice (`simulate_particle`, minutes a thermal configuration on one
core; its sums are kept in FOLDER, from which an interrupted run goes on; one case by abtem's potentials and propagation), with drift and Poisson noise, then reconstructed from its counts alone. FOLDER/CASE.npz
is laid out as the packaged stack; other such files, of gold at the paper's settings, are scored too. Default: all cases, the packaged particle and nanorod.

Prints one JSON object a case, and one of all columns together: columns found and with the right count; rms depth error, its part by the data's own finite number
of configurations (half the difference of noise-free fits to the means of two halves), the bound, and errors over bounds after that part; coverage and mean width of 90 % intervals; right lattice
planes; and the Gaussian peaks beside. Depths are compared after a particle's median error is taken off.
"""

import dataclasses
import json
import sys
from importlib import resources
from pathlib import Path

import jax
import numpy as np
from ase.lattice.cubic import BodyCenteredCubic, Diamond, FaceCenteredCubic
from scipy.fft import next_fast_len
from scipy.ndimage import fourier_shift
from tqdm import tqdm

jax.config.update("jax_enable_x64", True)

from depthprob.config import config_from_dict  # noqa: E402
from depthprob.data import make_nanorod  # noqa: E402
from depthprob.data.make_nanorod import columns_of  # noqa: E402
from depthprob.physics.electron import wavelength  # noqa: E402
from depthprob.physics.gram import default_sampling  # noqa: E402
from depthprob.physics.particle import hermitian_product, images_from_gram, simulate_particle  # noqa: E402
from depthprob.reconstruction.libraries import column_geometry, detector_of, microscope_of  # noqa: E402
from depthprob.reconstruction.pipeline import reconstruct  # noqa: E402
from depthprob.stack import Stack  # noqa: E402
from depthprob.storage import load_checkpoint, save_checkpoint  # noqa: E402

ALONG = {(0, 0, 1): [[1, 0, 0], [0, 1, 0], [0, 0, 1]], (1, 1, 0): [[0, 0, 1], [1, -1, 0], [1, 1, 0]], (1, 1, 1): [[1, -1, 0], [1, 1, -2], [1, 1, 1]]}
CRYSTALS = {"fcc": FaceCenteredCubic, "bcc": BodyCenteredCubic, "diamond": Diamond}


@dataclasses.dataclass(frozen=True)
class Case:
    """A particle, the microscope that looks at it, and how often it is drawn.

    Attributes
    ----------
    specimen, microscope, detector : dict
        As in a config.
    radius, thickness : float
        Of the particle across and along the beam, from which its two surfaces fall off [Å].
    vacuum : float
        Across, on either side [Å].
    slope : (2,)
        Of its middle.
    off : (2,)
        Of its middle from a column [Å].
    mirrored : bool
        Whether the particle is its own mirror image in y, so that each configuration counts twice.
    sampling : float, optional
        Of abtem's grid [Å], which then carries the waves in our place.
    """

    specimen: dict
    radius: float
    thickness: float
    configurations: int
    vacuum: float = 3.0
    slope: tuple[float, float] = (0.8, -0.5)
    off: tuple[float, float] = (0.4, 0.3)
    mirrored: bool = False
    sampling: float | None = None
    microscope: dict = dataclasses.field(default_factory=dict)
    detector: dict = dataclasses.field(default_factory=dict)
    pixel: float = 0.3

    def config(self, pixel: float, **inference):
        focal_series = {"pixel_size_A": pixel, "periodic": True}
        return config_from_dict({"specimen": self.specimen, "microscope": self.microscope, "detector": self.detector, "focal_series": focal_series, "inference": inference})

    @property
    def side(self) -> float:
        return round(2 * (self.radius + self.vacuum), 2)


CASES = {
    "gold_thick": Case({}, 6.3, 90.0, 12, slope=(1.5, -1.1), detector={"inner_mrad": 48.0, "outer_mrad": 120.0}),
    "platinum_110": Case(
        {"element": "Pt", "lattice_constant_A": 3.92, "zone_axis": [1, 1, 0], "debye_waller_B_A2": 0.38}, 5.6, 32.0, 8, vacuum=2.6, slope=(0.9, 0.0), off=(0.4, 0.693), mirrored=True,
        microscope={"energy_keV": 200.0, "convergence_angle_mrad": 24.0}, detector={"inner_mrad": 60.0, "outer_mrad": 120.0},
    ),
    "tungsten_001": Case(
        {"element": "W", "structure": "bcc", "lattice_constant_A": 3.165, "debye_waller_B_A2": 0.16}, 6.0, 30.0, 8, slope=(-1.0, 0.6),
        detector={"inner_mrad": 50.0, "outer_mrad": 140.0},
    ),
    "gold_110_abtem": Case(
        {"zone_axis": [1, 1, 0]}, 5.6, 40.0, 24, vacuum=2.6, slope=(-0.9, 0.7), off=(1.0, 0.2), sampling=0.04, detector={"inner_mrad": 48.0, "outer_mrad": 120.0}, pixel=0.25,
    ),
    "silver_001": Case({"element": "Ag", "lattice_constant_A": 4.086, "debye_waller_B_A2": 0.75}, 6.4, 34.0, 8, slope=(0.3, 1.2), detector={"inner_mrad": 48.0, "outer_mrad": 120.0}),
}


def atoms_of(case: Case) -> np.ndarray:
    """Atoms (N, 3) [Å] in the middle of a square cell of `case.side`, between two paraboloids that meet at the rim; columns of two atoms or more."""
    specimen = case.config(case.pixel).specimen
    directions = ALONG[tuple(specimen.zone_axis)]
    block = CRYSTALS[specimen.structure](directions=directions, symbol=specimen.element, latticeconstant=specimen.lattice_constant_A)
    repeats = [int(2 * reach / side) + 3 for reach, side in zip((case.radius, case.radius, case.thickness), block.cell.lengths(), strict=True)]
    atoms = block.repeat(repeats).positions
    centre = np.median(atoms, 0) + np.array([*case.off, 0.0])
    x, y, z = (atoms - centre).T
    tilted = z - case.slope[0] * x - case.slope[1] * y
    share = 1 - (x**2 + y**2) / (1.05 * case.radius) ** 2
    kept = (np.hypot(x, y) < case.radius) & (tilted > -0.5 * case.thickness * (0.35 + 0.65 * share)) & (tilted < 0.5 * case.thickness * (0.15 + 0.85 * share))
    columns = columns_of(atoms[kept])
    middle = (case.side / 2, case.side / 2, 0.0) - np.array([*centre[:2], np.median(columns[:, 3]) - 3.0])
    thin = columns[columns[:, 2] < 2, :2]
    inside = atoms[kept]
    single = (abs(inside[:, None, :2] - thin) < 0.01).all(2).any(1)
    return inside[~single] + middle


def gram_of(case: Case, checkpoint: Path, tilt: tuple[float, float] = (0.0, 0.0)) -> tuple[np.ndarray, np.ndarray]:
    """Gram matrices of two halves of the configurations (2, K, K) and their waves, by full multislice of the whole particle, its crystal tilted [mrad] whatever the config says.

    A mirrored particle may be tilted along x alone.
    """
    config = case.config(case.pixel)
    lens, detector = microscope_of(config), detector_of(config)
    sampling = default_sampling(lens.energy, detector.outermost, lens.convergence_angle)
    halves, waves = simulate_particle(
        atoms_of(case), config.specimen.element, config.specimen.debye_waller_b, (case.side, case.side), lens, detector, case.configurations, 0, sampling,
        checkpoint=checkpoint, progress=tqdm, tilt=tilt,
    )  # fmt: skip
    if case.mirrored:
        mirror = [int(np.flatnonzero((waves == wave).all(1))[0]) for wave in waves * [1, -1]]
        halves = (halves + halves[:, mirror][:, :, mirror]) / 2
    return halves, waves


def gram_by_abtem(case: Case, checkpoint: Path) -> tuple[np.ndarray, np.ndarray]:
    """As `gram_of`, the atoms' potentials and every wave's way through them by abtem: what is shared is which waves and angles count, and what images are made of their Gram matrix.

    Displacements are independent; potentials are exponentiated on a finer grid, where abtem's are near their limit (as in test_against_abtem.py).
    """
    import abtem

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from test_against_abtem import planes_of_abtem

    abtem.config.set({"diagnostics.progress_bar": False, "precision": "float32", "fftw.threads": 1})
    config, atoms = case.config(case.pixel), atoms_of(case)
    lens, detector, side, lam = microscope_of(config), detector_of(config), case.side, wavelength(config.microscope.energy_keV * 1e3)
    atoms[:, 2] = atoms[:, 2].round(3)
    n = next_fast_len(int(np.ceil(side / case.sampling)))
    frequency = np.fft.fftfreq(n, 1 / n).round().astype(int)
    sensitivity = detector.sensitivity(frequency[:, None] / side * lam * 1e3, frequency / side * lam * 1e3, lam * 1e3 / side)
    detected = np.flatnonzero(sensitivity)
    inside = np.hypot(frequency[:, None], frequency) / side < lens.convergence_angle * 1e-3 / lam + 0.5 / side
    waves = frequency[np.stack(np.nonzero(inside), 1)]
    along_x, along_y = (np.exp(2j * np.pi * np.outer(waves[:, axis], np.arange(n)) / n) for axis in (0, 1))
    entrance = np.exp(-1j * np.pi * lam * (waves**2).sum(1) / side**2 * atoms[:, 2].min()) / n**2
    settings = repr(dataclasses.replace(case, configurations=0))
    saved = load_checkpoint(checkpoint) or {"total": np.zeros((2, len(waves), len(waves)), complex), "done": 0, "settings": settings}
    if str(saved.get("settings")) != settings:
        raise SystemExit(f"{checkpoint} holds sums of another case ({saved.get('settings')}) than {settings}. Delete it to start afresh.")
    total, rms = saved["total"], np.sqrt(config.specimen.debye_waller_b / (8 * np.pi**2))
    for i in tqdm(range(int(saved["done"]), case.configurations), desc="whole particle by abtem", unit="configuration"):
        moved = atoms + np.random.default_rng([7, i]).normal(0, rms, atoms.shape) * [1, 1, 0]
        planes = planes_of_abtem(moved, config.specimen.element, (side, side), (n, n), lens.energy, 4, "lobato")
        seen = np.empty((len(waves), len(detected)), np.complex64)
        for part in np.array_split(np.arange(len(waves)), len(waves) // 16):
            incident = (entrance[part, None, None] * along_x[part, :, None] * along_y[part, None]).astype(np.complex64)
            here = abtem.waves.Waves(incident, energy=lens.energy, extent=(side, side), ensemble_axes_metadata=[abtem.core.axes.UnknownAxis()])
            propagator, band = abtem.multislice.FresnelPropagator(), abtem.antialias.AntialiasAperture()
            for k in range(len(planes)):
                here = abtem.multislice.conventional_multislice_step(here, planes.get_chunk(k, k + 1), propagator, band)
            seen[part] = np.fft.fft2(here.array).reshape(len(part), -1)[:, detected] * np.sqrt(sensitivity.ravel()[detected])
        total[i % 2] += hermitian_product(seen)
        save_checkpoint(checkpoint, total=total, done=i + 1, settings=settings)
    return total / np.maximum([(case.configurations + 1) // 2, case.configurations // 2], 1)[:, None, None], waves


def simulate(case: Case, name: str, folder: Path) -> Path:
    """Write FOLDER/NAME.npz."""
    path, pixels = folder / f"{name}.npz", round(case.side / case.pixel)
    if path.exists():
        return path
    pixel = case.side / pixels
    config, atoms = case.config(pixel), atoms_of(case)
    lens, foci, cell = microscope_of(config), np.asarray(config.focal_series.defocus), (case.side, case.side)
    halves, waves = (gram_by_abtem if case.sampling else gram_of)(case, folder / f"{name}_gram.npz")
    rng = np.random.default_rng(len(atoms))
    drift = np.cumsum(rng.normal(0, 0.15, (len(foci), 2)), 0)
    drift -= drift.mean(0)
    images = lambda gram, shifts: np.maximum(images_from_gram(gram, waves, cell, lens, foci, (pixels, pixels), shifts), 0)
    dose = float(config.focal_series.dose[0])
    np.savez_compressed(
        path, stack=rng.poisson(images(halves.mean(0), drift) * dose * pixel**2).astype(np.uint16), expected_a=images(halves[0], None).astype(np.float32),
        expected_b=images(halves[1], None).astype(np.float32), defocus_A=foci, pixel_size_A=pixel, dose_e_per_A2=dose, drift_A=drift, atoms_A=atoms, columns=columns_of(atoms),
    )  # fmt: skip
    return path


def matched(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Index (C,) of the found column nearest to each true one after a common shift, -1 where none is within 0.8 Å."""
    steps = [np.array([x, y]) for x in np.arange(-1.5, 1.6, 0.25) for y in np.arange(-1.5, 1.6, 0.25)]
    distances = [np.hypot(*(truth[:, None] - found - step).transpose(2, 0, 1)) for step in steps]
    distance = min(distances, key=lambda d: np.median(d.min(1)))
    return np.where(distance.min(1) < 0.8, distance.argmin(1), -1)


def scored(config, path: Path, pixel: float) -> tuple[dict, dict]:
    """Arrays over the columns with the right count, and what concerns the particle as a whole."""
    with np.load(path) as saved:
        truth, foci, dose = saved["columns"], saved["defocus_A"], float(saved["dose_e_per_A2"])
        stack, halves = saved["stack"].astype(float), [saved[f"expected_{h}"].astype(float) * dose * pixel**2 for h in "ab"]
    settings = {"dose_e_per_A2": dose, "signal": "counts"}
    found = reconstruct(Stack(stack, foci, pixel, settings), config, quiet=True)
    match = matched(found.positions, truth[:, :2])
    right = (match >= 0) & (found.n_atoms[match] == truth[:, 2])
    of_halves = np.full((2, len(truth)), np.nan)
    for own, half in zip(of_halves, halves, strict=True):
        fit = reconstruct(Stack(half, foci, pixel, settings), config, quiet=True)
        at = matched(fit.positions, truth[:, :2])
        good = (at >= 0) & (fit.n_atoms[at] == truth[:, 2])
        own[good] = fit.depth[at[good]]
    data = (of_halves[0] - of_halves[1])[right] / 2
    data = data - np.nanmedian(data)
    of = match[right]
    error, peak = (d[of] - truth[right, 3] for d in (found.depth, found.gaussian_depth))
    offset = np.median(error)
    whole = {"columns": len(truth), "found": int((match >= 0).sum()), "extra": len(found.positions) - len(set(match[match >= 0])), "offset_A": round(float(offset), 2), "warnings": found.warnings, "atoms": [int(truth[:, 2].min()), int(truth[:, 2].max())]}
    arrays = {
        "n": truth[right, 2], "error": error - offset, "sd": found.depth_sd[of], "crlb": found.crlb[of], "data": data, "peak": peak - np.nanmedian(peak), "width": (found.depth_q95 - found.depth_q05)[of],
        "inside": (found.depth_q05[of] - offset < truth[right, 3]) & (truth[right, 3] < found.depth_q95[of] - offset), "spacing": np.full(len(of), column_geometry(config).spacing), "shift": found.superposition_shift[of],
    }  # fmt: skip
    return arrays, whole


def summary(a: dict) -> dict:
    rms = lambda values: float(np.sqrt(np.nanmean(np.square(values))))
    beyond = np.sqrt(max(rms(a["error"]) ** 2 - rms(a["data"]) ** 2, 0.0))
    figures = {
        "error_A": rms(a["error"]), "data_A": rms(a["data"]), "crlb_A": rms(a["crlb"]), "error_over_crlb": rms(a["error"]) / rms(a["crlb"]), "error_over_crlb_without_data": beyond / rms(a["crlb"]),
        "error_over_sd": rms(a["error"] / a["sd"]), "covered_90": float(a["inside"].mean()), "width_90_A": float(a["width"].mean()), "right_plane": float((abs(a["error"]) < a["spacing"] / 2).mean()),
        "gaussian_A": rms(a["peak"]), "gaussian_right_plane": float((abs(a["peak"]) < a["spacing"] / 2).mean()), "superposition_shift_A": rms(a["shift"]),
    }  # fmt: skip
    return {"right_count": len(a["n"])} | {k: round(v, 3) for k, v in figures.items()}


def nanorod(folder: Path) -> Path:
    """Write FOLDER/nanorod.npz: the packaged rod's mean images with drift and noise."""
    path = folder / "nanorod.npz"
    if not path.exists():
        halves, atoms = make_nanorod.load(Path(str(resources.files("depthprob.data") / "nanorod.npz")))
        rng, dose = np.random.default_rng(2), 9612.0
        drift = np.cumsum(rng.normal(0, 0.15, (len(make_nanorod.DEFOCUS), 2)), 0)
        drift -= drift.mean(0)
        moved = [np.fft.ifft2(fourier_shift(np.fft.fft2(image), shift[::-1] / make_nanorod.PIXEL)).real for image, shift in zip(halves.mean(0), drift, strict=True)]
        counts = rng.poisson(np.maximum(moved, 0) * dose * make_nanorod.PIXEL**2).astype(np.uint16)
        a, b = halves.astype(np.float32)
        np.savez_compressed(path, stack=counts, expected_a=a, expected_b=b, defocus_A=make_nanorod.DEFOCUS, pixel_size_A=make_nanorod.PIXEL, dose_e_per_A2=dose, drift_A=drift, columns=columns_of(atoms))
    return path


def main(folder: str, *names: str) -> None:
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    every = []
    for name in names or (*CASES, str(resources.files("depthprob.data") / "demo_stack.npz"), "nanorod"):
        case = CASES.get(name, Case({}, 0.0, 0.0, 0))
        path = simulate(case, name, folder) if name in CASES else nanorod(folder) if name == "nanorod" else Path(name)
        with np.load(path) as saved:
            pixel = float(saved["pixel_size_A"])
        arrays, whole = scored(case.config(pixel), path, pixel)
        every.append(arrays)
        print(json.dumps({"case": Path(name).stem} | whole | summary(arrays), ensure_ascii=False), flush=True)
    print(json.dumps({"case": "all"} | summary({k: np.concatenate([a[k] for a in every]) for k in every[0]})))


if __name__ == "__main__":
    main(*sys.argv[1:])
