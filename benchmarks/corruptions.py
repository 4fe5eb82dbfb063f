"""The fifteen common corruptions, at five severities each, for benchmarks of a drifting world.

Written from the definitions and constants that Hendrycks & Dietterich published ("Benchmarking
neural network robustness to common corruptions and perturbations", ICLR 2019). A benchmark calls
`corrupted`; nothing here reads or writes a file, and it is not a way to reproduce ImageNet-C.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import fft, ndimage, sparse, special  # type: ignore[import-untyped]

SEVERITIES: Final = (1, 2, 3, 4, 5)
# The side of the images that the published constants are for.
_PUBLISHED_SIDE: Final = 224
_MIN_SIDE: Final = 16
# Bounds the memory that a large batch takes; the Fourier transforms need several copies.
_BATCH: Final = 128

Floats = NDArray[np.float32]
# From values in [0, 1], float32 [n, 3, s, s], and a severity to values that may lie outside.
Corruption = Callable[[Floats, int, np.random.Generator], Floats]


def corrupted(
    images: NDArray[np.uint8], name: str, severity: int, *, seed: int = 0
) -> NDArray[np.uint8]:
    """Images as one corruption leaves them, deterministic in all of the arguments.

    Lengths in pixels (radii, displacements, flakes) scale with side / 224. Four things differ from
    the published code on purpose. Frost is a procedural texture (ridged plasma noise), not a
    photograph, so that no picture has to be shipped. Glass blur swaps pixels in rounds whose swaps
    cannot meet, not in raster order. Elastic transform samples once, not twice. Edges are mirrored.

    Args:
        images: uint8 [n, s, s, 3], s of 16 or more.
        name: One of `CORRUPTIONS`.
        severity: One of `SEVERITIES`.
        seed: Of whatever the corruption draws; not negative.

    Returns:
        uint8 [n, s, s, 3]; the argument is left as it was.

    Raises:
        ValueError: There is no such corruption or severity, or the images are of another kind.

    Example:
        >>> grey = np.full((1, 32, 32, 3), 128, np.uint8)
        >>> int(corrupted(grey, "brightness", 1)[0, 0, 0, 0])
        154
    """
    if name not in _BY_NAME:
        raise ValueError(f"unknown corruption {name!r}; expected one of {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"unknown severity {severity!r}; expected one of {SEVERITIES}")
    shape = images.shape
    if images.dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3:
        raise ValueError(f"images are {images.dtype} {list(shape)}; expected uint8 [n, s, s, 3]")
    if shape[1] < _MIN_SIDE:
        raise ValueError(f"images have a side of {shape[1]} pixels; expected {_MIN_SIDE} or more")
    # The same draws at all severities: they differ by strength, not by luck.
    rng = np.random.default_rng([seed, CORRUPTIONS.index(name)])
    out = np.empty_like(images)
    for at in range(0, len(images), _BATCH):
        part = slice(at, at + _BATCH)
        out[part] = _images(_BY_NAME[name](_planes(images[part]), severity, rng))
    return out


def _planes(images: NDArray[np.uint8]) -> Floats:
    """Bytes [n, s, s, 3] as values in [0, 1], float32 [n, 3, s, s]."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32) / np.float32(255)


def _images(planes: Floats) -> NDArray[np.uint8]:
    """The inverse of `_planes`, for values clipped to [0, 1]."""
    levels: Floats = np.rint(np.clip(planes, 0, 1) * np.float32(255))
    return levels.astype(np.uint8).transpose(0, 2, 3, 1)


def _scale(planes: Floats) -> float:
    """What a published length in pixels is to be multiplied by."""
    return float(planes.shape[-1]) / _PUBLISHED_SIDE


def _gaussian_noise(planes: Floats, severity: int, rng: np.random.Generator) -> Floats:
    deviation = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    return planes + np.float32(deviation) * rng.standard_normal(planes.shape, np.float32)


def _shot_noise(planes: Floats, severity: int, rng: np.random.Generator) -> Floats:
    photons = (60, 25, 12, 5, 3)[severity - 1]
    return rng.poisson(planes * photons).astype(np.float32) / np.float32(photons)


def _impulse_noise(planes: Floats, severity: int, rng: np.random.Generator) -> Floats:
    amount = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    drawn = rng.random(planes.shape, np.float32)
    peppered = np.where(drawn < amount / 2, np.float32(0), planes)
    return np.where(drawn >= 1 - amount / 2, np.float32(1), peppered)


