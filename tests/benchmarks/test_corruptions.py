"""The corruptions that benchmarks apply: what they keep, what they damage, what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage  # type: ignore[import-untyped]

from benchmarks.corruptions import CORRUPTIONS, SEVERITIES, corrupted

Images = NDArray[np.uint8]
# What moves or blurs pixels, or scales them about their mean, has nothing to work on in grey.
KEEP_GREY = (
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "contrast",
    "elastic_transform",
    "pixelate",
)


def natural(count: int = 24, side: int = 64) -> Images:
    """Noise with a natural image's falling spectrum under a few flat shapes with hard edges."""
    rng = np.random.default_rng(5)
    images = np.zeros((count, side, side, 3))
    for sigma in (1, 2, 4, 8, 16):
        drawn = rng.normal(size=images.shape)
        layer = ndimage.gaussian_filter(drawn, (0, sigma, sigma, 0), mode="reflect")
        images += layer * sigma**0.6 / layer.std()
    images = 110 + 35 * images / images.std()
    for image in images:
        for _ in range(4):
            top, left = rng.integers(0, side - 12, 2)
            height, width = rng.integers(6, side // 2, 2)
            image[top : top + height, left : left + width] = rng.uniform(20, 220, 3)
    return np.asarray(np.clip(images, 0, 255), np.uint8)


def damage(images: Images, name: str, severity: int) -> float:
    """Mean squared error in grey levels."""
    found = corrupted(images, name, severity)
    return float(np.mean((found.astype(np.float64) - images) ** 2))


def test_there_are_fifteen_at_five_severities() -> None:
    assert len(set(CORRUPTIONS)) == 15
    assert SEVERITIES == (1, 2, 3, 4, 5)


@pytest.mark.parametrize("side", [16, 33, 96])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_shape_and_type_stay_and_the_argument_is_untouched(name: str, side: int) -> None:
    images = natural(2, side)
    before = images.copy()
    for severity in SEVERITIES:
        found = corrupted(images, name, severity)
        assert found.dtype == np.uint8
        assert found.shape == images.shape
        assert np.any(found != images)
    assert np.array_equal(images, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_same_arguments_give_the_same_images(name: str) -> None:
    images = natural(3, 32)
    assert np.array_equal(corrupted(images, name, 3, seed=7), corrupted(images, name, 3, seed=7))


@pytest.mark.parametrize("name", ["gaussian_noise", "glass_blur", "motion_blur", "snow", "frost"])
def test_another_seed_draws_anew_and_so_does_each_image(name: str) -> None:
    images = np.repeat(natural(1, 48), 2, axis=0)
    found = corrupted(images, name, 3, seed=0)
    assert np.any(found != corrupted(images, name, 3, seed=1))
    assert np.any(found[0] != found[1])


@pytest.mark.parametrize("name", sorted({*CORRUPTIONS} - {"elastic_transform", "frost"}))
def test_damage_grows_with_severity(name: str) -> None:
    images = natural()
    errors = [damage(images, name, severity) for severity in SEVERITIES]
    assert errors == sorted(errors)
    assert errors[-1] > 1.3 * errors[0]


def test_frost_damages_more_the_more_of_it_is_laid_over() -> None:
    # From 3 to 4 the published constants only darken what shines through, which nears the truth
    # where frost is bright.
    first, second, third, fourth, fifth = (damage(natural(), "frost", s) for s in SEVERITIES)
    assert first < second < third < fifth
    assert fourth < fifth


def test_elastic_damage_grows_within_its_wide_and_within_its_fine_severities() -> None:
    images = natural()
    wide_1, wide_2, *fine = (damage(images, "elastic_transform", s) for s in SEVERITIES)
    assert 0 < wide_1 < wide_2
    assert fine == sorted(fine)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_grey_stays_usable(name: str) -> None:
    grey = np.full((4, 48, 48, 3), 100, np.uint8)
    for severity in SEVERITIES:
        found = corrupted(grey, name, severity).astype(np.int64)
        assert 40 < found.mean() < 250
        if name in KEEP_GREY:
            assert np.abs(found - 100).max() <= 1


@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.filterwarnings("error")
def test_black_and_white_pass_without_a_warning(name: str, level: int) -> None:
    corrupted(np.full((2, 32, 32, 3), level, np.uint8), name, 5)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_no_images_give_no_images(name: str) -> None:
    assert corrupted(np.zeros((0, 32, 32, 3), np.uint8), name, 1).shape == (0, 32, 32, 3)


def test_brightness_keeps_the_hue() -> None:
    red = np.full((1, 16, 16, 3), (100, 50, 0), np.uint8)
    assert corrupted(red, "brightness", 2)[0, 0, 0].tolist() == [151, 76, 0]


def test_impulses_hit_the_published_share_half_of_them_white() -> None:
    found = corrupted(np.full((16, 64, 64, 3), 128, np.uint8), "impulse_noise", 5)
    assert np.mean(found == 0) == pytest.approx(0.135, abs=0.005)
    assert np.mean(found == 255) == pytest.approx(0.135, abs=0.005)


def test_glass_shuffles_pixels_and_loses_none_of_their_light() -> None:
    images = natural(4, 64)
    found = corrupted(images, "glass_blur", 5)
    assert found.mean() == pytest.approx(images.mean(), abs=0.5)


def test_lengths_scale_with_the_side() -> None:
    small = natural(4, 56)
    large = small.repeat(4, axis=1).repeat(4, axis=2)
    shrunk = corrupted(large, "defocus_blur", 4).reshape(4, 56, 4, 56, 4, 3).mean(axis=(2, 4))
    found = corrupted(small, "defocus_blur", 4).astype(np.float64)
    assert np.abs(shrunk - found).mean() < 0.1 * np.abs(found - small).mean()


def test_unknown_corruptions_and_severities_are_refused_by_name() -> None:
    images = natural(1, 32)
    with pytest.raises(ValueError, match="unknown corruption 'rain'"):
        corrupted(images, "rain", 1)
    for severity in (0, 6):
        with pytest.raises(ValueError, match=f"unknown severity {severity}"):
            corrupted(images, "fog", severity)


@pytest.mark.parametrize("shape", [(32, 32, 3), (1, 32, 24, 3), (1, 32, 32, 1), (1, 8, 8, 3)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images (are uint8|have a side of 8)"):
        corrupted(np.zeros(shape, np.uint8), "fog", 1)


def test_images_of_another_type_are_refused() -> None:
    floats: NDArray[np.generic] = np.zeros((1, 32, 32, 3), np.float32)
    with pytest.raises(ValueError, match="images are float32"):
        corrupted(floats, "fog", 1)  # type: ignore[arg-type]
