"""Tomography beside depth sectioning: a tilt series to a volume by SIRT, laid on an atomic model and compared with it.

Frame: the beam runs along +z at tilt zero, the tilt axis is x, and a positive tilt turns the specimen about it right-handedly, so that a point
lands at y cos(tilt) - z sin(tilt) of the image. Volumes are (z, y, x), tilt series (tilt, y, x); lengths count in Å from the middle of either.
"""

from typing import NamedTuple

import numpy as np
from scipy.ndimage import binary_erosion, distance_transform_edt, map_coordinates, rotate
from scipy.optimize import least_squares
from scipy.special import erf

from ..errors import InputError

TILTS = np.arange(-74.0, 75.0, 2.0)  # degrees; Alania et al. (2017)


class Alignment(NamedTuple):
    """Where the atomic model lies in the tomogram.

    Attributes
    ----------
    rotation : float
        Of the model about the beam, from x towards y [degrees].
    shift : (3,)
        Of the model after its rotation: x, y, z [Å].
    scale : float
        Tomogram over the model's density [unit of the tomogram per atom / Å^3].
    correlation : float
        Of the two densities.
    """

    rotation: float
    shift: np.ndarray
    scale: float
    correlation: float

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Points (N, 3) of the model's frame in that of the tomogram [Å]."""
        return points @ _turned(self.rotation).T + self.shift

    def in_model_frame(self, tomogram: np.ndarray, voxel_size: float) -> np.ndarray:
        """The tomogram (z, y, x) turned and shifted to lie on the model as given, in the model's unit: atoms / Å^3."""
        return _sampled(tomogram / self.scale, self(_points(tomogram.shape, voxel_size)), voxel_size)


class Overlap(NamedTuple):
    """Of two solids: twice the common volume over the sum of both, and the common volume over that of their union."""

    dice: float
    jaccard: float


def _turned(rotation: float) -> np.ndarray:
    c, s = np.cos(np.radians(rotation)), np.sin(np.radians(rotation))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])


def _points(shape: tuple[int, int, int], step: float) -> np.ndarray:
    """Places (N, 3) of all voxels of a volume (z, y, x): x, y, z from its middle [Å]."""
    z, y, x = np.meshgrid(*((np.arange(n) - (n - 1) / 2) * step for n in shape), indexing="ij")
    return np.stack([x, y, z], -1).reshape(-1, 3)


def _sampled(volume: np.ndarray, points: np.ndarray, step: float) -> np.ndarray:
    """A volume (z, y, x) at as many points (x, y, z) [Å] as it has voxels, by cubic splines, zero beyond it."""
    index = points[:, ::-1] / step + (np.array(volume.shape) - 1) / 2
    return map_coordinates(volume, index.T, order=3).reshape(volume.shape)


def _shares(centres: np.ndarray, n: int, step: float, sd: float) -> np.ndarray:
    """Mean density within each of n pixels of step Å of normalised Gaussians at centres (N,): (N, n) [1/Å]."""
    edges = (np.arange(n + 1) - n / 2) * step
    return np.diff(erf((edges - centres[:, None]) / (np.sqrt(2) * sd)), axis=1) / (2 * step)


def project(atoms: np.ndarray, tilts: np.ndarray, shape: tuple[int, int], pixel_size: float, resolution: float = 10.0) -> np.ndarray:
    """Tilt series (tilt, y, x) of a structure [atoms / Å^2]: annular dark-field images at low resolution, where every atom counts alike.

    Parameters
    ----------
    atoms : (N, 3)
        From the middle of the images [Å].
    tilts : (T,)
        [degrees], about x.
    shape : (ny, nx)
    pixel_size : float
        [Å].
    resolution : float
        Full width at half maximum of an atom's Gaussian [Å]. Pixels hold its exact mean over their area.
    """
    sd = resolution / np.sqrt(8 * np.log(2))
    x, y, z = np.asarray(atoms, float).T
    along = _shares(x, shape[1], pixel_size, sd)
    angles = np.radians(tilts)
    return np.array([_shares(y * c - z * s, shape[0], pixel_size, sd).T @ along for c, s in zip(np.cos(angles), np.sin(angles), strict=True)])


