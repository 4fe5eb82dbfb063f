"""A small labelled set of striped images in a file, and the shipped encoder's activations of it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_agent.bench.activations import Activations, cached
from edge_agent.bench.datasets import LabelledSet, load
from exporter.package import EncoderPackage

CLASSES, PER_CLASS = 4, 15


@pytest.fixture(scope="session")
def striped_file(
    make_images: Callable[..., tuple[np.ndarray, tuple[str, ...]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Four classes of 15 images in one part, in three domains."""
    images, labels = make_images(range(CLASSES), PER_CLASS)
    domain = np.arange(len(labels)) % 3
    path = tmp_path_factory.mktemp("set") / "striped.npz"
    np.savez(
        path,
        x=images,
        y=np.array([int(label.split("-")[1]) for label in labels]),
        class_names=np.array([f"stripes-{k}" for k in range(CLASSES)]),
        domain=domain,
        domain_names=np.array(["dawn", "noon", "dusk"]),
    )
    return path


@pytest.fixture(scope="session")
def striped(striped_file: Path) -> LabelledSet:
    return load(striped_file)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def activations(striped: LabelledSet, package: EncoderPackage, cache: Path) -> Activations:
    return cached(striped, package, cache)
