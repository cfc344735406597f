"""Column depths and atom numbers, with honest error bars, from focal series of annular dark-field STEM images."""

from importlib import import_module

_PUBLIC = {
    "AnnularDetector": "physics.detector",
    "Column": "physics.specimen",
    "ColumnLibrary": "physics.library",
    "Field": "physics.focal_series",
    "FocalSeries": "physics.focal_series",
    "Microscope": "physics.optics",
    "build_gram": "physics.frozen_phonon",
    "build_library": "reconstruction.libraries",
    "calibrate": "inference.calibration",
    "column_bounds": "inference.likelihood",
    "compare_estimators": "inference.single",
    "crlb": "inference.crlb",
    "expected_counts": "physics.focal_series",
    "fisher_information": "inference.fisher",
    "fit_gaussian_peaks": "inference.gaussian_peak",
    "fit_single_columns": "inference.single",
    "infer": "inference.posterior",
    "library_from_gram": "physics.library",
    "load_gram": "physics.library",
    "make_problem": "inference.problem",
    "maximum": "inference.likelihood",
    "plot_ranks": "plotting",
    "read_config": "config",
    "read_stack": "stack",
    "read_statstem": "statstem",
    "reconstruct": "reconstruction.pipeline",
    "sample_counts": "physics.focal_series",
    "save_gram": "physics.library",
    "scattering_factor": "physics.scattering",
    "simulate_particle": "physics.particle",
    "to_arviz": "inference.posterior",
    "uniformity": "inference.calibration",
    "wavelength": "physics.electron",
    "write_statstem": "statstem",
}
__all__ = sorted(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    """Public names are imported on first use, so that `import depthprob` is quick and computes nothing."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'depthprob' has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
