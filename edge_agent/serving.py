"""One generation, ready to answer: sessions, heads and shift detector in one immutable whole.

The agent swaps one Serving for another to change generation; the conductor makes one in memory
to try a candidate on its buffer. The prefix runs once for a sample; base features, the OOD
score and every adapter pass share it. Nothing here journals, alarms or writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from adapter_store.bundle import FROZEN, Bundle
from edge_agent.adapters import Adapters
from edge_agent.alignment import Alignment
from edge_agent.beside import Beside
from edge_agent.decision import Decision, OwnHeads
from edge_agent.errors import InstallError
from edge_agent.prepared import Prepared
from edge_agent.router import FloatArray, IntArray, Route
from exporter.errors import EncoderError, PreprocessError
from exporter.package import PREFIX_KEY, SUFFIX_KEY, WEIGHTS, EncoderPackage
from exporter.preprocess import prepare
from exporter.sessions import EncoderSessions
from ood.detector import Detector
from ood.mixture import BaseEvidence, Mixture

# So many adapters are kept in memory where nobody says otherwise.
ADAPTERS_IN_MEMORY: Final = 50

_BATCH: Final = 32  # bounds the memory of one inference, whatever a request holds
_NOISE_SEED: Final = 20_240_229


@dataclass(frozen=True, slots=True)
class Answer:
    """What is said about one sample.

    Attributes:
        sample_id: Names the sample in feedback; empty until the agent gave it a name.
        label: The predicted label.
        probability: Its probability, 0..1.
        adapter: Digest of the bundle whose adapter decided; None when the base encoder did.
        ood_score: How foreign the sample is; higher is more foreign.
        p_value: Conformal p-value of that score; small is foreign.
        generation: The generation that answered.
        passes: Encoder passes it took; 1 is the bare encoder.
    """

    sample_id: str
    label: str
    probability: float
    adapter: str | None
    ood_score: float
    p_value: float
    generation: int
    passes: float

    def named(self, sample_id: str) -> Answer:
        """The same answer under a name."""
        return replace(self, sample_id=sample_id)


@dataclass(frozen=True)
class Inference:
    """The answers to a batch and what the journal and the detector need beside them.

    Attributes:
        answers: One a sample, in order.
        features: float32 [n, d], l2-normalised base features, not aligned.
        scores: float64 [n], OOD scores.
        nearest: int64 [n], the component of the detector's mixture each sample is nearest to.
    """

    answers: list[Answer]
    features: NDArray[np.float32]
    scores: FloatArray
    nearest: IntArray


class Serving:
    """Everything one generation needs to answer; immutable.

    Args:
        sessions: The encoder's sessions, shared between generations.
        bundles: The installed bundles by digest; each is read once, in the order of the digests,
            so the order in which they were installed changes nothing.
        calibration_features: float [m, d], base features of held-out, unshifted samples.
        number: The generation's number; 0 for a candidate.
        digest: The generation's digest; empty for a candidate.
        false_alarm_every: The operator's false-alarm budget, in samples.
        max_rounds: Most adapters run for one sample.
        block: Samples that one scene of the stream lasts.
        prior_changes: Whether a change of the classes' proportions alone is a shift.
        alignment: Brings features of a shifted domain back, for the decision about samples that
            it makes likelier; None for a generation without one.
        adapters_in_memory: Most adapters kept in memory; the others are read when needed.
        prepared: The sums over the bundles, where they were kept; then none is read before a
            sample needs it.

    Attributes:
        number: The generation's number.
        bundles: The installed bundles by digest.
        summaries: What each of them says of itself, by digest, sorted.
        labels: Every label it can answer, sorted.
        detector: Scores samples and watches their stream.
    """

    def __init__(
        self,
        sessions: EncoderSessions,
        bundles: Mapping[str, Bundle],
        calibration_features: NDArray[np.floating[Any]],
        *,
        number: int,
        digest: str = "",
        false_alarm_every: float,
        max_rounds: int,
        block: int = 1,
        prior_changes: bool = False,
        alignment: Alignment | None = None,
        adapters_in_memory: int = ADAPTERS_IN_MEMORY,
        prepared: Prepared | None = None,
    ) -> None:
        self.number = number
        self.bundles = bundles
        prepared = prepared or Prepared.of(bundles)
        self.summaries = prepared.summaries
        self._digest = digest
        self._sessions = sessions
        self._package = sessions.package
        self._order = tuple(sorted(bundles))
        self._alignment = alignment
        self._adapters = Adapters(
            sessions, bundles, OwnHeads(prepared.own), capacity=adapters_in_memory
        )
        mixture = Mixture.of(prepared.base)
        self.detector = Detector.of(
            mixture,
            calibration_features.astype(np.float32),
            false_alarm_every=false_alarm_every,
            block=block,
            prior_changes=prior_changes,
            parts=self._package.manifest.feature_parts,
        )
        self._decision = Decision(
            mixture,
            [self.summaries[digest].family != FROZEN for digest in self._order],
            max_rounds=max_rounds,
        )
        self.labels = self._decision.labels
        self._suffix_share = suffix_share(sessions.package)
        self._base_passes = base_passes(sessions.package)
        self._beside = Beside(threads=sessions.threads)

    def on(self, sessions: EncoderSessions) -> Serving:
        """The same whole on other sessions of the same encoder; all else is shared."""
        other = copy(self)
        vars(other).update(
            _sessions=sessions,
            _adapters=self._adapters.on(sessions),
            _beside=Beside(threads=sessions.threads),
        )
        return other

    def predict(self, images: NDArray[np.uint8]) -> list[Answer]:
        """Answer a batch: uint8 [n, h, w, 3].

        Raises:
            PreprocessError: The images cannot be used.
        """
        return self.infer(images).answers

    def infer(self, images: NDArray[np.uint8]) -> Inference:
        """Answer a batch and keep what the journal needs.

        Args:
            images: uint8 [n, h, w, 3], any size.

        Raises:
            PreprocessError: The images cannot be used.
        """
        if not len(images):
            raise PreprocessError("there are no samples in the batch; send at least one")
        parts = [
            self.infer_prepared(prepare(images[start : start + _BATCH], self._package))
            for start in range(0, len(images), _BATCH)
        ]
        if len(parts) == 1:
            return parts[0]
        return Inference(
            answers=[answer for part in parts for answer in part.answers],
            features=np.concatenate([part.features for part in parts]),
            scores=np.concatenate([part.scores for part in parts]),
            nearest=np.concatenate([part.nearest for part in parts]),
        )

    def describe(self) -> dict[str, Any]:
        """What runs, as JSON-able values."""
        return {
            "number": self.number,
            "digest": self._digest,
            "aligned": self._alignment is not None,
            "labels": list(self.labels),
            "bundles": [
                {
                    "digest": digest,
                    "family": summary.family,
                    "task": summary.task,
                    "labels": list(summary.labels),
                    "samples": summary.samples,
                }
                for digest, summary in self.summaries.items()
            ],
        }

    def check(self, *, adapters: bool = True) -> None:
        """Answer noise and look at what comes out.

        Args:
            adapters: Run every adapter once, too.

        Raises:
            InstallError: An output is not finite or says nothing; the message names the bundle.
        """
        size = self._package.image_size
        rng = np.random.default_rng(_NOISE_SEED)
        noise = rng.integers(0, 256, (2, size, size, 3), dtype=np.uint8)
        if adapters:
            with np.errstate(all="ignore"):
                self._check_adapters(self._sessions.prefix(prepare(noise, self._package)))
        for answer in self.predict(noise):
            if not np.isfinite([answer.probability, answer.ood_score, answer.p_value]).all():
                raise InstallError("the generation gives answers that are not finite")

    def _check_adapters(self, hidden: NDArray[np.float32]) -> None:
        for digest, bundle in self.bundles.items():
            family = None if bundle.manifest.family == FROZEN else bundle.manifest.family
            features = self._sessions.suffix(hidden, bundle.tensors, family)
            if not np.isfinite(features).all() or not np.abs(features).max(axis=1).all():
                raise InstallError(
                    f"bundle {digest[:12]} gives features that are not finite or all zero; "
                    "its adapter is unusable"
                )

    def infer_prepared(self, prepared: NDArray[np.float32]) -> Inference:
        """Answer images that `exporter.preprocess.prepare` has made ready, all in one batch.

        Args:
            prepared: float32 [n, 3, s, s].
        """
        hidden = self._sessions.prefix(prepared)
        features = self._sessions.base_features(hidden)
        base = self.detector.mixture.evidence(features)
        # How foreign a sample is goes by what came: aligning must not hide that it is new.
        scoring = self._beside.later(lambda: self.detector.score(features, base))
        routed = self._route(hidden, features, base, scoring.begin)
        scores = scoring.value()
        answers = self._answers(routed, scores, self.detector.p_values(scores))
        return Inference(answers, features, scores, base.nearest())

    def _route(
        self,
        hidden: NDArray[np.float32],
        features: NDArray[np.float32],
        base: BaseEvidence,
        waiting: Callable[[], None],
    ) -> Route:
        """Decide; `waiting` is called before every adapter's pass."""
        settled = None
        if self._alignment is not None:
            mixture = self.detector.mixture
            aligned = self._alignment.applied(features, mixture)
            base = mixture.evidence(aligned)
            # An adapter's own features are not aligned: where one is, the base space decides.
            settled = (aligned != features).any(axis=1)

        def look(group: int, rows: IntArray) -> FloatArray | None:
            adapter = self._adapters.get(self._order[group])
            if adapter is None:
                return None
            waiting()
            return adapter.log_likelihoods(hidden[rows])

        return self._decision.route(base, look, settled=settled)

    def _answers(self, routed: Route, scores: FloatArray, p_values: FloatArray) -> list[Answer]:
        passes = self._base_passes + self._suffix_share * routed.adapter_passes
        return [
            Answer(
                sample_id="",
                label=self.labels[label],
                probability=float(routed.probabilities[row, label]),
                adapter=self._order[group]
                if self._decision.adapts[group] and routed.adapter_passes[row]
                else None,
                ood_score=float(scores[row]),
                p_value=float(p_values[row]),
                generation=self.number,
                passes=float(passes[row]),
            )
            for row, (label, group) in enumerate(zip(routed.label, routed.group, strict=True))
        ]


def base_passes(package: EncoderPackage) -> float:
    """What base features cost, in encoder passes: less than 1 where they are the prefix's alone.

    Raises:
        EncoderError: The package's weights cannot be read.
    """
    return 1.0 - suffix_share(package) if package.base_from_prefix else 1.0


def suffix_share(package: EncoderPackage) -> float:
    """The suffix's part of one encoder pass, 0..1, by parameters: what an adapter pass costs.

    Time differs a little: attention takes time but has few parameters.

    Raises:
        EncoderError: The package's weights cannot be read.
    """
    counts = dict.fromkeys((PREFIX_KEY, SUFFIX_KEY), 0)
    try:
        with safe_open(package.path / WEIGHTS, framework="numpy") as archive:
            for name in archive.keys():  # noqa: SIM118 - not a dictionary
                for part in counts:
                    if name.startswith(part):
                        counts[part] += math.prod(archive.get_slice(name).get_shape())
    except (SafetensorError, OSError) as error:
        raise EncoderError(f"cannot read {package.path / WEIGHTS}: {error}") from error
    return counts[SUFFIX_KEY] / max(sum(counts.values()), 1)
