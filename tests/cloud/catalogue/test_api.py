"""The operators' HTTP API: who may use it, what it answers, and how it refuses."""

import threading
from collections.abc import Iterator, Mapping

import pytest
from starlette.testclient import TestClient

from adapter_store.bundle import bundle_digest
from adapter_store.errors import DiskFullError
from cloud.api import make_api

TOKEN = "the operator's token"
HEADERS = {"authorization": f"Bearer {TOKEN}", "x-operator": "J%C3%B6rg"}


class Connection:
    """The devices' side, as far as monitoring asks for it."""

    connected = True

    def statistics(self) -> Mapping[str, int]:
        return {"messages_report": 3}


@pytest.fixture
def http(desk) -> Iterator[TestClient]:
    api = make_api(desk.operators, desk.store, Connection(), TOKEN)
    with TestClient(api, headers=HEADERS, raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("presented", ["", "Bearer", "Bearer ", "Bearer wrong", TOKEN, "Basic x"])
@pytest.mark.parametrize(
    "request_line",
    [
        ("GET", "/v1/devices"),
        ("GET", "/v1/events"),
        ("GET", "/v1/devices/device-a/explanations/1"),
        ("POST", "/v1/devices/device-a/rollback"),
    ],
)
def test_without_the_token_nothing_is_told_or_done(
    desk, http, make_report, presented, request_line
) -> None:
    desk.say("device-a", make_report())
    answer = http.request(*request_line, headers={"authorization": presented})
    assert answer.status_code == 401
    assert answer.json() == {"error": "the operator token is missing or wrong"}
    assert desk.pushed == []


def test_health_and_metrics_need_no_token(desk, http, make_report) -> None:
    desk.say("device-a", make_report())
    assert http.get("/healthz", headers={"authorization": ""}).json() == {
        "ok": True,
        "broker_connected": True,
    }
    text = http.get("/metrics", headers={"authorization": ""}).text
    assert "driftkeel_catalogue_devices_online 1\n" in text
    assert 'driftkeel_catalogue_events_total{kind="messages_report"} 3\n' in text


def test_devices_and_adapters_are_shown(desk, http, make_report, make_bundle) -> None:
    desk.register()
    desk.say("device-a", make_report())
    desk.upload(make_bundle(1))
    digest = bundle_digest(make_bundle(1))
    assert http.get("/v1/devices").json() == [http.get("/v1/devices/device-a").json()]
    assert http.get("/v1/adapters").json() == [http.get(f"/v1/adapters/{digest[:9]}").json()]
    assert http.get("/v1/adapters", params={"status": "approved"}).json() == []


def test_an_action_is_done_in_the_operators_name(desk, http, make_report, make_bundle) -> None:
    desk.register()
    desk.say("device-a", make_report())
    desk.upload(make_bundle(1))
    digest = bundle_digest(make_bundle(1))
    approved = http.post(f"/v1/adapters/{digest[:9]}/approve", json={"reason": "looks good"})
    assert approved.json()["status"] == "approved"
    rolled = http.post("/v1/devices/device-a/rollback", json={"to": 1, "wait_s": 0})
    assert rolled.json()["desired"] == {"version": 1, "generation": 1, "pinned": True}
    assert http.post("/v1/devices/device-a/unpin", json={"wait_s": 0}).status_code == 200
    entries = http.get("/v1/log", params={"limit": 3}).json()
    assert [(e["who"], e["action"]) for e in entries] == [
        ("Jörg", "approve"),
        ("Jörg", "rollback"),
        ("Jörg", "unpin"),
    ]
    assert http.get("/v1/log", params={"after": entries[-1]["number"]}).json() == []


@pytest.mark.parametrize(
    "case",
    [
        ("/v1/devices/device-z/pin", b"{}", 404, "no device 'device-z'"),
        ("/v1/adapters/00/approve", b"", 404, "no adapter"),
        ("/v1/devices/device-a/rollback", b'{"to": 9, "wait_s": 0}', 409, "no generation 9"),
        ("/v1/devices/device-a/rollback", b'{"to": "1"}', 400, "'to' must be"),
        ("/v1/devices/device-a/rollback", b'{"to": -1}', 400, "'to' must be"),
        ("/v1/devices/device-a/rollback", b'{"to": true}', 400, "'to' must be"),
        ("/v1/devices/device-a/rollback", b'{"wait_s": NaN}', 400, "'wait_s' must be seconds"),
        ("/v1/devices/device-a/rollback", b'{"wait_s": []}', 400, "'wait_s' must be seconds"),
        ("/v1/devices/device-a/rollback", b'{"generation": 1}', 400, "unknown key 'generation'"),
        ("/v1/devices/device-a/rollback", b"[]", 400, "must be a JSON object"),
        ("/v1/devices/device-a/rollback", b"{", 400, "not JSON"),
        ("/v1/devices/device-a/rollback", b"\xff\xfe", 400, "not JSON"),
        ("/v1/devices/device-a/rollback", b'{"to": 1, "x": "' + b"y" * 20_000, 400, "over 16384"),
        ("/v1/adapters/00/approve", b'{"reason": 3}', 400, "'reason' must be text"),
        ("/v1/devices/device-a/explode", b"", 404, "there is nothing at"),
    ],
)
def test_a_wrong_request_is_refused_by_name(desk, http, make_report, case) -> None:
    path, body, code, says = case
    desk.say("device-a", make_report())
    answer = http.post(path, content=body)
    assert answer.status_code == code
    assert says in answer.json()["error"]
    assert desk.pushed == []


@pytest.mark.parametrize(
    "case",
    [
        ("device-a/explanations/1", 404, "no explanation of episode 1 of device-a"),
        ("device-z/explanations/1", 404, "no device 'device-z'"),
        ("device-a/explanations/x", 400, "'episode' must be a number"),
        ("device-a/explanations/-1", 400, "'episode' must be a number"),
        ("device-a/explanations/" + "9" * 30, 404, "no explanation"),
    ],
)
def test_an_explanation_that_is_not_there_is_refused_by_name(desk, http, make_report, case) -> None:
    path, code, says = case
    desk.say("device-a", make_report())
    answer = http.get(f"/v1/devices/{path}")
    assert answer.status_code == code
    assert says in answer.json()["error"]


@pytest.mark.parametrize(
    "query", [{"limit": "x"}, {"after": "-1"}, {"after": "²"}, {"limit": "1.5"}]
)
def test_a_wrong_query_is_refused_by_name(http, query) -> None:
    answer = http.get("/v1/log", params=query)
    assert answer.status_code == 400
    assert next(iter(query)) in answer.json()["error"]


def test_a_full_disk_is_told_as_that(desk, http, make_report, monkeypatch) -> None:
    desk.say("device-a", make_report())

    def full(*_: object) -> None:
        raise DiskFullError("the disk is full")

    monkeypatch.setattr(desk.store, "writing", full)
    answer = http.post("/v1/devices/device-a/pin", json={"wait_s": 0})
    assert (answer.status_code, answer.json()) == (503, {"error": "the disk is full"})


def test_events_come_when_something_changes(desk, http, make_report) -> None:
    desk.say("device-a", make_report())
    first = http.get("/v1/events", params={"wait_s": 0}).json()
    assert [device["name"] for device in first["devices"]] == ["device-a"]
    last = first["log"][-1]["number"]
    began = threading.Event()

    def change() -> None:
        assert began.wait(20)
        desk.register("device-b")

    thread = threading.Thread(target=change)
    thread.start()
    began.set()
    query = {"revision": first["revision"], "after": last, "wait_s": 30}
    second = http.get("/v1/events", params=query).json()
    thread.join()
    assert second["revision"] != first["revision"]
    assert [entry["who"] for entry in second["log"]] == ["device-b"]


def test_events_end_when_the_process_ends(desk, http) -> None:
    first = http.get("/v1/events", params={"wait_s": 0}).json()
    desk.store.release()
    query = {"revision": first["revision"], "wait_s": 60}
    assert http.get("/v1/events", params=query).json()["revision"] == first["revision"]
