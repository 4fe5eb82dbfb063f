"""Capturing encoder halves with `torch.export`, and loading a suffix back for training.

One captured program per (encoder, family) serves both runtimes: saved, it gives gradients on a
device that has no model source; lowered, it is the graph ONNX Runtime runs. The builder and the
trainer call this. It chooses no sites, writes no files and needs no ONNX.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from exporter.errors import EncoderError
from exporter.families import (
    AdapterFamily,
    adapter_family,
    attached_sites,
    largest_rank,
    nested,
    tensor_shapes,
)
from exporter.package import SUFFIX_KEY, EncoderPackage, Site

_MAX_BATCH = 65536
_MAX_RANK = 4096
# Any size above one: a captured program must not take it for a constant.
_EXAMPLE_BATCH = 3
_EXAMPLE_RANK = 5


class WholePrefix(nn.Module):
    """The prefix under the name its weights are stored by."""

    def __init__(self, prefix: nn.Module) -> None:
        super().__init__()
        self.prefix = prefix

    def forward(self, images: Tensor) -> Tensor:
        """Images float32 [n, 3, s, s] to hidden [n, ...]."""
        hidden: Tensor = self.prefix(images)
        return hidden


class AdaptedSuffix(nn.Module):
    """A suffix whose sites are adapted by tensors given with each call.

    Args:
        suffix: Maps hidden [n, ...] to features [n, d].
        family: The mathematics at every site.
        sites: All of the suffix's sites by module name; the family takes those of its kinds.
    """

    def __init__(self, suffix: nn.Module, family: AdapterFamily, sites: Mapping[str, Site]) -> None:
        super().__init__()
        self.suffix = suffix
        self.family = family
        self.sites = attached_sites(family, sites)
        self.tensors = tensor_shapes(family, sites)

    def forward(self, hidden: Tensor, *tensors: Tensor) -> Tensor:
        """Hidden and the adapter's tensors, in the order of `self.tensors`, to features."""
        given = dict(zip(self.tensors, tensors, strict=True))
        with contextlib.ExitStack() as hooks:
            for name, site in self.sites.items():
                start = f"{name}/"
                params = {k.removeprefix(start): v for k, v in given.items() if k.startswith(start)}
                module = self.suffix.get_submodule(name)
                hook = module.register_forward_hook(self._hook(site, params))
                hooks.callback(hook.remove)
            features: Tensor = self.suffix(hidden)
        return features

    def _hook(self, site: Site, params: Mapping[str, Tensor]) -> Callable[..., Tensor]:
        def adapt(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            del module
            x = inputs[0].movedim(site.channel_axis, -1)
            y = output.movedim(site.channel_axis, -1)
            return self.family.apply(x, y, params, site).movedim(-1, site.channel_axis)

        return adapt


def capture_prefix(prefix: nn.Module, images: Tensor) -> ExportedProgram:
    """Captures a prefix with a dynamic batch; `images` gives the other axes."""
    example = images[:1].expand(_EXAMPLE_BATCH, *images.shape[1:]).contiguous()
    batch = Dim("batch", min=1, max=_MAX_BATCH)
    with quiet():
        return torch.export.export(
            WholePrefix(prefix).eval(), (example,), dynamic_shapes=({0: batch},)
        )


def capture_suffix(adapted: AdaptedSuffix, hidden: Tensor) -> ExportedProgram:
    """Captures an adapted suffix with dynamic batch and rank; `hidden` gives the other axes."""
    example = hidden[:1].expand(_EXAMPLE_BATCH, *hidden.shape[1:]).contiguous()
    batch = Dim("batch", min=1, max=_MAX_BATCH)
    rank = Dim("rank", min=1, max=_MAX_RANK)
    examples, dynamic = [], []
    for shape in adapted.tensors.values():
        examples.append(torch.zeros([_EXAMPLE_RANK if a == "rank" else int(a) for a in shape]))
        dynamic.append({i: rank for i, a in enumerate(shape) if a == "rank"})
    with quiet():
        return torch.export.export(
            adapted.eval(), (example, *examples), dynamic_shapes=({0: batch}, tuple(dynamic))
        )


def save_program(program: ExportedProgram) -> bytes:
    """Packs a captured suffix without its weights or source paths; the program is used up."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    for value in program.state_dict.values():
        value.detach().zero_()
    # Saved examples are a pickle, which nobody should have to load.
    program.example_inputs = None
    archive = io.BytesIO()
    with quiet():
        torch.export.save(program, archive)
    return gzip.compress(archive.getvalue(), mtime=0)


class TrainingProgram(nn.Module):
    """A suffix that gives gradients with respect to an adapter's tensors.

    Args:
        module: The captured program with its weights, which stay frozen.
        tensors: The adapter's tensor names, in the program's order.
        family: The adapter's family.
    """

    def __init__(self, module: nn.Module, tensors: tuple[str, ...], family: AdapterFamily) -> None:
        super().__init__()
        self.module = module
        self.tensors = tensors
        self.family = family

    def forward(self, hidden: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Hidden float32 [n, ...] and all of an adapter's tensors to features [n, d].

        Raises:
            EncoderError: A tensor is missing or unknown.
        """
        if set(tensors) != set(self.tensors):
            odd = min(set(tensors) ^ set(self.tensors))
            what = "unknown" if odd in tensors else "missing"
            raise EncoderError(f"adapter tensor {odd!r} is {what}")
        features: Tensor = self.module(hidden, *(tensors[name] for name in self.tensors))
        return features

    def nested(self, tensors: Mapping[str, Tensor], rng: np.random.Generator) -> dict[str, Tensor]:
        """What one step of nested training runs with: the first of the adapter's ranks."""
        return nested(self.family, tensors, largest_rank(self.family, tensors), rng)


def load_training_program(package: EncoderPackage, family: str) -> TrainingProgram:
    """Loads a package's suffix for training; the model's source is not needed.

    Args:
        package: The encoder.
        family: The adapter family, one of `package.families`.

    Raises:
        EncoderError: The package lacks the family, or its program does not load with this torch.
    """
    entry = package.family(family)
    data = gzip.decompress(package.read(entry.program))
    weights = {name: torch.from_numpy(value) for name, value in package.weights(SUFFIX_KEY).items()}
    try:
        with quiet():
            module = torch.export.load(io.BytesIO(data)).module()
        module.load_state_dict(weights)
    except Exception as error:  # torch names no type for what a foreign archive raises
        raise EncoderError(
            f"{package.path / entry.program} does not load with torch {torch.__version__} "
            f"(built with {package.manifest.built_with.get('torch')}): {error}"
        ) from error
    names = tuple(sorted(entry.tensors))
    frozen = module.requires_grad_(requires_grad=False)
    return TrainingProgram(frozen, names, adapter_family(family))


def reference_features(
    package: EncoderPackage,
    family: str,
    hidden: npt.NDArray[np.float32],
    tensors: Mapping[str, npt.NDArray[np.float32]],
) -> npt.NDArray[np.float32]:
    """What torch computes: hidden [n, ...] and an adapter to features [n, d], without gradients."""
    program = load_training_program(package, family)
    given = {name: torch.tensor(value) for name, value in tensors.items()}
    with torch.no_grad():
        features: npt.NDArray[np.float32] = program(torch.tensor(hidden), given).numpy()
    return features


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences torch's notes on packages that are not needed here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
