"""A device whose base features are the prefix's alone: no suffix runs unless an adapter does."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from adapter_store.bundle import Bundle, bundle_digest, check_compatible, pack, unpack
from edge_agent import trainer
from edge_agent.fit import encode
from edge_agent.serving import base_passes, suffix_share
from edge_agent.trials import Verdict
from exporter.build import build_vit
from exporter.package import PREFIX_KEY, SUFFIX_KEY, EncoderPackage, default_encoder_package
from exporter.preprocess import prepare
from exporter.sessions import EncoderSessions
from ood.statistics import ClassStatistics, l2_normalise
from tests.edge_agent.conftest import fitted_stripes, random_tensors, striped
from tests.edge_agent.test_serving import Counting, serving_of
from tests.edge_agent.test_trainer import job_directory  # noqa: F401 - a fixture


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> EncoderPackage:
    """The shipped encoder, cut where it is, with base features of its first blocks."""
    shipped = default_encoder_package()
    state = {
        name.removeprefix(part): torch.tensor(np.asarray(value))
        for part in (PREFIX_KEY, SUFFIX_KEY)
        for name, value in shipped.weights(part).items()
    }
    return build_vit(
        state,
        image_size=shipped.image_size,
        suffix_blocks=2,
        name="alone",
        out=tmp_path_factory.mktemp("encoder") / "alone",
        base_features="prefix",
    )


@pytest.fixture(scope="module")
def sessions(package: EncoderPackage) -> EncoderSessions:
    return EncoderSessions(package)


def bundle(sessions: EncoderSessions, classes: tuple[int, ...], *, adapter: int | None) -> bytes:
    """Statistics of stripes, and a random adapter where a seed for one is given."""
    package = sessions.package
    images, labels = striped(classes, 24, seed=1)
    fitted = fitted_stripes(sessions, classes)
    if adapter is None:
        return pack(fitted)
    tensors = random_tensors(package, adapter)
    own = sessions.suffix(sessions.prefix(prepare(images, package)), tensors, "bottleneck")
    manifest = msgspec.structs.replace(
        fitted.manifest, family="bottleneck", rank=4, sites=package.sites
    )
    statistics = ClassStatistics.fit(l2_normalise(own), labels)
    return pack(Bundle(manifest, tensors, fitted.base, statistics, fitted.signature))


def test_only_samples_of_an_adapter_run_the_suffix(sessions: EncoderSessions) -> None:
    plain = bundle(sessions, (0, 1, 2), adapter=None)
    adapted = bundle(sessions, (3, 4, 5), adapter=1)
    counting = Counting(sessions)
    calibration = encode(sessions, striped((0, 1, 2), 40, seed=2)[0])
    serving = serving_of(counting, [plain, adapted], calibration)
    images, labels = striped(range(6), 6, seed=3)
    answers = serving.predict(images)
    share = suffix_share(sessions.package)
    assert np.mean([a.label == label for a, label in zip(answers, labels, strict=True)]) >= 0.9
    assert counting.prefix_rows == len(images)
    by_adapter = [a for a in answers if a.adapter == bundle_digest(adapted)]
    others = [a for a in answers if a.adapter is None]
    assert 10 <= len(by_adapter) <= 26
    assert all(a.passes == pytest.approx(1.0) for a in by_adapter)
    assert min(a.passes for a in others) == pytest.approx(1.0 - share)
    extra = sum(a.passes - base_passes(sessions.package) for a in answers)
    assert extra == pytest.approx(share * counting.adapted_rows)


def test_a_bundle_trained_on_it_fits_it(
    job_directory: Path,  # noqa: F811 - that fixture
    package: EncoderPackage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    better = Verdict(True, "better", {"held_out_accuracy_adapter": 1.0})
    monkeypatch.setattr(trainer, "earns_its_place", lambda _: better)
    made = unpack(trainer.make_bundle(job_directory))
    check_compatible(made, package.interface())
    assert (made.base.dim, made.own.dim) == (package.feature_dim, package.network_dim)
