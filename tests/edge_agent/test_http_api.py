"""The HTTP API: what it answers, and that bad input gets a reason and harms nothing."""

import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from adapter_store.errors import DiskFullError
from edge_agent.http_api import create_app
from edge_agent.serving import Answer


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def client(agent):
    with TestClient(create_app(agent, episodes=lambda: [{"number": 1}])) as client:
        yield client


def predict(client, body: bytes, kind: str, **options):
    return client.post("/v1/predict", content=body, headers={"content-type": kind}, **options)


def test_an_image_file_an_array_and_a_list_of_numbers_get_the_same_answer(
    client, install, make_images
) -> None:
    install()
    image = make_images((1,), 1, seed=40)[0][0]
    nested = json.dumps({"samples": [image.tolist()]}).encode()
    responses = [
        predict(client, png(image), "image/png"),
        predict(client, npy(image), "application/x-npy"),
        predict(client, npy(image[None]), "application/octet-stream"),
        predict(client, nested, "application/json; charset=utf-8"),
    ]
    assert [r.status_code for r in responses] == [200] * 4
    samples = [r.json()["samples"] for r in responses]
    assert {(len(s), s[0]["label"]) for s in samples} == {(1, "stripes-1")}
    assert len({s[0]["probability"] for s in samples}) == 1
    assert set(samples[0][0]) == {
        "sample_id",
        "label",
        "probability",
        "adapter",
        "ood_score",
        "p_value",
        "generation",
        "passes",
    }


def test_a_batch_is_answered_in_order(client, install, make_images) -> None:
    install()
    images, labels = make_images((0, 1, 2), 4, seed=41)
    samples = predict(client, npy(images), "application/x-npy").json()["samples"]
    assert [s["label"] for s in samples] == list(labels)


def test_grey_samples_may_come_as_a_list(client, install) -> None:
    install()
    samples = [[[0, 128], [255, 3]], [[1, 2], [3, 4]]]
    response = client.post("/v1/predict", json={"samples": samples})
    assert len(response.json()["samples"]) == 2


def test_a_probe_is_not_journalled(client, agent, install, make_images) -> None:
    install()
    body = npy(make_images((0,), 2)[0])
    assert predict(client, body, "application/x-npy", params={"probe": "1"}).status_code == 200
    assert agent.state.journal.recent(10) == []


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"", "image/png", 400),
        (b"not an image", "image/png", 422),
        (b"\x89PNG\r\n\x1a\n cut", "image/png", 422),
        (npy(np.zeros((0, 8, 8, 3), np.uint8)), "application/x-npy", 422),
        (npy(np.full((8, 8), np.nan)), "application/x-npy", 422),
        (npy(np.full((8, 8), np.inf)), "application/x-npy", 422),
        (npy(np.zeros(5, np.uint8)), "application/x-npy", 422),
        (npy(np.zeros((2, 8, 8, 9), np.uint8)), "application/x-npy", 422),
        (npy(np.array([{"a": 1}], dtype=object)), "application/x-npy", 422),
        (npy(np.zeros((8, 8), np.uint8))[:-10], "application/x-npy", 422),
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b'{"sample": []}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"samples": []}', "application/json", 422),
        (b'{"samples": [[[1, 2], [3]]]}', "application/json", 422),
        (b'{"samples": [[["a"]]]}', "application/json", 422),
        (b'{"samples": [[[300]]]}', "application/json", 422),
        (b'{"samples": {"a": 1}}', "application/json", 422),
        (b"hello", "text/plain", 415),
    ],
)
def test_a_bad_sample_gets_a_reason_and_the_generation_serves_on(  # noqa: PLR0917
    client, agent, install, make_images, body: bytes, kind: str, status: int
) -> None:
    number = install()
    response = predict(client, body, kind)
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error", "hint"}
    assert response.json()["error"]
    assert agent.state.journal.recent(10) == []
    good = predict(client, npy(make_images((0,), 1)[0]), "application/x-npy")
    assert good.json()["samples"][0]["generation"] == number