def _blurred(planes: Floats, sigma: float, radius: float = 0.0) -> Floats:
    """Blur of the last two axes by a Gaussian and, with a radius, by a disk; mirrored at the edges.

    The cosine transform's own boundary is the mirror. Its cost does not grow with the lengths, and
    a length of less than a pixel is as exact as any.
    """
    side = planes.shape[-1]
    angular = np.pi * np.arange(side) / side
    frequency = np.hypot(angular[:, None], angular)
    passed = np.exp(-0.5 * (sigma * frequency) ** 2)
    if radius:
        # A disk's transform is 2 J1(x) / x; the constant term, which is 1, would divide by zero.
        x = np.maximum(radius * frequency, 1e-6)
        passed *= 2 * special.j1(x) / x
    spectrum = fft.dctn(planes, axes=(-2, -1)) * passed.astype(np.float32)
    return np.asarray(fft.idctn(spectrum, axes=(-2, -1)), np.float32)


def _convolved(planes: Floats, kernels: Floats) -> Floats:
    """Planes [n, c, s, s] convolved with kernels [n or 1, k, k], k odd, mirrored at the edges."""
    side, half = planes.shape[-1], kernels.shape[-1] // 2
    padded = np.pad(planes, ((0, 0), (0, 0), (half, half), (half, half)), mode="symmetric")
    size = fft.next_fast_len(side + 2 * half, real=True)
    spectrum = fft.rfft2(padded, (size, size)) * fft.rfft2(kernels, (size, size))[:, None]
    # What the cyclic convolution wraps around lies before 2 * half.
    kept = slice(2 * half, 2 * half + side)
    return np.asarray(fft.irfft2(spectrum, (size, size))[..., kept, kept], np.float32)


def _defocus_blur(planes: Floats, severity: int, _rng: np.random.Generator) -> Floats:
    radius, softness = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[severity - 1]
    return _blurred(planes, softness * _scale(planes), radius * _scale(planes))


