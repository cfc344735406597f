"""The two jobs that end in a folder of results: a user's stack, and the packaged one."""

from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from . import processes
from .config import Config, read_config
from .inference.posterior import write_netcdf
from .io import write_columns_csv, write_drift_csv, write_json, write_xyz
from .reconstruction.libraries import read_library
from .reconstruction.pipeline import Reconstruction, reconstruct, refuse_beyond_limit
from .reconstruction.surface import surface_as_dict
from .report import write_report
from .stack import read_stack
from .statstem import ColumnResult, write_statstem


def write(result: Reconstruction, folder: Path) -> None:
    """The files of a reconstruction: columns.csv, columns.mat (of the fit to the average image, as StatSTEM keeps it), drift.csv, posterior.nc, structure.xyz, surface.json, report.html, provenance.json."""
    folder = Path(folder)
    write_columns_csv(
        folder / "columns.csv",
        {
            "x_A": result.positions[:, 0],
            "y_A": result.positions[:, 1],
            "cross_section_A2": result.cross_section,
            "cross_section_sd_A2": result.cross_section_sd,
            "n_atoms": result.n_atoms,
            "n_atoms_probability": result.n_probability[np.arange(len(result.n_atoms)), result.n_atoms - 1],
            "gaussian_depth_A": result.gaussian_depth,
            "gaussian_depth_sd_A": result.gaussian_depth_sd,
            "depth_A": result.depth,
            "depth_sd_A": result.depth_sd,
            "depth_q05_A": result.depth_q05,
            "depth_q95_A": result.depth_q95,
            "crlb_A": result.crlb,
            "goodness_of_fit": result.goodness_of_fit,
            "lattice_depth_A": result.lattice_depth,
            "lattice_probability": result.lattice_probability,
            "n_atoms_hybrid": result.hybrid.n,
            "top_A": result.ends.top,
            "top_sd_A": result.ends.top_sd,
            "bottom_A": result.ends.bottom,
            "bottom_sd_A": result.ends.bottom_sd,
            "thickness_A": result.ends.thickness,
            "thickness_sd_A": result.ends.thickness_sd,
            "superposition_shift_A": result.superposition_shift,
        },
    )
    fit = result.column_fit
    of_average = ColumnResult(
        result.average_image, result.pixel_size, fit.positions, fit.volume, np.full(len(fit.volume), fit.width), fit.background, fit.model_image,
        result.library_cross_section, result.mixture, result.n_atoms,
    )
    write_statstem(folder / "columns.mat", of_average, result.element)
    write_drift_csv(folder / "drift.csv", result.defocus, result.drift_px, result.drift_sd_px, result.distortion, result.distortion_sd, result.images)
    write_xyz(folder / "structure.xyz", result.element, result.atoms, result.atom_sd, result.site_probability, result.column_of_atom, result.surface.coordination, result.gauge)
    write_json(folder / "surface.json", surface_as_dict(result.surface))
    write_netcdf(result.data, folder / "posterior.nc")
    write_json(folder / "provenance.json", result.provenance)
    write_report(folder / "report.html", result)


def run(stack_path, config: Config, folder, library_path=None, method=None, quiet=False, checkpoint=None) -> None:
    """Read a stack, reconstruct it and write everything into a folder, which of several processes the first does. An interrupted NUTS run goes on from its `checkpoint`.

    Raises
    ------
    InputError
        For whatever is wrong with the stack, the config, the library, or a memory limit below what the field needs.
    """
    stack = read_stack(stack_path, config)
    refuse_beyond_limit(config, 240e-9 * stack.data.size + 1.0, f"series of {stack.data.shape}")
    library = read_library(library_path, config) if library_path is not None else None
    result = reconstruct(stack, config, library, method, quiet, checkpoint=checkpoint)
    if processes.is_first():
        write(result, Path(folder))


def demo(folder, quiet: bool = False) -> None:
    """The packaged gold particle through the whole pipeline, sampled with NUTS and compared with its true atoms."""
    data = resources.files("depthprob.data")
    with resources.as_file(data / "demo.toml") as config_path, resources.as_file(data / "demo_stack.npz") as stack_path:
        config = read_config(config_path)
        stack = read_stack(stack_path, config)
        with np.load(stack_path, allow_pickle=False) as saved:
            truth = SimpleNamespace(columns=saved["columns"], atoms=saved["atoms_A"], drift=saved["drift_A"])
    write(reconstruct(stack, config, quiet=quiet, truth=truth), Path(folder))
