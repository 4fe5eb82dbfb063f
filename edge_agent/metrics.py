"""What Prometheus scrapes from an agent, in a registry of its own.

The agent counts here what it does; the HTTP API renders it. Nothing here decides anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from edge_agent.serving import Answer

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_PASSES: Final = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
_P_VALUES: Final = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)


class Metrics:
    """One agent's metrics.

    Attributes:
        requests: Prediction requests answered.
        failures: HTTP requests refused or failed, by status code.
        samples: Samples answered.
        feedback: Labels stored.
        alarms: Shifts detected.
        journal_errors: Requests answered but not journalled.
        generation: The number of the running generation.
        swap_seconds: How long the last switch of generation held requests back.
        outbox_depth: Messages owed to the catalogue.
        latency: Seconds one request took, queueing included, HTTP excluded.
        passes: Encoder passes a sample took; 1 is the bare encoder.
        p_values: Conformal p-values; uniform while the input is as calibrated.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "driftkeel_requests", "Prediction requests answered.", registry=self.registry
        )
        self.failures = Counter(
            "driftkeel_failures",
            "HTTP requests refused or failed.",
            ["status"],
            registry=self.registry,
        )
        self.samples = Counter("driftkeel_samples", "Samples answered.", registry=self.registry)
        self.feedback = Counter("driftkeel_feedback", "Labels stored.", registry=self.registry)
        self.alarms = Counter("driftkeel_alarms", "Shifts detected.", registry=self.registry)
        self.journal_errors = Counter(
            "driftkeel_journal_errors",
            "Requests answered but not journalled.",
            registry=self.registry,
        )
        self.generation = Gauge(
            "driftkeel_generation", "The running generation.", registry=self.registry
        )
        self.swap_seconds = Gauge(
            "driftkeel_swap_seconds",
            "How long the last switch of generation held requests back.",
            registry=self.registry,
        )
        self.outbox_depth = Gauge(
            "driftkeel_outbox_depth", "Messages owed to the catalogue.", registry=self.registry
        )
        self.latency = Histogram(
            "driftkeel_latency_seconds",
            "Seconds a request took, HTTP excluded.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.passes = Histogram(
            "driftkeel_passes",
            "Encoder passes a sample took.",
            buckets=_PASSES,
            registry=self.registry,
        )
        self.p_values = Histogram(
            "driftkeel_p_value",
            "Conformal p-values of samples.",
            buckets=_P_VALUES,
            registry=self.registry,
        )

    def observe(self, answers: Sequence[Answer], seconds: float) -> None:
        """Count one answered request."""
        self.requests.inc()
        self.samples.inc(len(answers))
        self.latency.observe(seconds)
        for answer in answers:
            self.passes.observe(answer.passes)
            self.p_values.observe(answer.p_value)

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)
