"""The operators' API of a running catalogue: every request is guarded, and none does harm."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest
from starlette.routing import Route
from starlette.testclient import TestClient

from cloud.api import make_api
from cloud.config import Config
from cloud.operators import Operators
from cloud.service import open_store
from cloud.store import Store
from tests.cloud.conftest import Fleet

OPERATORS_OWN = (
    ("GET", "/v1/devices"),
    ("GET", "/v1/devices/device-a"),
    ("GET", "/v1/devices/device-a/explanations/1"),
    ("POST", "/v1/devices/device-a/rollback"),
    ("POST", "/v1/devices/device-a/pin"),
    ("POST", "/v1/devices/device-a/unpin"),
    ("GET", "/v1/adapters"),
    ("GET", "/v1/adapters/0"),
    ("POST", "/v1/adapters/0/approve"),
    ("POST", "/v1/adapters/0/quarantine"),
    ("POST", "/v1/adapters/0/retire"),
    ("GET", "/v1/log"),
    ("GET", "/v1/events"),
)


@pytest.fixture
def http(fleet: Fleet) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {fleet.catalogue.token}", "x-operator": "J%C3%B6rg"}
    with httpx.Client(base_url=fleet.catalogue.url, headers=headers, timeout=90) as client:
        yield client


class Offline:
    """The devices' side of a catalogue whose broker is away."""

    connected = False

    def statistics(self) -> Mapping[str, int]:
        return {}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    path = tmp_path / "catalogue.toml"
    path.write_text('[catalogue]\nstate_dir = "state"\n[mqtt]\nhost = "localhost"\n')
    opened = open_store(Config.load(path))
    yield opened
    opened.close()


@pytest.fixture
def lone(store: Store) -> TestClient:
    """The API of a catalogue that nobody ever spoke with, in this process."""
    operators = Operators(store, lambda *_: False)
    app = make_api(operators, store, Offline(), "the token")
    headers = {"authorization": "Bearer the token"}
    return TestClient(app, headers=headers, raise_server_exceptions=False)


@pytest.mark.parametrize("token", ["", "Bearer ", "Bearer wrong", "Basic {}", "Bearer {}x", "{}"])
@pytest.mark.parametrize(("method", "path"), OPERATORS_OWN)
def test_without_the_token_nothing_is_told_or_done(
    lone: TestClient, method: str, path: str, token: str
) -> None:
    answer = lone.request(method, path, headers={"authorization": token.format("the token")})
    assert answer.status_code == 401
    assert answer.json() == {"error": "the operator token is missing or wrong"}


def test_the_list_of_guarded_requests_is_complete(store: Store) -> None:
    app = make_api(Operators(store, lambda *_: False), store, Offline(), "t")
    routes = {
        (method, route.path.format(name="device-a", id="0", episode="1"))
        for route in app.routes
        if isinstance(route, Route)
        for method in route.methods or ()
        if method != "HEAD"
    }
    assert routes - {("GET", "/healthz"), ("GET", "/metrics")} == set(OPERATORS_OWN)


def test_an_adapter_names_the_devices_that_run_it(http: httpx.Client, fleet: Fleet) -> None:
    assert http.post("/v1/devices/device-a/rollback", json={"to": 2}).json()["confirmed"]
    adapter = http.get(f"/v1/adapters/{fleet.approved[:20]}").json()
    assert adapter["digest"] == fleet.approved
    assert adapter["run_by"] == ["device-a"]
    listed = http.get("/v1/adapters", params={"status": "approved"}).json()
    assert [row["digest"] for row in listed] == [fleet.approved]


def test_steering_says_what_was_and_what_is(http: httpx.Client) -> None:
    assert http.post("/v1/devices/device-a/rollback", json={"to": 2}).status_code == 200
    answer = http.post("/v1/devices/device-a/rollback", json={"wait_s": 60}).json()
    assert (answer["was"], answer["generation"], answer["confirmed"]) == (2, 1, True)
    assert re.fullmatch(
        r"device-a runs generation 1 \(was 2\), pinned, confirmed in \d+\.\d\d s",
        answer["message"],
    )


def test_an_ambiguous_id_is_refused_and_the_choices_named(http: httpx.Client, fleet: Fleet) -> None:
    answer = http.post(f"/v1/adapters/{fleet.alike[0][0]}/retire")
    assert answer.status_code == 404
    for digest in fleet.alike:
        assert digest[:12] in answer.json()["error"]
        assert http.get(f"/v1/adapters/{digest}").json()["status"] != "retired"


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b"7",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"to": 1' + b" " * 20_000 + b"}",
        b'{"to": "1"}',
        b'{"to": -1}',
        b'{"to": true}',
        b'{"to": 1.5}',
        b'{"to": 1e400}',
        b'{"to": 99999999999999999999}',
        b'{"to": ' + b"9" * 5000 + b"}",
        b'{"wait_s": NaN}',
        b'{"wait_s": -1}',
        b'{"wait_s": "soon"}',
        b'{"wait_s": null}',
        b'{"wait_s": true}',
        b'{"wait_s": {}}',
        b'{"tp": 1}',
    ],
)
def test_a_body_that_makes_no_sense_is_400_and_changes_nothing(
    http: httpx.Client, body: bytes
) -> None:
    before = http.get("/v1/devices/device-a").json()["desired"]
    answer = http.post("/v1/devices/device-a/rollback", content=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]
    assert http.get("/v1/devices/device-a").json()["desired"] == before


@pytest.mark.parametrize("query", ["limit=x", "limit=-1", "limit=", "after=1.5", "limit=%C2%B2"])
def test_a_number_that_is_none_is_400(lone: TestClient, query: str) -> None:
    assert lone.get(f"/v1/log?{query}").status_code == 400


@pytest.mark.parametrize("wait", ["nan", "-1", "soon", "", "-inf"])
def test_a_wait_that_is_no_time_is_400(lone: TestClient, wait: str) -> None:
    assert lone.get("/v1/events", params={"wait_s": wait}).status_code == 400


def test_numbers_beyond_every_limit_are_cut_to_it(lone: TestClient) -> None:
    assert lone.get(f"/v1/log?limit={'9' * 400}&after={'9' * 400}").status_code == 200


def test_a_method_that_does_not_fit_is_405(lone: TestClient) -> None:
    answer = lone.post("/v1/devices")
    assert answer.status_code == 405
    assert answer.json()["error"]


def test_a_database_that_fails_is_503_and_says_so(
    lone: TestClient, store: Store, tmp_path: Path
) -> None:
    store.close()
    for file in (tmp_path / "state").glob("catalogue.db*"):
        file.write_bytes(b"no database at all" * 1000)
    for answer in (lone.get("/v1/devices"), lone.post("/v1/devices/device-a/pin")):
        assert answer.status_code == 503
        assert "catalogue.db" in answer.json()["error"]
