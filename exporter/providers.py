"""What runs a graph: ONNX Runtime's execution providers by short names, and how each is set up.

A list of names is a wish; what this machine has is asked of ONNX Runtime, and the CPU is always
last. `exporter.sessions` makes sessions by it, the agent's configuration and `driftkeel tune` name
providers by it. Nothing here makes a session.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import onnxruntime

ProviderName = Literal["tensorrt", "cuda", "openvino", "qnn", "xnnpack", "cpu"]
GraphOptimisation = Literal["basic", "extended", "all"]

CPU: Final = "cpu"


@dataclass(frozen=True)
class RuntimeSettings:
    """How sessions are made.

    Attributes:
        providers: Short names, the preferred one first; the CPU stands behind them all.
        threads: Threads for one run.
        graph_optimisation: How far ONNX Runtime rewrites a graph before it runs it.
    """

    providers: tuple[ProviderName, ...] = ("cpu",)
    threads: int = 1
    graph_optimisation: GraphOptimisation = "all"


@dataclass(frozen=True)
class Provider:
    """One execution provider.

    Attributes:
        execution_provider: What ONNX Runtime calls it.
        options: Its options for a number of threads.
        compiles: It makes one program of a graph. An input's default is a constant to it then, so
            that it ignores what is fed there: it is given graphs without defaults.
        threaded: Whether the number of threads is a matter of the CPU's cores.
    """

    execution_provider: str
    options: Callable[[int], Mapping[str, str]]
    compiles: bool = False
    threaded: bool = False


def _openvino(threads: int) -> Mapping[str, str]:
    # Where the processor has bfloat16, OpenVINO may compute in it: 0.4 % of another answer.
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": str(threads),
        "NUM_STREAMS": "1",
    }
    return {"device_type": "CPU", "load_config": json.dumps({"CPU": settings})}


# In the order that the fastest of a machine's is expected first.
PROVIDERS: Final[Mapping[ProviderName, Provider]] = {
    "tensorrt": Provider(
        "TensorrtExecutionProvider", lambda _: {"trt_fp16_enable": "0"}, compiles=True
    ),
    # Without TF32, whose ten bits change answers; memory as it is asked for, not doubled.
    "cuda": Provider(
        "CUDAExecutionProvider",
        lambda _: {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"},
    ),
    "openvino": Provider("OpenVINOExecutionProvider", _openvino, compiles=True, threaded=True),
    "qnn": Provider(
        "QNNExecutionProvider", lambda _: {"backend_path": "libQnnHtp.so"}, compiles=True
    ),
    "xnnpack": Provider(
        "XnnpackExecutionProvider",
        lambda threads: {"intra_op_num_threads": str(threads)},
        threaded=True,
    ),
    "cpu": Provider("CPUExecutionProvider", lambda _: {}, threaded=True),
}

_LEVELS: Final[Mapping[GraphOptimisation, str]] = {
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}


def available() -> tuple[ProviderName, ...]:
    """The providers that the installed ONNX Runtime has, in the order of `PROVIDERS`."""
    found = set(onnxruntime.get_available_providers())
    return tuple(name for name, one in PROVIDERS.items() if one.execution_provider in found)


def chosen(
    wanted: Sequence[ProviderName], available: Collection[ProviderName]
) -> tuple[ProviderName, ...]:
    """The providers to try, in turn: the wanted ones that are there, and the CPU behind them.

    Args:
        wanted: The preferred one first.
        available: What the machine has.

    Example:
        >>> chosen(["tensorrt", "openvino", "cpu"], {"openvino", "cpu"})
        ('openvino', 'cpu')
        >>> chosen(["cuda"], {"cpu"})
        ('cpu',)
        >>> chosen(["cpu", "openvino"], {"openvino", "cpu"})
        ('cpu',)
    """
    before = [*wanted, "cpu"]
    # The CPU runs every graph: what stands behind it is never reached.
    before = before[: before.index("cpu")]
    return (*(name for name in dict.fromkeys(before) if name in available), "cpu")


def level(graph_optimisation: GraphOptimisation) -> onnxruntime.GraphOptimizationLevel:
    """ONNX Runtime's name of a degree of graph optimisation."""
    return getattr(onnxruntime.GraphOptimizationLevel, _LEVELS[graph_optimisation])


def running(session: onnxruntime.InferenceSession) -> str:
    """The provider that a session prefers now, by its short name, or ONNX Runtime's without one."""
    first: str = session.get_providers()[0]
    return next((n for n, one in PROVIDERS.items() if one.execution_provider == first), first)


def nodes_taken(session: onnxruntime.InferenceSession, name: ProviderName) -> int | None:
    """How many of a graph's nodes a provider runs; None where ONNX Runtime cannot say.

    Args:
        session: Made with `session.record_ep_graph_assignment_info`.
        name: The provider.
    """
    # ONNX Runtime before 1.24 does not record it.
    ask = getattr(session, "get_provider_graph_assignment_info", None)
    if ask is None:
        return None
    wanted = PROVIDERS[name].execution_provider
    return sum(len(part.get_nodes()) for part in ask() if part.ep_name == wanted)