def test_a_body_over_the_limit_is_refused_declared_or_not(client, agent, install) -> None:
    install()
    limit = agent.config.http.max_body_bytes
    declared = client.post(
        "/v1/predict",
        content=b"x",
        headers={"content-type": "image/png", "content-length": str(limit + 1)},
    )
    chunks = (b"\x00" * (limit // 4 + 1) for _ in range(4))
    streamed = client.post("/v1/predict", content=chunks, headers={"content-type": "image/png"})
    assert (declared.status_code, streamed.status_code) == (413, 413)
    assert "max_body_bytes" in streamed.json()["hint"]


def test_too_many_predictions_at_a_time_are_refused_and_others_get_through(
    agent, install, make_images, monkeypatch
) -> None:
    install()
    entered, leave = threading.Semaphore(0), threading.Event()
    answer = agent.predict

    def slow(images: np.ndarray, *, probe: bool = False) -> list[Answer]:
        entered.release()
        assert leave.wait(60)
        return answer(images, probe=probe)

    monkeypatch.setattr(agent, "predict", slow)
    body = npy(make_images((0,), 1)[0])
    full = agent.config.http.max_requests
    with TestClient(create_app(agent)) as client, ThreadPoolExecutor(full) as pool:
        waiting = [pool.submit(predict, client, body, "application/x-npy") for _ in range(full)]
        for _ in range(full):
            assert entered.acquire(timeout=60)
        refused = predict(client, body, "application/x-npy")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "http.max_requests" in refused.json()["hint"]
        assert client.get("/healthz").status_code == 200
        leave.set()
        assert {request.result(60).status_code for request in waiting} == {200}
        assert predict(client, body, "application/x-npy").status_code == 200


def test_labels_come_one_at_a_time_or_many_at_once(client, agent, install, make_images) -> None:
    install()
    samples = predict(client, npy(make_images((0, 1), 2)[0]), "application/x-npy").json()["samples"]
    ids = [sample["sample_id"] for sample in samples]
    one = client.post("/v1/feedback", json={"sample_id": ids[0], "label": "new"})
    assert one.json() == {"accepted": 1, "unknown": []}
    many = client.post(
        "/v1/feedback",
        json={
            "feedback": [{"sample_id": i, "label": "new"} for i in (*ids[1:], "0" * 32)],
        },
    )
    assert many.json() == {"accepted": 3, "unknown": ["0" * 32]}
    assert len(agent.state.journal.labelled()) == 4


def test_feedback_for_an_unknown_sample_is_not_found(client, install) -> None:
    install()
    response = client.post("/v1/feedback", json={"sample_id": "0" * 32, "label": "x"})
    assert response.status_code == 404
    assert "0000" in response.json()["error"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"sample_id": 5, "label": "x"}',
        b'{"sample_id": "a"}',
        b'{"feedback": 1}',
    ],
)
def test_malformed_feedback_is_refused(client, install, body: bytes) -> None:
    install()
    response = client.post("/v1/feedback", content=body)
    assert response.status_code == 400
    assert "sample_id" in response.json()["hint"]


def test_without_a_generation_it_is_unavailable_and_says_what_to_do(client, make_images) -> None:
    response = predict(client, npy(make_images((0,), 1)[0]), "application/x-npy")
    assert response.status_code == 503
    assert "agent fit" in response.json()["hint"]
    assert client.get("/healthz").status_code == 503
    assert client.get("/v1/status").json()["generation"] is None


def test_a_full_disk_refuses_feedback_by_name(client, agent, install, monkeypatch) -> None:
    install()

    def full(*_: object) -> None:
        raise DiskFullError("no space left on device")

    monkeypatch.setattr(agent.state.journal, "feedback", full)
    response = client.post("/v1/feedback", json={"sample_id": "0" * 32, "label": "x"})
    assert response.status_code == 507
    assert "no space" in response.json()["error"]


def test_status_generations_episodes_and_health_are_readable(client, install) -> None:
    number = install()
    assert client.get("/v1/status").json()["generation"]["number"] == number
    (generation,) = client.get("/v1/generations").json()["generations"]
    assert (generation["number"], generation["running"]) == (number, True)
    assert client.get("/v1/episodes").json() == {"episodes": [{"number": 1}]}
    assert client.get("/healthz").json() == {"ok": True, "generation": number}


def test_a_training_is_cancelled_and_without_one_it_says_so(client, agent) -> None:
    assert client.post("/v1/training/cancel").status_code == 409
    running = [True]
    agent.conductor_cancel = lambda: bool(running) and running.pop()
    assert client.post("/v1/training/cancel").json() == {"cancelled": True}
    refused = client.post("/v1/training/cancel")
    assert (refused.status_code, refused.json()["error"]) == (409, "no training is running")


def test_metrics_speak_prometheus(client, install, make_images) -> None:
    number = install()
    predict(client, npy(make_images((0,), 3)[0]), "application/x-npy")
    predict(client, b"junk", "image/png")
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = response.text.splitlines()
    assert "driftkeel_samples_total 3.0" in lines
    assert "driftkeel_requests_total 1.0" in lines
    assert 'driftkeel_failures_total{status="422"} 1.0' in lines
    assert f"driftkeel_generation {float(number)}" in lines
    assert "driftkeel_passes_count 3.0" in lines
    assert "driftkeel_outbox_depth 0.0" in lines


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/v1/predict", 405), ("DELETE", "/v1/status", 405)],
)
def test_a_wrong_path_or_method_is_answered_in_json(client, method, path, status) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    assert path in response.json()["error"]