def sirt(tilt_series: np.ndarray, tilts: np.ndarray, pixel_size: float, iterations: int = 100) -> np.ndarray:
    """Volume (z, y, x) of a tilt series (tilt, y, x) about x by ASTRA's SIRT, slice by slice, no value below zero, as many voxels in z as in y.

    Images in atoms / Å^2 give atoms / Å^3; any other unit per length alike. Vacuum should be zero. The directions that the tilts miss, a wedge of
    32° about the beam for ±74°, leave faces towards the beam blurred along it: hardly for a round body, plainly for a flat one.

    Raises
    ------
    InputError
        Images that do not fit the tilts, values that are no numbers, tilts beyond ±90°, or ASTRA not installed.
    """
    images, tilts = np.asarray(tilt_series, np.float32), np.asarray(tilts, float)
    if images.ndim != 3 or tilts.shape != images.shape[:1] or len(tilts) < 2:
        raise InputError(f"the tilt series has shape {images.shape} and {tilts.size} tilts; allowed is (tilt, y, x), two images or more and a tilt for each.")
    if not (np.isfinite(images).all() and np.all(abs(tilts) <= 90)):
        raise InputError(
            f"the tilt series has {np.sum(~np.isfinite(images))} values that are no numbers and tilts from {tilts.min():g} to {tilts.max():g}°; "
            "allowed are numbers, and tilts within ±90°. Leave bad images out with their tilts; give tilts in degrees."
        )
    try:
        import astra
    except ImportError:
        raise InputError("tomography needs the ASTRA toolbox, which is not installed. Install it: pip install depthprob[tomo]") from None
    n_y, n_x = images.shape[1:]
    # ASTRA's detector coordinate is X cos + Y sin with rows down: y is its X, and z, down the beam, its -Y
    beams, grid = astra.create_proj_geom("parallel", 1.0, n_y, np.radians(tilts)), astra.create_vol_geom(n_y, n_y)
    projector = astra.create_projector("linear", beams, grid)
    sinogram, section = astra.data2d.create("-sino", beams), astra.data2d.create("-vol", grid)
    settings = astra.astra_dict("SIRT") | {"ProjectorId": projector, "ProjectionDataId": sinogram, "ReconstructionDataId": section, "option": {"MinConstraint": 0.0}}
    algorithm = astra.algorithm.create(settings)
    volume = np.empty((n_y, n_y, n_x), np.float32)
    try:
        for i in range(n_x):
            astra.data2d.store(sinogram, np.ascontiguousarray(images[:, :, i]))
            astra.data2d.store(section, 0)
            astra.algorithm.run(algorithm, iterations)
            volume[:, :, i] = astra.data2d.get(section)
    finally:
        astra.algorithm.delete(algorithm)
        astra.data2d.delete([sinogram, section])
        astra.projector.delete(projector)
    return volume / pixel_size


def model_density(atoms: np.ndarray, shape: tuple[int, int, int], voxel_size: float, resolution: float = 10.0) -> np.ndarray:
    """Atoms (N, 3) [Å] from the middle of a volume as the mean density of its voxels (z, y, x) [atoms / Å^3], each a Gaussian of full width `resolution` [Å]."""
    sd = resolution / np.sqrt(8 * np.log(2))
    x, y, z = (_shares(a, n, voxel_size, sd) for a, n in zip(np.asarray(atoms, float).T, shape[::-1], strict=True))
    return np.einsum("nz,ny,nx->zyx", z, y, x, optimize=True)


def align(tomogram: np.ndarray, atoms: np.ndarray, voxel_size: float, resolution: float = 10.0, step: float = 5.0) -> Alignment:
    """Turn about the beam and shift that lay an atomic model on a tomogram (z, y, x), by least squares of their densities.

    Every `step` degrees of a full turn the best shift is found by correlation; the best of all is refined. The model should hold as much of the
    particle as the tomogram: crop a tomogram that shows more.
    """
    density = model_density(atoms, tomogram.shape, voxel_size, resolution)
    spectrum = np.fft.rfftn(tomogram - tomogram.mean())
    best = (-np.inf, 0.0, np.zeros(3))
    for rotation in np.arange(0.0, 360.0, step):
        turned = rotate(density, -rotation, axes=(1, 2), reshape=False, order=1)  # SciPy turns from the first axis to the second
        correlation = np.fft.irfftn(spectrum * np.fft.rfftn(turned).conj(), tomogram.shape)
        if correlation.max() > best[0]:
            at = np.array(np.unravel_index(np.argmax(correlation), correlation.shape))
            at = np.where(at > np.array(tomogram.shape) / 2, at - tomogram.shape, at)
            best = (correlation.max(), rotation, at[::-1] * voxel_size)
    points = _points(tomogram.shape, voxel_size)
    laid = lambda p: _sampled(density, (points - p[1:4]) @ _turned(p[0]), voxel_size)
    scale = np.sum(tomogram) / np.sum(density)
    start = np.array([best[1], *best[2], 1.0])
    found = least_squares(lambda p: (laid(p) * p[4] * scale - tomogram).ravel(), start, x_scale=[1.0, 1.0, 1.0, 1.0, 0.1]).x
    correlation = np.corrcoef(laid(found).ravel(), tomogram.ravel())[0, 1]
    return Alignment(float(found[0] % 360), found[1:4], float(found[4] * scale), float(correlation))


def overlap(solid: np.ndarray, other: np.ndarray) -> Overlap:
    """How much two solids (z, y, x) of bool share."""
    common, both = np.sum(solid & other), np.sum(solid) + np.sum(other)
    return Overlap(float(2 * common / both), float(common / (both - common)))


def surface_distance(solid: np.ndarray, reference: np.ndarray, voxel_size: float) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (N, 3) of the solid's surface, x, y, z from the middle [Å], and how far each stands out of the reference, inside negative (N,) [Å]; to about half a voxel."""
    signed = np.where(reference, 0.5 - distance_transform_edt(reference), distance_transform_edt(~reference) - 0.5) * voxel_size
    surface = solid & ~binary_erosion(solid)
    at = np.argwhere(surface) - (np.array(solid.shape) - 1) / 2
    return at[:, ::-1] * voxel_size, signed[surface] + 0.5 * voxel_size
