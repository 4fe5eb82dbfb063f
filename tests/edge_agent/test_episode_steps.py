"""The episode machine: each path of a shift, and laws over random event sequences."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent import episode_events as ev
from edge_agent.episode import Episode, Policy, Stage, open_episode
from edge_agent.episode_steps import ALIGN_LIMIT, resume, step

POLICY = Policy(min_labels=8, more_labels=4, align_samples=64)
OFFLINE = replace(POLICY, online=False)
A, B, T = "a" * 64, "b" * 64, "c" * 64


def ref(digest: str, similarity: float = 0.9) -> ev.CandidateRef:
    return ev.CandidateRef(digest, 100, similarity, b"statement", b"signature")


def opened(policy: Policy = POLICY, *, pinned: bool = False) -> Episode:
    return open_episode(
        1, now=0.0, alarm_seq=100, onset_seq=90, generation=1, pinned=pinned, policy=policy
    )


def run(
    episode: Episode, *events: ev.Event, policy: Policy = POLICY
) -> tuple[Episode, tuple[ev.Action, ...]]:
    actions: tuple[ev.Action, ...] = ()
    for event in events:
        episode, actions = step(episode, event, now=1.0, policy=policy)
    return episode, actions


SHIFTED = ev.SamplesSeen(since_alarm=20, foreign=15, since_onset=40)
FOUND = ev.SearchAnswered((ref(A), ref(B)))


def test_an_alarm_that_does_not_last_is_closed_as_passed() -> None:
    episode, actions = run(opened(), ev.SamplesSeen(48, 4, 58))
    assert episode.stage is Stage.CLOSED
    assert episode.outcome.startswith("passed")
    assert actions == ()


def test_a_doubtful_alarm_is_watched_longer() -> None:
    episode, _ = run(opened(), ev.SamplesSeen(20, 2, 30))
    assert episode.stage is Stage.SUSPECTED


def test_a_confirmed_alarm_waits_for_enough_samples_to_search_with() -> None:
    episode, actions = run(opened(), ev.SamplesSeen(16, 12, 20))
    assert (episode.stage, actions) == (Stage.CONFIRMED, ())
    episode, actions = run(episode, ev.SamplesSeen(28, 20, 32))
    assert (episode.stage, actions) == (Stage.SEEKING, (ev.Search(),))


def test_a_fitting_bundle_is_pulled_tried_built_and_activated() -> None:
    episode, actions = run(opened(), SHIFTED, FOUND)
    assert actions == (ev.Pull(ref(A)),)
    episode, actions = run(episode, ev.CandidatePulled(A))
    assert actions == (ev.Try(ref(A)),)
    episode, actions = run(episode, ev.TrialVerdict(A, True, "fits"))
    assert actions == (ev.Build(A, False),)
    episode, actions = run(episode, ev.GenerationBuilt(A, 2))
    assert actions == (ev.Activate(2, A, False),)
    episode, actions = run(episode, ev.GenerationActivated(2))
    assert episode.stage is Stage.CLOSED
    assert "generation 2" in episode.outcome
    assert [m.stage for m in episode.history] == [
        Stage.SUSPECTED,
        Stage.CONFIRMED,
        Stage.SEEKING,
        Stage.TRIAL,
        Stage.INSTALLED,
        Stage.CLOSED,
    ]


def test_a_refused_candidate_is_never_tried_again_in_the_episode() -> None:
    episode, actions = run(
        opened(), SHIFTED, FOUND, ev.CandidatePulled(A), ev.TrialVerdict(A, False, "does not fit")
    )
    assert actions == (ev.Pull(ref(B)),)
    episode, _ = run(episode, ev.CandidateFailed(B, "digest differs"))
    assert episode.stage is Stage.WAITING_FOR_LABELS
    episode, actions = run(episode, ev.SearchDue())
    assert actions == (ev.Search(),)
    episode, actions = run(episode, FOUND)
    assert (episode.stage, actions) == (Stage.WAITING_FOR_LABELS, ())


def test_a_candidate_lost_with_the_link_may_be_tried_again() -> None:
    episode, _ = run(
        opened(),
        SHIFTED,
        ev.SearchAnswered((ref(A),)),
        ev.CandidateFailed(A, "offline", for_good=False),
    )
    assert episode.stage is Stage.WAITING_FOR_LABELS
    _, actions = run(episode, ev.SearchDue(), FOUND)
    assert actions == (ev.Pull(ref(A)),)


def test_candidates_below_the_similarity_floor_are_not_pulled() -> None:
    episode, actions = run(opened(), SHIFTED, ev.SearchAnswered((ref(A, 0.3),)))
    assert (episode.stage, actions) == (Stage.WAITING_FOR_LABELS, ())


def test_waiting_says_how_many_labels_are_missing_and_trains_when_they_came() -> None:
    episode, _ = run(opened(), SHIFTED, ev.SearchAnswered(()), ev.LabelsAvailable(3))
    assert "3 of 8" in episode.note
    episode, actions = run(episode, ev.LabelsAvailable(8))
    assert (episode.stage, actions) == (Stage.TRAINING, (ev.Train(1),))


def test_labels_that_came_early_start_training_when_the_catalogue_has_nothing() -> None:
    episode, actions = run(
        opened(), ev.LabelsAvailable(9), SHIFTED, ev.SearchFailed("no answer within 30 s")
    )
    assert (episode.stage, actions) == (Stage.TRAINING, (ev.Train(1),))


def test_an_offline_device_trains_without_searching() -> None:
    episode, actions = run(opened(OFFLINE), ev.LabelsAvailable(8), SHIFTED, policy=OFFLINE)
    assert (episode.stage, actions) == (Stage.TRAINING, (ev.Train(1),))


def test_a_trained_bundle_is_validated_before_it_is_built() -> None:
    episode, actions = run(
        opened(), ev.LabelsAvailable(8), SHIFTED, ev.SearchAnswered(()), ev.TrainingDone(1, T)
    )
    assert (episode.stage, actions) == (Stage.VALIDATING, (ev.Validate(T, 1),))
    episode, actions = run(episode, ev.ValidationVerdict(T, True, "better"))
    assert actions == (ev.Build(T, True),)
    episode, actions = run(episode, ev.GenerationBuilt(T, 2))
    assert actions == (ev.Activate(2, T, True),)
    episode, _ = run(episode, ev.GenerationActivated(2))
    assert "trained here" in episode.outcome


def test_a_training_that_did_not_help_asks_for_more_labels() -> None:
    episode, _ = run(
        opened(),
        ev.LabelsAvailable(8),
        SHIFTED,
        ev.SearchAnswered(()),
        ev.TrainingDone(1, T),
        ev.ValidationVerdict(T, False, "no better than what runs"),
    )
    assert episode.stage is Stage.WAITING_FOR_LABELS
    assert episode.needed == 12
    episode, actions = run(episode, ev.LabelsAvailable(12))
    assert actions == (ev.Train(2),)


def test_a_device_that_cannot_train_keeps_waiting_for_a_catalogue_bundle() -> None:
    episode, _ = run(
        opened(),
        ev.LabelsAvailable(8),
        SHIFTED,
        ev.SearchAnswered(()),
        ev.TrainingFailed(1, "install driftkeel[train]", unavailable=True),
    )
    assert episode.stage is Stage.WAITING_FOR_LABELS
    assert "install driftkeel[train]" in episode.note
    episode, actions = run(episode, ev.LabelsAvailable(50))
    assert actions == ()
    _, actions = run(episode, ev.SearchDue(), FOUND)
    assert actions == (ev.Pull(ref(A)),)


def test_a_pinned_device_waits_says_so_and_goes_on_when_unpinned() -> None:
    episode, actions = run(opened(pinned=True), SHIFTED)
    assert (episode.stage, actions) == (Stage.SEEKING, ())
    assert episode.pinned
    episode, actions = run(episode, ev.PinChanged(False))
    assert actions == (ev.Search(),)


def test_a_pin_between_build_and_activation_holds_the_activation_back() -> None:
    episode, actions = run(
        opened(),
        SHIFTED,
        FOUND,
        ev.CandidatePulled(A),
        ev.TrialVerdict(A, True, "fits"),
        ev.PinChanged(True),
        ev.GenerationBuilt(A, 2),
    )
    assert actions == ()
    _, actions = run(episode, ev.PinChanged(False))
    assert actions == (ev.Activate(2, A, False),)


@pytest.mark.parametrize("pinned", [False, True])
def test_an_operators_switch_closes_the_episode_and_cancels_its_work(pinned: bool) -> None:
    episode, actions = run(opened(pinned=pinned), SHIFTED, ev.OperatorChose(1))
    assert episode.stage is Stage.CLOSED
    assert actions == (ev.Cancel(),)


def test_a_bundle_that_cannot_be_installed_is_refused() -> None:
    episode, _ = run(
        opened(),
        SHIFTED,
        ev.SearchAnswered((ref(A),)),
        ev.CandidatePulled(A),
        ev.TrialVerdict(A, True, "fits"),
        ev.InstallFailed(A, "outputs are not finite"),
    )
    assert episode.stage is Stage.WAITING_FOR_LABELS
    assert episode.refused == (A,)


def waiting(*, pinned: bool = False) -> Episode:
    return run(opened(), SHIFTED, ev.SearchFailed("offline"), ev.PinChanged(pinned))[0]


def many(samples: int) -> ev.SamplesSeen:
    return ev.SamplesSeen(samples, samples, samples)


def test_what_waits_for_labels_is_aligned_and_goes_on_waiting() -> None:
    episode, actions = run(waiting(), many(63))
    assert actions == ()
    episode, actions = run(episode, many(64))
    assert actions == (ev.Align(),)
    episode, actions = run(episode, ev.AlignmentTried(2, "helps"))
    assert (episode.stage, actions) == (Stage.WAITING_FOR_LABELS, (ev.Activate(2, "", False),))
    assert episode.note.startswith("helps; aligned, waiting for labels: 0 of 8 labelled samples")
    assert not episode.awaits_samples
    assert resume(episode, POLICY) == (ev.Activate(2, "", False), ev.Search())
    episode, actions = run(episode, ev.GenerationActivated(2), ev.LabelsAvailable(8))
    assert (episode.stage, actions) == (Stage.TRAINING, (ev.Train(1),))


def test_aligning_that_does_not_help_is_tried_with_ever_more_samples_and_then_no_more() -> None:
    episode, tries = waiting(), []
    for samples in range(40, 4 * ALIGN_LIMIT):
        episode, actions = run(episode, many(samples))
        if actions:
            tries.append(samples)
            episode, _ = run(episode, ev.AlignmentTried(None, "does not help"))
    assert tries == [64, 128, 256, 512, 1024]
    assert not episode.awaits_samples
    assert [m.note for m in episode.history].count("does not help") == 5


def test_a_pinned_device_aligns_once_it_is_unpinned() -> None:
    episode, actions = run(waiting(pinned=True), many(64))
    assert actions == ()
    episode, actions = run(episode, ev.PinChanged(False), many(65))
    assert actions == (ev.Align(),)
    episode, actions = run(episode, ev.PinChanged(True), ev.AlignmentTried(2, "helps"))
    assert actions == ()
    episode, actions = run(episode, ev.PinChanged(False))
    assert actions == (ev.Activate(2, "", False), ev.Search())


def test_an_operator_who_goes_back_is_not_overruled_by_an_alignment() -> None:
    episode, actions = run(waiting(), many(64), ev.OperatorChose(1), ev.AlignmentTried(2, "helps"))
    assert (episode.stage, episode.aligned, actions) == (Stage.CLOSED, None, ())
    aligned, _ = run(waiting(), many(64), ev.AlignmentTried(2, "helps"))
    episode, _ = run(aligned, ev.OperatorChose(1))
    assert resume(episode, POLICY) == ()


def test_an_alignment_that_comes_too_late_or_does_not_run_changes_nothing() -> None:
    training, _ = run(waiting(), many(64), ev.LabelsAvailable(8))
    assert run(training, ev.AlignmentTried(2, "helps")) == (training, ())
    aligned, _ = run(waiting(), many(64), ev.AlignmentTried(2, "helps"))
    episode, actions = run(aligned, ev.InstallFailed("", "damaged"))
    assert (episode.stage, episode.aligned, actions) == (Stage.WAITING_FOR_LABELS, None, ())
    assert resume(episode, POLICY) == (ev.Search(),)


digests = st.sampled_from([A, B, T])
events = st.one_of(
    st.builds(ev.SamplesSeen, st.integers(0, 60), st.integers(0, 60), st.integers(0, 80)),
    st.builds(ev.LabelsAvailable, st.integers(0, 40)),
    st.just(ev.SearchDue()),
    st.builds(ev.SearchAnswered, st.lists(st.builds(ref, digests), max_size=3).map(tuple)),
    st.builds(ev.SearchFailed, st.just("offline")),
    st.builds(ev.CandidatePulled, digests),
    st.builds(ev.CandidateFailed, digests, st.just("gone"), st.booleans()),
    st.builds(ev.TrialVerdict, digests, st.booleans(), st.just("why")),
    st.builds(ev.TrainingDone, st.integers(1, 3), digests),
    st.builds(ev.TrainingFailed, st.integers(1, 3), st.just("why"), st.booleans()),
    st.builds(ev.ValidationVerdict, digests, st.booleans(), st.just("why")),
    st.builds(ev.GenerationBuilt, digests, st.integers(2, 4)),
    st.builds(ev.InstallFailed, digests, st.just("why")),
    st.builds(ev.GenerationActivated, st.integers(2, 4)),
    st.builds(ev.InstallFailed, st.just(""), st.just("why")),
    st.builds(ev.AlignmentTried, st.none() | st.integers(2, 4), st.just("why")),
    st.builds(ev.PinChanged, st.booleans()),
    st.builds(ev.OperatorChose, st.integers(1, 4)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(events, max_size=40), st.booleans(), st.booleans())
def test_no_order_of_events_breaks_the_story(
    sequence: list[ev.Event], online: bool, can_train: bool
) -> None:
    """One activation at most, nothing refused is used, pins hold, and every step survives JSON."""
    policy = replace(POLICY, online=online, can_train=can_train)
    episode = opened(policy)
    activating: set[int] = set()
    for event in sequence:
        before = episode
        episode, actions = step(episode, event, now=1.0, policy=policy)
        assert Episode.from_dict(json.loads(json.dumps(episode.to_dict()))) == episode
        assert all(isinstance(a, ev.Cancel) for a in actions) or not episode.pinned
        assert len(actions) <= 1 or actions == resume(episode, policy)
        if not before.open:
            assert (episode, actions) == (before, ())
        for action in actions:
            match action:
                case ev.Activate(number, ""):
                    assert episode.stage is Stage.WAITING_FOR_LABELS
                    assert number == episode.aligned
                case ev.Activate(number, digest, trained):
                    assert episode.stage is Stage.INSTALLED
                    assert digest == episode.candidate
                    assert digest not in episode.refused
                    assert trained == episode.trained
                    activating = {number}
                    assert number == episode.built
                case ev.Pull(candidate) | ev.Try(candidate):
                    assert candidate.digest not in episode.refused
                case ev.Search():
                    assert policy.online
                case ev.Train():
                    assert policy.can_train
        if episode.stage is Stage.CLOSED and "runs with bundle" in episode.outcome:
            assert len(activating) == 1


@settings(max_examples=200, deadline=None)
@given(st.lists(events, max_size=25), st.data())
def test_every_story_comes_to_rest_when_its_actions_are_answered(
    sequence: list[ev.Event], data: st.DataObject
) -> None:
    """From any state reached, answering each action leads to closed or to waiting for labels."""
    episode = opened()
    for event in sequence:
        episode, _ = step(episode, event, now=1.0, policy=POLICY)
    episode, _ = step(episode, ev.PinChanged(False), now=1.0, policy=POLICY)
    episode, _ = step(episode, ev.SamplesSeen(60, 60, 80), now=1.0, policy=POLICY)
    actions = resume(episode, POLICY)
    for _ in range(40):
        if not actions:
            break
        answer = data.draw(answers(actions[0]))
        episode, actions = step(episode, answer, now=2.0, policy=POLICY)
    assert episode.stage in (Stage.CLOSED, Stage.WAITING_FOR_LABELS)


def answers(action: ev.Action) -> st.SearchStrategy[ev.Event]:
    match action:
        case ev.Search():
            return st.sampled_from([FOUND, ev.SearchAnswered(()), ev.SearchFailed("late")])
        case ev.Pull(candidate):
            digest = candidate.digest
            return st.sampled_from([ev.CandidatePulled(digest), ev.CandidateFailed(digest, "x")])
        case ev.Try(candidate):
            return st.builds(
                ev.TrialVerdict, st.just(candidate.digest), st.booleans(), st.just("x")
            )
        case ev.Train(training):
            return st.sampled_from([ev.TrainingDone(training, T), ev.TrainingFailed(training, "x")])
        case ev.Validate(digest):
            return st.builds(ev.ValidationVerdict, st.just(digest), st.booleans(), st.just("x"))
        case ev.Build(digest):
            return st.sampled_from([ev.GenerationBuilt(digest, 9), ev.InstallFailed(digest, "x")])
        case ev.Activate(number, digest):
            return st.sampled_from([ev.GenerationActivated(number), ev.InstallFailed(digest, "x")])
    raise AssertionError(action)


def test_a_cancelled_training_waits_for_more_labels_and_starts_by_itself_only_then() -> None:
    training, _ = run(opened(OFFLINE), SHIFTED, ev.LabelsAvailable(8), policy=OFFLINE)
    assert training.stage is Stage.TRAINING
    cancelled, actions = run(training, ev.TrainingCancelled(training.trainings), policy=OFFLINE)
    assert (cancelled.stage, actions) == (Stage.WAITING_FOR_LABELS, (ev.Cancel(),))
    assert cancelled.needed == 8 + OFFLINE.more_labels
    assert "cancelled by the operator" in cancelled.note
    assert resume(cancelled, OFFLINE) == ()
    # What the cancelled trainer still brought comes too late.
    same, actions = run(cancelled, ev.TrainingDone(training.trainings, T), policy=OFFLINE)
    assert (same, actions) == (cancelled, ())
    again, actions = run(cancelled, ev.LabelsAvailable(12), policy=OFFLINE)
    assert (again.stage, actions) == (Stage.TRAINING, (ev.Train(2),))


@pytest.mark.parametrize("training", [0, 2])
def test_cancelling_another_training_than_the_running_one_changes_nothing(training: int) -> None:
    episode, _ = run(opened(OFFLINE), SHIFTED, ev.LabelsAvailable(8), policy=OFFLINE)
    assert run(episode, ev.TrainingCancelled(training), policy=OFFLINE) == (episode, ())
