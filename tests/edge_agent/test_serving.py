"""One generation: right answers, one prefix pass, nothing that depends on order or neighbours."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adapter_store.bundle import Bundle, bundle_digest, unpack
from edge_agent.decision import OwnHeads
from edge_agent.errors import InstallError
from edge_agent.fit import encode
from edge_agent.serving import Serving, suffix_share
from exporter.errors import PreprocessError
from exporter.sessions import EncoderSessions
from ood.pooled import Pooled
from ood.statistics import ClassStatistics


def serving_of(
    sessions: Any, bundles: list[bytes], calibration: NDArray[np.float32], **changes: Any
) -> Serving:
    loaded = {bundle_digest(data): unpack(data) for data in bundles}
    options: dict[str, Any] = {"number": 3, "false_alarm_every": 1e4, "max_rounds": 4, **changes}
    return Serving(sessions, loaded, calibration, **options)


class Counting:
    """Sessions that count the rows each half was given."""

    def __init__(self, inner: EncoderSessions) -> None:
        self.package, self.threads, self._inner = inner.package, inner.threads, inner
        self.prefix_rows, self.base_rows, self.adapted_rows = 0, 0, 0

    def prefix(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        self.prefix_rows += len(images)
        return self._inner.prefix(images)

    def base_features(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        self.base_rows += len(hidden)
        return self._inner.base_features(hidden)

    def suffix_session(self, family: str) -> "Counting":
        self._adapted = self._inner.suffix_session(family)
        return self

    def run(self, names: None, feeds: dict[str, NDArray[np.float32]]) -> list[Any]:
        self.adapted_rows += len(feeds["hidden"])
        return self._adapted.run(names, feeds)


def test_known_classes_are_recognised(sessions, make_bundle, make_images, calibration) -> None:
    serving = serving_of(sessions, [make_bundle((0, 1, 2))], calibration)
    images, labels = make_images((0, 1, 2), 10, seed=5)
    answers = serving.predict(images)
    assert np.mean([a.label == label for a, label in zip(answers, labels, strict=True)]) >= 0.9
    assert {(a.adapter, a.generation, a.passes) for a in answers} == {(None, 3, 1.0)}
    assert all(0 < a.probability <= 1 and 0 < a.p_value <= 1 for a in answers)


def test_a_bundle_adds_its_classes_and_removing_it_restores_every_answer(
    sessions, make_bundle, make_images, calibration
) -> None:
    first, second = make_bundle((0, 1, 2)), make_bundle((3, 4, 5), adapter=1)
    images, labels = make_images(range(6), 5, seed=6)
    before = serving_of(sessions, [first], calibration).predict(images)
    both = serving_of(sessions, [first, second], calibration).predict(images)
    assert np.mean([a.label == label for a, label in zip(both, labels, strict=True)]) >= 0.9
    adapted = {a.adapter for a in both if a.label in {"stripes-3", "stripes-4", "stripes-5"}}
    assert adapted == {bundle_digest(second)}
    assert serving_of(sessions, [first], calibration).predict(images) == before


def test_the_order_of_installation_changes_no_answer(
    sessions, make_bundle, make_images, calibration
) -> None:
    bundles = [make_bundle((k, k + 1), adapter=k or None) for k in range(3)]
    images, _ = make_images(range(4), 4, seed=7)
    forwards = serving_of(sessions, bundles, calibration).predict(images)
    assert serving_of(sessions, bundles[::-1], calibration).predict(images) == forwards


def test_answers_and_scores_are_a_function_of_the_installed_set_bit_for_bit(
    sessions, make_bundle, make_images, calibration
) -> None:
    bundles = [make_bundle((2 * k, 2 * k + 1), adapter=k or None) for k in range(3)]
    images, _ = make_images(range(6), 2, seed=10)

    def bits(order: tuple[int, ...]) -> tuple[list[Any], bytes]:
        serving = serving_of(sessions, [bundles[k] for k in order], calibration)
        return serving.predict(images), serving.detector.score(calibration).tobytes()

    fewer, whole = bits((0, 1)), bits((0, 1, 2))
    assert bits((2, 0, 1)) == bits((1, 2, 0)) == whole
    assert fewer != whole
    assert bits((1, 0)) == fewer


def test_the_prefix_runs_once_a_sample_and_only_named_adapters_run(
    sessions, make_bundle, make_images, calibration
) -> None:
    counting = Counting(sessions)
    bundles = [make_bundle((0, 1, 2))]
    bundles += [make_bundle((3 + k,), adapter=k) for k in range(3)]
    serving = serving_of(counting, bundles, calibration)
    images, _ = make_images(range(6), 4, seed=8)
    answers = serving.predict(images)
    assert counting.prefix_rows == len(images)
    assert counting.base_rows == len(images)
    assert counting.adapted_rows < 2 * len(images)
    extra = sum(a.passes - 1.0 for a in answers)
    assert extra == pytest.approx(counting.adapted_rows * suffix_share(sessions.package))


def test_a_large_batch_is_answered_as_its_samples_alone(
    sessions, make_bundle, make_images, calibration
) -> None:
    serving = serving_of(
        sessions, [make_bundle((0, 1, 2)), make_bundle((3, 4), adapter=1)], calibration
    )
    images, _ = make_images(range(5), 8, seed=9)
    together = serving.predict(images)
    for row in range(0, len(images), 7):
        alone = serving.predict(images[row : row + 1])[0]
        assert (alone.label, alone.adapter) == (together[row].label, together[row].adapter)
        assert alone.probability == pytest.approx(together[row].probability, abs=1e-3)


def test_foreign_samples_score_higher_than_known_ones(
    sessions, make_bundle, make_images, calibration
) -> None:
    serving = serving_of(sessions, [make_bundle((0, 1, 2))], calibration)
    known = serving.infer(make_images((0, 1, 2), 8, seed=10)[0])
    foreign = serving.infer(make_images((4, 5), 8, seed=10)[0])
    assert np.median(foreign.scores) > known.scores.max()
    assert max(a.p_value for a in foreign.answers) < np.median([a.p_value for a in known.answers])


def test_an_adapter_that_overflows_is_refused(sessions, make_bundle, calibration) -> None:
    data = make_bundle((3, 4), adapter=1)
    bundle = unpack(data)
    huge = {name: np.full_like(value, 1e30) for name, value in bundle.tensors.items()}
    broken: dict[str, Bundle] = {bundle_digest(data): replace(bundle, tensors=huge)}
    serving = Serving(sessions, broken, calibration, number=0, false_alarm_every=1e4, max_rounds=4)
    with pytest.raises(InstallError, match=bundle_digest(data)[:12]):
        serving.check()


def test_a_good_generation_passes_its_check(sessions, make_bundle, calibration) -> None:
    serving_of(sessions, [make_bundle((0, 1)), make_bundle((3, 4), adapter=1)], calibration).check()


def test_an_empty_batch_is_refused(sessions, make_bundle, calibration) -> None:
    serving = serving_of(sessions, [make_bundle((0, 1, 2))], calibration)
    with pytest.raises(PreprocessError, match="at least one"):
        serving.predict(np.zeros((0, 8, 8, 3), np.uint8))


def test_few_samples_lean_on_the_covariance_of_all_bundles() -> None:
    rng = np.random.default_rng(0)
    spread = np.array([3.0, 0.1, 0.1, 0.1])
    many = ClassStatistics.fit(rng.normal(size=(400, 4)) * spread, ["a"] * 200 + ["b"] * 200)
    few_samples = rng.normal(size=(4, 4)) * spread
    few = ClassStatistics.fit(few_samples, ["c", "c", "d", "d"])
    across = few.means[:1] + np.array([0.0, 1.0, 0.0, 0.0])
    alone, leaning = OwnHeads(Pooled([few])).head(few), OwnHeads(Pooled([many, few])).head(few)
    assert leaning.distances(across)[0, 0] > 2 * alone.distances(across)[0, 0]


def test_base_features_in_answers_are_the_encoders(
    sessions, make_bundle, make_images, calibration
) -> None:
    serving = serving_of(sessions, [make_bundle((0, 1, 2))], calibration)
    images, _ = make_images((0, 1), 3, seed=11)
    assert np.allclose(serving.infer(images).features, encode(sessions, images), atol=1e-6)
