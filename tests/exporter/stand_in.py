"""A provider that compiles, for machines without one: the CPU under OpenVINO's name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

OPENVINO = "OpenVINOExecutionProvider"


class StandIn(onnxruntime.InferenceSession):
    """A session of the CPU's that says it is OpenVINO's when it was asked to be."""

    def __init__(self, graph: bytes, options: Any, providers: list[Any], **more: Any) -> None:
        self.asked = [entry if isinstance(entry, str) else entry[0] for entry in providers]
        super().__init__(graph, options, providers=["CPUExecutionProvider"], **more)

    def get_providers(self) -> list[str]:
        return self.asked

    def get_provider_graph_assignment_info(self) -> list[Any]:
        return [SimpleNamespace(ep_name=self.asked[0], get_nodes=lambda: ["a node"])]


def stand_in(patch: pytest.MonkeyPatch, session: type[StandIn] = StandIn) -> None:
    """Gives this machine OpenVINO, which is the CPU in truth."""
    patch.setattr(
        onnxruntime, "get_available_providers", lambda: [OPENVINO, "CPUExecutionProvider"]
    )
    patch.setattr(onnxruntime, "InferenceSession", session)
