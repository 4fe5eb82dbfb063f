"""The story the demo tells, step by step, and what is measured on the way."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from examples.demo.digits import FIRST, NEW, Images, Split, World
from examples.demo.display import DeviceLine, Display
from examples.demo.report import Track, versions
from examples.demo.stage import DemoError, Device, Stage, wait_for

MIN_LABELS = 180
CALM_SAMPLES = 160
SAMPLES_BEFORE_ADAPTING = 200
SAMPLES_AFTER_ADAPTING = 150
LABELS_COME_LATE_BY = 20
ADAPT_TIMEOUT_S = 120.0

STEPS = [
    "broker and catalogue start",
    "devices serve generation 1",
    "device A adapts to new digits",
    "device A adapts to a new camera",
    "operator approves",
    "device B pulls what A learnt",
    "operator rolls B back and forward",
    "report",
]


class Traffic:
    """Requests that never pause, so that a dropped one would be noticed.

    They are probes: answered like any other, but not part of what the device sees as its world.
    """

    def __init__(self, devices: list[Device], image: Images) -> None:
        self._devices = devices
        self._image = image
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="traffic", daemon=True)
        self.failed = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(30)

    def _run(self) -> None:
        split = Split(self._image[None], np.zeros(1, dtype=np.int64))
        while not self._end.wait(0.05):
            for device in self._devices:
                try:
                    device.probe(split)
                except DemoError:
                    self.failed += 1


@dataclass
class Watched:
    """A device, what is known of its stream, and what its operator would notice."""

    device: Device
    line: DeviceLine
    labels_arrive: bool
    track: Track = field(default_factory=Track)
    latencies_ms: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)
    alarms: list[int] = field(default_factory=list)
    shifts: dict[str, int] = field(default_factory=dict)
    adapted: dict[str, int] = field(default_factory=dict)
    probed: dict[int, list[tuple[str, float]]] = field(default_factory=dict)
    _late: deque[tuple[str, int]] = field(default_factory=deque)

    @property
    def generation(self) -> int:
        """The newest generation that answered."""
        return self.line.generation

    def stream(self, split: Split) -> None:
        """Send samples one by one; labels follow some samples later where they do at all."""
        for image, label in zip(split.images, split.labels, strict=True):
            begun = time.perf_counter()
            answer = self.device.predict(image)
            self.latencies_ms.append((time.perf_counter() - begun) * 1000)
            self._note(answer, int(label))
            if self.labels_arrive:
                self._late.append((answer["sample_id"], int(label)))
                if len(self._late) > LABELS_COME_LATE_BY:
                    self.device.feedback(*self._late.popleft())
            if len(self.track.correct) % 4 == 0:
                self._look()
        self._look()

    def flush_labels(self) -> None:
        """Let the labels that are still under way arrive."""
        while self._late:
            self.device.feedback(*self._late.popleft())

    def shift(self, what: str) -> None:
        """Note that the world changes now."""
        self.shifts[what] = len(self.track.correct)
        self.track.mark(f"shift: {what}")

    def adapt(self, what: str, split: Split, say: Callable[[str], None]) -> None:
        """Stream a shifted world until the device has adapted to it, then go on for a while.

        Raises:
            DemoError: No alarm came, or no new generation did.
        """
        before = self.generation
        known = len(self.alarms)
        self.shift(what)
        self.stream(split.first(SAMPLES_BEFORE_ADAPTING))
        self.flush_labels()
        if len(self.alarms) == known:
            raise DemoError(
                f"{self.device.name} did not notice {what} in {SAMPLES_BEFORE_ADAPTING} samples"
            )
        say(f"   alarm {self.delay(what)} samples after the shift; waiting for it to adapt")
        last = ""

        def adapted() -> bool | None:
            nonlocal last
            status = self._look()
            episode = status.get("episode") or {}
            told = " ".join(str(episode.get(k, "")) for k in ("state", "detail")).strip()
            if told and told != last:
                last = told
                self.line.note = told
                say(f"   {self.device.name}: {told}")
            # One that only aligns, while labels are waited for, is not the end of it.
            done = self.generation > before and episode.get("state") == "closed"
            return True if done else None

        wait_for(
            adapted,
            f"{self.device.name} to adapt to {what} (last: {last})",
            child=self.device.child,
            timeout_s=ADAPT_TIMEOUT_S,
        )
        self.adapted[what] = len(self.track.correct)
        rest = Split(split.images[SAMPLES_BEFORE_ADAPTING:], split.labels[SAMPLES_BEFORE_ADAPTING:])
        self.stream(rest.first(SAMPLES_AFTER_ADAPTING))
        self.flush_labels()

    def delay(self, what: str) -> int | None:
        """Samples from a shift to the first alarm after it."""
        return min(
            (a - self.shifts[what] for a in self.alarms if a > self.shifts[what]), default=None
        )

    def remember_probe(self, split: Split) -> list[tuple[str, float]]:
        """The answers to the probe set, kept by the generation that gave them."""
        answers = self.device.probe(split)
        kept = [(a["label"], a["probability"]) for a in answers]
        self.probed[answers[0]["generation"]] = kept
        self.line.generation = answers[0]["generation"]
        return kept

    def false_alarms(self) -> int:
        """Alarms while the world was one that the device knew."""
        shifted = [(at, self.adapted.get(what, at)) for what, at in self.shifts.items()]
        return sum(not any(begin < a <= end for begin, end in shifted) for a in self.alarms)

    def _note(self, answer: dict[str, Any], label: int) -> None:
        correct = answer["label"] == str(label)
        self.track.correct.append(correct)
        self.track.scores.append(answer["ood_score"])
        self.track.generations.append(answer["generation"])
        self.passes.append(answer["passes"])
        self.line.generation = answer["generation"]
        self.line.samples = len(self.track.correct)
        if len(self.track.correct) % 10 == 0:
            self.line.accuracy.append(float(np.mean(self.track.correct[-25:])))
            self.line.scores.append(float(np.mean(self.track.scores[-10:])))

    def _look(self) -> dict[str, Any]:
        status: dict[str, Any] = self.device.get("/v1/status")
        if status["generation"] is not None:
            self.line.generation = status["generation"]["number"]
        alarm = status["last_alarm"]
        if alarm is not None and alarm["seq"] not in self.alarms:
            # The journal numbers samples from 1, in the order they were sent.
            if not self.alarms or self.alarms[-1] <= max(self.shifts.values(), default=0):
                self.track.events.append((alarm["seq"], "alarm"))
            self.alarms.append(alarm["seq"])
        return status


@dataclass
class Story:
    """Runs the steps in order and collects what the report needs."""

    stage: Stage
    display: Display
    worlds: tuple[World, World]
    report: dict[str, Any] = field(default_factory=dict)
    watched: list[Watched] = field(default_factory=list)

    def run(self) -> None:
        """Tell the whole story.

        Raises:
            DemoError: A step did not happen.
        """
        with self.display.step(STEPS[0]) as step:
            step.note = self.stage.start_broker()
            self.stage.start_catalogue()
        with self.display.step(STEPS[1]) as step:
            a, b = (self._device(name, w) for name, w in self._named_worlds())
            step.note = "digits 0-4, statistics only"
        image = self.worlds[0].probe.images[0]
        with Traffic([a.device, b.device], image) as traffic:
            self._device_a(a)
            self._approve()
            self._device_b(b)
            self._roll_back(b)
        self._finish(a, b, traffic)

    def _named_worlds(self) -> list[tuple[str, World]]:
        return list(zip(("device-a", "device-b"), self.worlds, strict=True))

    def _device(self, name: str, world: World) -> Watched:
        self.stage.fit_device(name, world.fit, min_labels=MIN_LABELS)
        device = self.stage.start_device(name)
        line = self.display.devices.setdefault(name, DeviceLine())
        watched = Watched(device, line, labels_arrive=name == "device-a")
        watched.remember_probe(world.probe)
        self.watched.append(watched)
        return watched

    def _device_a(self, a: Watched) -> None:
        world, say = self.worlds[0], self.display.say
        first, new = world.probe.only(FIRST), world.probe.only(NEW)
        camera = world.probe.through_new_camera()
        accuracy = self.report["accuracy"] = {}
        with self.display.step(STEPS[2]) as step:
            accuracy["before_shift"] = a.device.accuracy(first)
            a.stream(world.stream.only(FIRST).first(CALM_SAMPLES))
            accuracy["new_classes_unadapted"] = a.device.accuracy(new)
            a.adapt("new digits", world.stream.only(NEW), say)
            accuracy["new_classes_adapted"] = a.device.accuracy(new)
            step.note = _change(accuracy, "new_classes")
        with self.display.step(STEPS[3]) as step:
            accuracy["new_camera_unadapted"] = a.device.accuracy(camera)
            a.adapt("new camera", world.stream.through_new_camera(), say)
            accuracy["new_camera_adapted"] = a.device.accuracy(camera)
            accuracy["first_classes_at_end"] = a.device.accuracy(first)
            accuracy["new_classes_at_end"] = a.device.accuracy(new)
            self.report["swap_ms"] = a.device.get("/v1/status")["swap_ms"]
            step.note = _change(accuracy, "new_camera")

    def _approve(self) -> None:
        with self.display.step(STEPS[4]) as step:
            candidates = wait_for(
                self._two_candidates,
                "device A's two bundles to arrive",
                child=self.stage.children[0],
            )
            self._type("adapters")
            for candidate in candidates:
                self._type(f"approve {candidate['digest'][:12]}")
            sizes = [int(candidate["size_bytes"]) for candidate in candidates]
            self.report["bundle_bytes"] = max(sizes)
            self.report["bundles"] = [
                {"digest": c["digest"], "size_bytes": c["size_bytes"]} for c in candidates
            ]
            step.note = f"{len(candidates)} bundles"

    def _two_candidates(self) -> list[dict[str, Any]] | None:
        found = self.stage.shell_json("adapters --status candidate")
        return found if len(found) >= 2 else None

    def _device_b(self, b: Watched) -> None:
        world, say = self.worlds[1], self.display.say
        with self.display.step(STEPS[5]) as step:
            b.stream(world.stream.only(FIRST).first(CALM_SAMPLES))
            b.adapt("new digits", world.stream.only(NEW), say)
            b.remember_probe(world.probe)
            new = b.device.accuracy(world.probe.only(NEW))
            b.adapt("new camera", world.stream.through_new_camera(), say)
            b.remember_probe(world.probe)
            camera = b.device.accuracy(world.probe.through_new_camera())
            self.report["accuracy_device_b"] = {"new_classes": new, "new_camera": camera}
            trained = int(b.device.get("/v1/status")["trainings"])
            self.report["device_b_trained"] = trained > 0
            step.note = f"new digits {new:.0%}, new camera {camera:.0%}, trainings {trained}"
            if trained:
                raise DemoError("device B trained although the catalogue had what it needed")

    def _roll_back(self, b: Watched) -> None:
        with self.display.step(STEPS[6]) as step:
            probe = self.worlds[1].probe
            newest = b.generation
            before, earlier = b.probed[newest], b.probed[newest - 1]
            self._type("devices")
            back = self.stage.shell_json("rollback device-b")
            self._show("rollback device-b", back)
            equal_back = b.remember_probe(probe) == earlier and b.generation == newest - 1
            forth = self.stage.shell_json(f"rollback device-b --to {newest}")
            self._show(f"rollback device-b --to {newest}", forth)
            equal_return = b.remember_probe(probe) == before and b.generation == newest
            self._type("unpin device-b")
            self._type("device device-b")
            self._type("log -n 6")
            self.report["rollback"] = {
                "equal_after_rollback": equal_back,
                "equal_after_return": equal_return,
                "command_to_reported_ms": 1000 * float(back["confirmed_s"]),
            }
            step.note = f"generation {newest} → {newest - 1} → {newest}"
            if not (equal_back and equal_return):
                raise DemoError("predictions after the rollback or the return are not the same")

    def _type(self, command: str) -> None:
        self.display.command(command, self.stage.shell(command))

    def _show(self, command: str, result: dict[str, Any]) -> None:
        self.display.command(command, str(result.get("message", result)))

    def _finish(self, a: Watched, b: Watched, traffic: Traffic) -> None:
        """Complete the report; a dropped request or a false alarm fails the demo."""
        latencies = np.asarray(a.latencies_ms + b.latencies_ms)
        p50, p99 = np.percentile(latencies, (50, 99))
        self.report["alarm"] = {
            "false_alarms": a.false_alarms() + b.false_alarms(),
            "delay_samples": {
                "new_classes": a.delay("new digits"),
                "new_camera": a.delay("new camera"),
            },
            "delay_samples_device_b": {
                "new_classes": b.delay("new digits"),
                "new_camera": b.delay("new camera"),
            },
        }
        self.report["requests"] = a.device.requests + b.device.requests
        self.report["failed_requests"] = a.device.failed + b.device.failed
        self.report["passes_per_sample"] = float(np.mean(a.passes + b.passes))
        self.report["latency_ms"] = {"p50": float(p50), "p99": float(p99)}
        self.report["versions"] = versions()
        if self.report["failed_requests"] or traffic.failed:
            raise DemoError(f"{self.report['failed_requests']} requests failed; none should")
        if self.report["alarm"]["false_alarms"]:
            raise DemoError("an alarm was raised without a shift")


def _change(accuracy: dict[str, float], what: str) -> str:
    return f"{accuracy[what + '_unadapted']:.0%} → {accuracy[what + '_adapted']:.0%}"
