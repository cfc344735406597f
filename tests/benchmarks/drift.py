"""Drift of a focal series of a crystal by several programs, side by side with its truth.

    pip install scikit-image pystackreg
    python tests/benchmarks/drift.py [PARTICLE.npz ...]

On the packaged stack, and on others given (arrays stack, defocus_A, pixel_size_A and drift_A, with the packaged stack's settings). Prints for each program
the root mean square and the largest error of a shift along one axis, in pixels, after removing the mean. Both stacks wrap around, which favours correlation.
"""

import sys
from importlib import resources
from pathlib import Path

import jax
import numpy as np
from pystackreg import StackReg
from skimage.registration import phase_cross_correlation

from depthprob.config import config_from_dict
from depthprob.reconstruction.drift import estimate_drift
from depthprob.reconstruction.pipeline import reconstruct
from depthprob.stack import read_stack


def by_correlation(stack, normalization, to_previous):
    """scikit-image: each image against the one before it, or against the middle of the series, to a hundredth of a pixel."""
    middle = stack[len(stack) // 2]
    moved = [phase_cross_correlation(stack[i - 1] if to_previous else middle, stack[i], upsample_factor=100, normalization=normalization)[0] for i in range(1, len(stack))]
    shifts = -np.array([[0.0, 0.0], *moved])[:, ::-1]
    return shifts.cumsum(0) if to_previous else shifts - shifts[len(stack) // 2]


def by_intensity(stack, reference):
    """pystackreg: translations that make intensities agree."""
    return StackReg(StackReg.TRANSLATION).register_stack(stack, reference=reference)[:, :2, 2]


def compare(path):
    with np.load(path) as saved:
        pixel, defocus, truth = float(saved["pixel_size_A"]), saved["defocus_A"], saved["drift_A"] / saved["pixel_size_A"]
    config = config_from_dict({"focal_series": {"defocus_A": defocus.tolist(), "pixel_size_A": pixel, "periodic": True}, "inference": {"max_atoms": 12}})
    stack = read_stack(path, config)
    images = stack.data.astype(float)
    joint = reconstruct(stack, config, method="mle", quiet=True)
    results = {
        "depthprob, phase correlation": estimate_drift(images, pixel, defocus, True),
        "depthprob, then the joint fit": joint.drift_px,
        "scikit-image, phase, previous image": by_correlation(images, "phase", True),
        "scikit-image, phase, middle image": by_correlation(images, "phase", False),
        "scikit-image, cross, previous image": by_correlation(images, None, True),
        "scikit-image, cross, middle image": by_correlation(images, None, False),
        "pystackreg, previous image": by_intensity(images, "previous"),
        "pystackreg, mean image": by_intensity(images, "mean"),
    }
    print(f"{Path(path).name}: {len(images)} images of {images.shape[1]} x {images.shape[2]} pixels of {pixel:g} Å; drift {np.std(truth - truth.mean(0)):.2f} px rms")
    for name, found in results.items():
        error = found - found.mean(0) - truth + truth.mean(0)
        print(f"  {name:38s} rms {np.sqrt(np.mean(error**2)):7.3f} px   largest {abs(error).max():7.3f} px")
    print(f"  {'standard deviation the joint fit states':38s} rms {np.sqrt(np.mean(joint.drift_sd_px**2)):7.3f} px", flush=True)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    with resources.as_file(resources.files("depthprob.data") / "demo_stack.npz") as packaged:
        for path in (packaged, *map(Path, sys.argv[1:])):
            compare(path)
