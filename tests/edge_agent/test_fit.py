"""The first generation's data: what is read, what is refused, what is held out."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edge_agent.errors import TrainingDataError
from edge_agent.fit import encode, fit, load_labelled, split


@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=6),
    st.floats(0.05, 0.9),
    st.integers(0, 2**31),
)
def test_every_class_is_both_learned_and_held_out(
    counts: list[int], holdout: float, seed: int
) -> None:
    labels = tuple(f"class-{k}" for k, count in enumerate(counts) for _ in range(count))
    held_out = split(labels, holdout=holdout, seed=seed)
    for k in range(len(counts)):
        mine = np.array([label == f"class-{k}" for label in labels])
        assert 1 <= held_out[mine].sum() < mine.sum()
    assert np.array_equal(held_out, split(labels, holdout=holdout, seed=seed))


def test_a_class_of_one_sample_is_refused_by_name() -> None:
    with pytest.raises(TrainingDataError, match="'lonely'"):
        split(("a", "a", "lonely"), holdout=0.3, seed=0)


def test_an_archive_is_read_grey_or_in_colour(tmp_path: Path) -> None:
    grey = np.full((4, 8, 8), 7, np.uint8)
    for name, x in (
        ("grey", grey),
        ("one", grey[..., None]),
        ("rgb", np.repeat(grey[..., None], 3, 3)),
    ):
        np.savez(tmp_path / f"{name}.npz", x=x, y=np.array([0, 1, 0, 1]))
        loaded = load_labelled(tmp_path / f"{name}.npz", 16)
        assert loaded.images.shape == (4, 16, 16, 3)
        assert (loaded.images == 7).all()
        assert loaded.labels == ("0", "1", "0", "1")


def test_numbers_become_class_names(tmp_path: Path) -> None:
    path = tmp_path / "named.npz"
    np.savez(
        path,
        x=np.zeros((3, 8, 8), np.uint8),
        y=np.array([1, 0, 1]),
        class_names=np.array(["cat", "dog"]),
    )
    assert load_labelled(path, 8).labels == ("dog", "cat", "dog")


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"x": np.zeros((2, 8, 8), np.uint8)}, "'y'"),
        ({"x": np.zeros((2, 8, 8)), "y": np.zeros(2, int)}, "float64"),
        ({"x": np.zeros((2, 8), np.uint8), "y": np.zeros(2, int)}, r"\[2, 8\]"),
        ({"x": np.zeros((2, 8, 8, 7), np.uint8), "y": np.zeros(2, int)}, "7 channels"),
        ({"x": np.zeros((0, 8, 8), np.uint8), "y": np.zeros(0, int)}, r"\[0, 8, 8\]"),
        ({"x": np.zeros((2, 8, 8), np.uint8), "y": np.zeros(3, int)}, r"\[3\]"),
        ({"x": np.zeros((2, 8, 8), np.uint8), "y": np.zeros(2)}, "float64"),
        ({"x": np.zeros((2, 8, 8), np.uint8), "y": np.array(["a", ""])}, "empty label"),
        (
            {
                "x": np.zeros((1, 8, 8), np.uint8),
                "y": np.array([5]),
                "class_names": np.array(["a"]),
            },
            "class 5",
        ),
    ],
)
def test_an_unusable_archive_is_refused_with_the_reason(
    tmp_path: Path, arrays: dict[str, np.ndarray], complaint: str
) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(TrainingDataError, match=complaint):
        load_labelled(path, 8)


def test_an_archive_with_pickled_objects_is_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "objects.npz"
    np.savez(path, x=np.zeros((1, 8, 8), np.uint8), y=np.array([{"a": 1}], dtype=object))
    with pytest.raises(TrainingDataError, match="cannot read"):
        load_labelled(path, 8)


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "junk.npz"
    path.write_bytes(content)
    with pytest.raises(TrainingDataError, match=r"junk\.npz"):
        load_labelled(path, 8)


def test_a_missing_file_and_an_empty_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingDataError, match="does not exist"):
        load_labelled(tmp_path / "nowhere.npz", 8)
    with pytest.raises(TrainingDataError, match="no images"):
        load_labelled(tmp_path, 8)


def test_a_directory_has_one_folder_a_class(tmp_path: Path) -> None:
    for label, size in (("cat", (5, 9)), ("dog", (12, 12))):
        (tmp_path / label).mkdir()
        for k in range(2):
            Image.new("RGB", size, (10 * k, 0, 0)).save(tmp_path / label / f"{k}.png")
        (tmp_path / label / "notes.txt").write_text("not an image")
    loaded = load_labelled(tmp_path, 8)
    assert loaded.labels == ("cat", "cat", "dog", "dog")
    assert loaded.images.shape == (4, 8, 8, 3)


def test_a_damaged_image_in_a_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "broken.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(TrainingDataError, match=r"broken\.png"):
        load_labelled(tmp_path, 8)


def test_fitting_keeps_the_calibration_part_out_of_the_statistics(sessions, make_images) -> None:
    images, labels = make_images((0, 1, 2), 20, seed=3)
    told: list[int] = []
    features = encode(sessions, images, progress=told.append)
    assert sum(told) == len(images)
    fitted = fit(
        features,
        labels,
        encoder=sessions.package.digest,
        task="stripes",
        created_by="device-a",
        created_at=1.0,
        holdout=0.25,
    )
    manifest = fitted.bundle.manifest
    assert (manifest.samples, len(fitted.calibration_features)) == (45, 15)
    assert manifest.family == "frozen"
    assert fitted.bundle.tensors == {}
    assert manifest.labels == ("stripes-0", "stripes-1", "stripes-2")
    assert fitted.accuracy >= 0.9
    assert len(manifest.score_quantiles) == 101
