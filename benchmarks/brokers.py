"""Which brokers can carry Driftkeel's protocol: speed, and the two faults that decide.

Against each broker, through the `Link` both sides use: 500 searches answered by a catalogue and
repeated after a second without an answer; the same for five more after a stranger tried a wrong
password with the device's client id; and how long after a device process is stopped its last will
comes. Any other broker with the same accounts and access rules is measured with ``--external``.

    python -m benchmarks.brokers [--external NAME:PORT] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import signal
import tempfile
import threading
import time
from importlib.metadata import version
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import paho.mqtt.client as paho

from adapter_store import wire
from adapter_store.mqtt import Link
from cloud.broker import HOST, find_mosquitto, start_broker

USERS = {"catalogue": "c", "device-a": "a", "device-b": "b"}
SEARCHES = 500
GIVE_UP_S = 20.0
KEEPALIVE_S = 2
SILENCE_S = 12.0


class Device:
    """A device that asks and waits for its answer."""

    def __init__(self, name: str, port: int, *, keepalive_s: int = 30) -> None:
        self.name = name
        self._answers: set[str] = set()
        self._changed = threading.Condition()
        self.link = Link(
            host=HOST,
            port=port,
            client_id=f"driftkeel-{name}",
            username=name,
            password=USERS[name],
            keepalive_s=keepalive_s,
            will=(wire.presence_topic(name), b"offline"),
            subscriptions=[wire.down_topic(name)],
            on_message=self._received,
        )
        self.link.start()
        if not self.link.wait_connected(20):
            raise SystemExit(f"{name} cannot connect to port {port}")

    def ask(self, n: int) -> dict[str, Any]:
        """Make n searches one after another; gives up after 20 seconds without an answer."""
        waited_ms, repeated = [], 0
        for _ in range(n):
            search = wire.Search(encoder="0" * 64, signature=b"s" * 4000)
            begun = time.monotonic()
            while not self._answered(search):
                repeated += 1
                if time.monotonic() - begun > GIVE_UP_S:
                    return {"answered": len(waited_ms), "of": n, "repeated": repeated}
            waited_ms.append(1000 * (time.monotonic() - begun))
        p50, p99 = (round(float(q), 2) for q in np.percentile(waited_ms, (50, 99)))
        times = {"p50_ms": p50, "p99_ms": p99}
        return {"answered": n, "of": n, "repeated": repeated, **times}

    def _answered(self, search: wire.Search) -> bool:
        self.link.publish(wire.up_topic(self.name), wire.encode(search))
        with self._changed:
            return self._changed.wait_for(lambda: search.id in self._answers, 1.0)

    def _received(self, _: str, payload: bytes) -> None:
        message = wire.decode_down(payload)
        if isinstance(message, wire.SearchResult):
            with self._changed:
                self._answers.add(message.of)
                self._changed.notify()


class Catalogue:
    """Answers searches and hears presence."""

    def __init__(self, port: int) -> None:
        self.gone = threading.Event()
        self.link = Link(
            host=HOST,
            port=port,
            client_id="driftkeel-catalogue",
            username="catalogue",
            password=USERS["catalogue"],
            subscriptions=[wire.ALL_UP, wire.ALL_PRESENCE],
            on_message=self._received,
        )
        self.link.start()
        if not self.link.wait_connected(20):
            raise SystemExit(f"the catalogue cannot connect to port {port}")

    def _received(self, topic: str, payload: bytes) -> None:
        if topic == wire.presence_topic("device-b"):
            if payload == b"offline":
                self.gone.set()
        elif isinstance(message := wire.decode_up(payload), wire.Search):
            answer = wire.SearchResult(of=message.id, candidates=[])
            self.link.publish(wire.down_topic(wire.device_of(topic)), wire.encode(answer))


def measure(port: int) -> dict[str, Any]:
    """Measure the broker that listens on a port of the loopback address."""
    catalogue, device = Catalogue(port), Device("device-a", port)
    searches = device.ask(SEARCHES)
    _try_wrong_password(port)
    result = {
        "searches": searches,
        "after_a_wrong_password_with_its_id": device.ask(5),
        "last_will_of_a_silent_peer_s": _silence(port, catalogue),
    }
    device.link.stop()
    catalogue.link.stop()
    return result


def _try_wrong_password(port: int) -> None:
    refused = threading.Event()
    stranger = paho.Client(
        paho.CallbackAPIVersion.VERSION2, client_id="driftkeel-device-a", protocol=paho.MQTTv311
    )
    stranger.username_pw_set("device-a", "wrong")
    stranger.on_connect = lambda *_: refused.set()
    stranger.connect(HOST, port)
    stranger.loop_start()
    refused.wait(5)
    stranger.disconnect()
    stranger.loop_stop()


def _silence(port: int, catalogue: Catalogue) -> float | None:
    """Seconds until the will of a process that was stopped comes; None when it does not."""
    context = multiprocessing.get_context("spawn")
    up = context.Event()
    child = context.Process(target=_live, args=(port, up))
    child.start()
    if child.pid is None or not up.wait(20):
        raise SystemExit("device-b cannot connect")
    begun = time.monotonic()
    os.kill(child.pid, signal.SIGSTOP)
    heard = catalogue.gone.wait(SILENCE_S)
    seconds = time.monotonic() - begun
    child.kill()
    child.join()
    return round(seconds, 2) if heard else None


def _live(port: int, up: Event) -> None:
    device = Device("device-b", port, keepalive_s=KEEPALIVE_S)
    device.ask(5)
    up.set()
    device.ask(1_000_000)


def main(argv: list[str] | None = None) -> int:
    """Measure every broker that is here and write the report."""
    parser = argparse.ArgumentParser(description="Can these brokers carry the protocol?")
    parser.add_argument("--external", action="append", default=[], metavar="NAME:PORT")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "brokers.json"
    )
    options = parser.parse_args(argv)
    results = {}
    for kind in ("mosquitto", "embedded"):
        if kind == "mosquitto" and find_mosquitto() is None:
            print("left out: mosquitto (not installed)")
            continue
        with tempfile.TemporaryDirectory() as directory:
            begun = time.monotonic()
            broker = start_broker(Path(directory), USERS, kind=kind)
            started_s = round(time.monotonic() - begun, 2)
            results[kind] = {"started_s": started_s, **measure(broker.port)}
            broker.stop()
    for name, _, port in (entry.partition(":") for entry in options.external):
        results[name] = measure(int(port))
    report = {
        "benchmark": "brokers",
        "brokers": results,
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "paho-mqtt": version("paho-mqtt")},
        "seed": None,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
