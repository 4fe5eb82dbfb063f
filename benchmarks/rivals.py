"""The detectors of pytorch-ood, each as a name and a way to fit and score features.

pytorch-ood is wanted by this benchmark only and is not installed with the project; see README.md.
Every one of its methods that works on features or logits is here, with the library's own settings.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Scorer = Callable[[Floats], Floats]


@dataclass(frozen=True, eq=False)
class LinearHead:
    """Logits = features @ weights.T + biases; float64 [classes, d] and [classes]."""

    weights: Floats
    biases: Floats

    def __call__(self, features: Floats) -> Floats:
        """Return logits, float64 [n, classes]."""
        result: Floats = features @ self.weights.T + self.biases
        return result


@dataclass(frozen=True, eq=False)
class Fitted:
    """A fitted rival.

    Attributes:
        score: From features float64 [n, d] to scores [n], higher for more foreign samples.
        size_bytes: Numbers it keeps, in the types it keeps them in.
    """

    score: Scorer
    size_bytes: int


Rival = Callable[[Floats, npt.NDArray[np.int64], LinearHead], Fitted]

# ViM's paper: 1000 from 2048 dimensions on, 512 from 768 on, half of fewer.
_VIM_SIZES: Final = ((2048, 1000), (768, 512))
# The library's own k for nearest neighbours, and one for sets of few samples a class.
_NEIGHBOURS: Final = (50, 10)


def version() -> str:
    """The installed pytorch-ood's version."""
    return importlib.metadata.version("pytorch-ood")


def rivals() -> dict[str, Rival]:
    """All of pytorch-ood's methods for features and logits, by name.

    Raises:
        ImportError: pytorch-ood or torch is not installed.
    """
    detectors = _detectors()
    featurewise: dict[str, Callable[[LinearHead], Any]] = {
        "Mahalanobis": lambda _: detectors.Mahalanobis(None),
        "RMD": lambda _: detectors.RMD(None),
        **{f"KNN (k={k})": partial(_knn, detectors, k) for k in _NEIGHBOURS},
        "ViM": lambda head: detectors.ViM(None, _vim_size(head.weights.shape[1]), *_tensors(head)),
        "GMM": lambda _: detectors.GMM(None),
        "SHE": lambda head: detectors.SHE(None, _linear(head)),
        "fDBD": lambda head: detectors.fDBD(None, _linear(head)),
        "NCI": lambda head: detectors.NCI(None, _linear(head)),
        "NNGuide": lambda head: detectors.NNGuide(None, _linear(head)),
        "pNML": lambda head: detectors.PNML(None, _linear(head)),
    }
    logitwise: dict[str, Callable[[], Any]] = {
        "energy": lambda: detectors.EnergyBased(None),
        "GEN": lambda: detectors.GEN(None),
        "entropy": lambda: detectors.Entropy(None),
        "max logit": lambda: detectors.MaxLogit(None),
        "MSP": lambda: detectors.MaxSoftmax(None),
        "KL matching": lambda: detectors.KLMatching(None),
    }
    return {
        **{name: _on_features(make) for name, make in featurewise.items()},
        **{name: _on_logits(make) for name, make in logitwise.items()},
    }


def _on_features(make: Callable[[LinearHead], Any]) -> Rival:
    def fit(features: Floats, labels: npt.NDArray[np.int64], head: LinearHead) -> Fitted:
        import torch  # noqa: PLC0415 - only this benchmark needs it

        detector = make(head)
        rows = torch.as_tensor(features, dtype=torch.float32)
        detector.fit_features(rows, torch.as_tensor(labels))

        def score(probe: Floats) -> Floats:
            with torch.no_grad():
                found = detector.predict_features(torch.as_tensor(probe, dtype=torch.float32))
            result: Floats = found.numpy().astype(np.float64)
            return result

        return Fitted(score, _kept(detector))

    return fit


def _on_logits(make: Callable[[], Any]) -> Rival:
    def fit(features: Floats, labels: npt.NDArray[np.int64], head: LinearHead) -> Fitted:
        import torch  # noqa: PLC0415

        detector = make()
        if hasattr(detector, "fit_logits"):
            detector.fit_logits(torch.as_tensor(head(features)), torch.as_tensor(labels))

        def score(probe: Floats) -> Floats:
            with torch.no_grad():
                found = detector.predict_logits(torch.as_tensor(head(probe)))
            result: Floats = found.numpy().astype(np.float64)
            return result

        return Fitted(score, _kept(detector) + 4 * (head.weights.size + head.biases.size))

    return fit


def _knn(detectors: Any, k: int, _head: LinearHead) -> Any:
    return detectors.KNN(None, k=k)


def _vim_size(dim: int) -> int:
    return next((size for least, size in _VIM_SIZES if dim >= least), dim // 2)


def _tensors(head: LinearHead) -> tuple[Any, Any]:
    import torch  # noqa: PLC0415

    return (
        torch.as_tensor(head.weights, dtype=torch.float32),
        torch.as_tensor(head.biases, dtype=torch.float32),
    )


def _linear(head: LinearHead) -> Any:
    import torch  # noqa: PLC0415

    layer = torch.nn.Linear(head.weights.shape[1], head.weights.shape[0])
    with torch.no_grad():
        for parameter, values in zip((layer.weight, layer.bias), _tensors(head), strict=True):
            parameter.copy_(values)
    return layer


def _kept(value: Any, seen: set[int] | None = None) -> int:
    """Bytes of all tensors and arrays that an object holds, each counted once."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if hasattr(value, "nbytes"):
        return int(value.nbytes)
    if isinstance(value, Mapping):
        return sum(_kept(item, seen) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(_kept(item, seen) for item in value)
    return (
        sum(_kept(item, seen) for item in vars(value).values()) if hasattr(value, "__dict__") else 0
    )


def _detectors() -> Any:
    with _torchvision_unneeded():
        from pytorch_ood import detector  # type: ignore[import-not-found]  # noqa: PLC0415
    return detector


@contextmanager
def _torchvision_unneeded() -> Iterator[None]:
    """Let pytorch-ood be imported without torchvision.

    Its package imports data sets and image models, and with them torchvision, of which detectors on
    features need nothing; a torchvision that fits the installed torch is not always to be had. The
    stand-in is there while it is imported and is removed again.
    """
    if "pytorch_ood" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        yield
        return
    finder = _StandIn()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]


class _Anything(types.ModuleType):
    """A module in which every name is an empty class."""

    __path__: list[str] = []  # noqa: RUF012 - a module's, as the import system wants it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torchvision and all that is below it, with nothing in it."""

    def find_spec(
        self,
        fullname: str,
        path: Any,  # noqa: ARG002 - the import system passes it
        target: Any = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to run."""