def _glass_blur(planes: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """Pixels swap places with near ones, between two blurs.

    A displacement of a pixel or two has no exact counterpart at a smaller side. Swaps are thinned
    instead, so that their mean square displacement scales as the square of a length should.
    """
    sigma, reach, rounds = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[
        severity - 1
    ]
    scale, (n, _, side, _) = _scale(planes), planes.shape
    target = scale**2 * reach * (reach + 1) / 3
    near = next(d for d in range(1, side) if d * (d + 1) / 3 >= target - 1e-9)
    # Steps within `near` have the variance near (near + 1) / 3; mixed with those within one less.
    share = (target - near * (near - 1) / 3) / (2 * near / 3)
    cell = 2 * near + 1
    source = np.broadcast_to(np.arange(side * side), (n, side * side)).copy()
    image = np.arange(n)[:, None]
    # A cell's swaps stay inside it, so those of one phase touch no pixel twice.
    for phase in np.concatenate([rng.permutation(cell * cell) for _ in range(rounds)]):
        grid = np.meshgrid(
            np.arange(phase // cell, side, cell), np.arange(phase % cell, side, cell), indexing="ij"
        )
        rows, columns = (axis.reshape(1, -1) for axis in grid)
        within = near - (rng.random((n, rows.size)) >= share)
        moves = rng.integers(-within, within + 1, (2, n, rows.size))
        here = rows * side + columns
        there = np.clip(rows + moves[0], 0, side - 1) * side
        there += np.clip(columns + moves[1], 0, side - 1)
        source[:, here[0]], source[image, there] = source[image, there], source[:, here[0]]
    flat = _blurred(planes, sigma * scale).reshape(n, 3, side * side)
    shuffled = np.take_along_axis(flat, source[:, None], axis=2)
    return _blurred(shuffled.reshape(planes.shape), sigma * scale)


def _streaks(length: float, sigma: float, angles: NDArray[Any]) -> Floats:
    """Half-Gaussian lines from the centre, one an angle in degrees: kernels [n, k, k]."""
    half = math.ceil(length) + 1
    along = np.linspace(0, length, 4 * half + 1)
    weights = np.exp(-0.5 * (along / sigma) ** 2)
    radians = np.deg2rad(angles)[:, None]
    y, x = half + np.sin(radians) * along, half + np.cos(radians) * along
    top, left = np.floor(y).astype(np.int64), np.floor(x).astype(np.int64)
    kernels = np.zeros((len(angles), 2 * half + 1, 2 * half + 1), np.float32)
    image = np.arange(len(angles))[:, None]
    for down in (0, 1):
        for right in (0, 1):
            shares = (1 - np.abs(y - top - down)) * (1 - np.abs(x - left - right))
            np.add.at(kernels, (image, top + down, left + right), shares * weights)
    return np.asarray(kernels / kernels.sum(axis=(1, 2), keepdims=True), np.float32)


def _motion_blur(planes: Floats, severity: int, rng: np.random.Generator) -> Floats:
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity - 1]
    scale, angles = _scale(planes), rng.uniform(-45, 45, len(planes))
    return _convolved(planes, _streaks(2 * radius * scale, sigma * scale, angles))


def _interpolation(positions: NDArray[np.float64], size: int) -> Any:
    """Linear interpolation of `size` values at these positions, a sparse matrix [m, size]."""
    left = np.clip(np.floor(positions).astype(np.int64), 0, size - 2)
    share = positions - left
    rows = np.arange(len(positions))
    values = np.concatenate([1 - share, share]).astype(np.float32)
    at = (np.concatenate([rows, rows]), np.concatenate([left, left + 1]))
    return sparse.csr_array((values, at), shape=(len(positions), size))


def _zoom_blur(planes: Floats, severity: int, _rng: np.random.Generator) -> Floats:
    count, step = ((11, 0.01), (16, 0.01), (11, 0.02), (13, 0.02), (11, 0.03))[severity - 1]
    side = planes.shape[-1]
    offsets = np.arange(side) - (side - 1) / 2
    # The mean over zooms is one linear map of pixels: far fewer passes than a zoom at a time.
    total = sparse.eye_array(side * side, dtype=np.float32, format="csr")
    for zoom in 1 + step * np.arange(count):
        axis = _interpolation((side - 1) / 2 + offsets / zoom, side)
        total = total + sparse.kron(axis, axis, format="csr")
    flat = planes.reshape(-1, side * side).T
    return np.asarray((total @ flat).T.reshape(planes.shape) / (count + 1), np.float32)


def _plasma(count: int, side: int, decay: float, rng: np.random.Generator) -> Floats:
    """Plasma noise by diamonds and squares on a torus, each map stretched to [0, 1] [n, s, s].

    The jitter's amplitude falls by the decay's square an octave, as in the published code.
    """
    full = 1 << (side - 1).bit_length()
    maps = np.zeros((count, full, full), np.float32)
    step, amplitude = full, 1.0

    def jitter(total: NDArray[Any]) -> Floats:
        drawn = rng.random(total.shape, np.float32)
        return np.asarray(total / 4 + np.float32(amplitude) * (2 * drawn - 1), np.float32)

    while step > 1:
        half = step // 2
        corners = maps[:, ::step, ::step]
        below = np.roll(corners, -1, axis=1)
        right, across = np.roll(corners, -1, axis=2), np.roll(below, -1, axis=2)
        middles = jitter(corners + below + right + across)
        left, above = np.roll(middles, 1, axis=2), np.roll(middles, 1, axis=1)
        maps[:, half::step, half::step] = middles
        maps[:, half::step, ::step] = jitter(corners + below + middles + left)
        maps[:, ::step, half::step] = jitter(corners + right + middles + above)
        step, amplitude = half, amplitude / decay**2
    maps -= maps.min(axis=(1, 2), keepdims=True)
    maps /= maps.max(axis=(1, 2), keepdims=True)
    return maps[:, :side, :side]


def _snow(planes: Floats, severity: int, rng: np.random.Generator) -> Floats:
    mean, deviation, flake, threshold, radius, sigma, kept = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[severity - 1]
    scale, (n, _, side, _) = _scale(planes), planes.shape
    # Flakes are drawn at the published side and shrunk: below a pixel they must not grow denser.
    coarse = math.ceil(_PUBLISHED_SIDE / flake)
    grow = _interpolation(np.linspace(0, coarse - 1, _PUBLISHED_SIDE), coarse).toarray()
    fine = (np.arange(4 * side) + 0.5) * _PUBLISHED_SIDE / (4 * side) - 0.5
    shrink = _interpolation(fine, _PUBLISHED_SIDE).toarray().reshape(side, 4, -1).mean(axis=1)
    drawn = rng.standard_normal((n, coarse, coarse), np.float32) * np.float32(deviation)
    layer = grow @ (drawn + np.float32(mean)) @ grow.T
    layer = np.clip(np.where(layer < threshold, np.float32(0), layer), 0, 1)
    layer = shrink @ layer @ shrink.T
    falls = _streaks(2 * radius * scale, sigma * scale, rng.uniform(45, 135, len(planes)))
    layer = _convolved(layer[:, None], falls)
    grey = np.einsum("ncij,c->nij", planes, np.array([0.299, 0.587, 0.114], np.float32))[:, None]
    whitened = np.maximum(planes, grey * np.float32(1.5) + np.float32(0.5))
    mixed = np.float32(kept) * planes + np.float32(1 - kept) * whitened
    return np.asarray(mixed + layer + layer[..., ::-1, ::-1], np.float32)


def _frost(planes: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """A procedural texture where the published corruption lays a photograph of frost over.

    Ridges of rough plasma noise are the crystals; a smoother map says how far they cover the pane.
    """
    kept, laid = ((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[severity - 1]
    n, _, side, _ = planes.shape
    # Folded twice, a map has twice the ridges; only their crests are crystals.
    ridges = 1 - np.abs(2 * np.abs(2 * _plasma(n, side, 1.25, rng) - 1) - 1)
    crystals = np.clip(2 * ridges - np.float32(0.8), 0, 1)
    cover = np.clip(3 * _plasma(n, side, 1.6, rng) - np.float32(0.6), 0, 1)
    ice = (cover * (np.float32(0.2) + np.float32(0.8) * crystals))[:, None]
    tint = np.array([0.86, 0.94, 1.0], np.float32)[:, None, None]
    return np.asarray(np.float32(kept) * planes + np.float32(laid) * tint * ice, np.float32)


def _fog(planes: Floats, severity: int, rng: np.random.Generator) -> Floats:
    density, decay = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[severity - 1]
    fog = np.float32(density) * _plasma(len(planes), planes.shape[-1], decay, rng)[:, None]
    brightest = planes.max(axis=(1, 2, 3), keepdims=True)
    return np.asarray((planes + fog) * brightest / (brightest + density), np.float32)


def _brightness(planes: Floats, severity: int, _rng: np.random.Generator) -> Floats:
    added = (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1]
    # Multiplying a colour changes its value in HSV alone; black has no colour to multiply.
    value = planes.max(axis=1, keepdims=True)
    raised = np.minimum(value + np.float32(added), 1)
    black = value == 0
    gain = raised / np.where(black, 1, value)
    return np.asarray(np.where(black, raised, planes * gain), np.float32)


def _contrast(planes: Floats, severity: int, _rng: np.random.Generator) -> Floats:
    kept = (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1]
    mean: Floats = planes.mean(axis=(2, 3), keepdims=True)
    return np.asarray(mean + np.float32(kept) * (planes - mean), np.float32)


def _elastic_transform(planes: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """An affine map of three points, drawn near where they were, then a smooth random field.

    The published constants bend widely at severities 1 and 2 and finely from 3 on, so damage
    does not grow from 2 to 3.
    """
    strength, sigma, drift = (
        244
        * np.array(
            (
                (2, 0.7, 0.1),
                (2, 0.08, 0.2),
                (0.05, 0.01, 0.02),
                (0.07, 0.01, 0.02),
                (0.12, 0.01, 0.02),
            )
        )[severity - 1]
    )
    scale, (n, _, side, _) = _scale(planes), planes.shape
    arm = side // 3
    before = side / 2 + arm * np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    after = before + rng.uniform(-drift * scale, drift * scale, (n, 3, 2))
    # Sampling asks where each result pixel came from, hence the map from after to before.
    ones = np.ones((n, 3, 1))
    affine = np.linalg.solve(np.concatenate([after, ones], axis=2), before[None])
    # Blurring noise divides it by sigma, which scaled too: a displacement needs the square.
    field = _blurred(rng.uniform(-1, 1, (n, 2, side, side)).astype(np.float32), sigma * scale)
    place = np.indices((side, side)) + np.float32(strength * scale**2) * field
    place = np.concatenate([place, np.ones((n, 1, side, side))], axis=1)
    origin = np.einsum("npij,npq->nqij", place, affine, optimize=True)
    out = np.empty_like(planes)
    for row in range(n):
        for plane, bent in zip(planes[row], out[row], strict=True):
            ndimage.map_coordinates(plane, origin[row], bent, order=1, mode="reflect")
    return out


def _each(planes: Floats, change: Callable[[Image.Image], Image.Image]) -> Floats:
    """Planes after Pillow changed each image."""
    changed = [change(Image.fromarray(image)) for image in _images(planes)]
    return _planes(np.stack([np.asarray(image) for image in changed]))


def _pixelate(planes: Floats, severity: int, _rng: np.random.Generator) -> Floats:
    side = planes.shape[-1]
    coarse = int(side * (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1])

    def pixelated(image: Image.Image) -> Image.Image:
        small = image.resize((coarse, coarse), Image.Resampling.BOX)
        return small.resize((side, side), Image.Resampling.BOX)

    return _each(planes, pixelated)


def _jpeg_compression(planes: Floats, severity: int, _rng: np.random.Generator) -> Floats:
    quality = (25, 18, 15, 10, 7)[severity - 1]

    def compressed(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _each(planes, compressed)


_BY_NAME: Final[dict[str, Corruption]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
CORRUPTIONS: Final[tuple[str, ...]] = tuple(_BY_NAME)
