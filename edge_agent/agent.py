"""The agent: one device's running whole, and the only object the other parts talk to.

Owns the state directory, the encoder's sessions and the generation that serves. The HTTP API
calls :meth:`Agent.predict` and :meth:`Agent.feedback`; the conductor builds, tries and
activates generations through it and hears of alarms from it. It starts no thread of its own
and never trains.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from adapter_store.errors import GenerationError, StoreError
from adapter_store.generations import Generation
from adapter_store.journal import SampleRecord
from adapter_store.state import StateDir
from adapter_store.wire import new_id
from edge_agent.config import Config
from edge_agent.errors import NoGenerationError
from edge_agent.installer import build_generation, load_generation, load_serving
from edge_agent.metrics import Metrics
from edge_agent.serving import Answer, Inference, Serving
from edge_agent.snapshot import pack_snapshot
from exporter.package import EncoderPackage
from exporter.sessions import EncoderSessions
from ood.alarm import Alarm

AlarmObserver = Callable[[Alarm, int], None]
FeedbackObserver = Callable[[], None]
ActivatedObserver = Callable[[int], None]

_PRUNE_EVERY: Final = 256


class Agent:
    """Serves one generation at a time and keeps what happened.

    Thread-safe: inference runs one request at a time, and a generation is switched between
    two requests. Observers are called on whatever thread made the call; they must only note
    what happened and return.

    Args:
        config: The whole configuration.
        state: This device's opened (locked) state directory; the agent closes it.
        package: The frozen encoder.
        conductor_status: Set by the conductor; merged into :meth:`status`.

    Attributes:
        serving: What answers right now; None before the first generation. Replaced whole.
        package: The frozen encoder's package.
        sessions: Its ONNX Runtime sessions, shared by every generation.
        state: The state directory.
        metrics: What Prometheus scrapes.
        swap_ms: How long the last switch held requests back; None before the first.
    """
