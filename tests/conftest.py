"""Real brokers for the tests of everything that speaks MQTT."""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from cloud.broker import Broker, Kind, find_mosquitto, start_broker


@pytest.fixture(scope="session")
def broker_users() -> dict[str, str]:
    """Passwords by user: the catalogue and two devices."""
    return {
        "catalogue": "catalogue's word",
        "device-a": "device-a's word",
        "device-b": "device-b's word",
    }


@pytest.fixture(scope="session")
def broker_kinds() -> tuple[Kind, ...]:
    """The kinds of broker this machine can start."""
    return ("mosquitto", "embedded") if find_mosquitto() else ("embedded",)


@pytest.fixture(params=get_args(Kind))
def broker_kind(request: pytest.FixtureRequest, broker_kinds: tuple[Kind, ...]) -> Kind:
    """Each kind of broker in turn."""
    kind: Kind = request.param
    if kind not in broker_kinds:
        pytest.skip(f"{kind} is not installed (apt-get install {kind})")
    return kind


@pytest.fixture
def broker(broker_kind: Kind, broker_users: dict[str, str], tmp_path: Path) -> Iterator[Broker]:
    """A running broker of each kind, fresh for every test, with the accounts `broker_users`."""
    with start_broker(tmp_path / "broker", broker_users, kind=broker_kind) as running:
        yield running
