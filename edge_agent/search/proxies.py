"""Training-free proxies: how promising an adapter looks on one minibatch before any training.

Each gives a number that is higher for better candidates and means something only beside others of
the same minibatch. `ranking` calls them. Torch is imported when one is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.search.candidates import Candidate, active

if TYPE_CHECKING:
    from torch import Tensor

    from exporter.programs import TrainingProgram

Floats = NDArray[np.float32]

# Up-projections begin at zero, where nothing below them has a gradient or an effect: the proxies
# look at the adapter a short random step away instead. A linear layer's weights at 192 inputs have
# a spread of 0.04; half of that is a step that training takes within an epoch.
_STEP: Final = 0.02
# The tangent kernel needs a backward pass for every sample.
_TANGENT_SAMPLES: Final = 16
_LOGIT_SCALE: Final = 16.0


@dataclass(frozen=True, eq=False)
class Minibatch:
    """The samples that candidates are compared on.

    Attributes:
        hidden: Prefix activations, float32 [n, *hidden_shape]; 64 are plenty.
        targets: Class of each sample, int64 [n].
        prototypes: Class means of the network's normalised base features, float32 [c, d]; the
            head of the loss.
    """

    hidden: Floats
    targets: NDArray[np.int64]
    prototypes: Floats


def perturbed(candidate: Candidate, tensors: Mapping[str, Floats], seed: int) -> dict[str, Floats]:
    """A candidate's first tensors, a short random step away at its own sites."""
    rng = np.random.default_rng(seed)
    return {
        name: value + rng.normal(0, _STEP, value.shape).astype(np.float32)
        if active(candidate, name)
        else value
        for name, value in sorted(tensors.items())
    }


def has_rectifiers(program: TrainingProgram) -> bool:
    """Whether a family's adapters have rectified units of their own."""
    return bool(_rectifiers(program))


def rectifier_patterns(
    program: TrainingProgram, batch: Minibatch, tensors: Mapping[str, Floats], candidate: Candidate
) -> NDArray[np.bool_]:
    """Which of the adapter's rectified units are on, bool [n, units of all tokens and sites]."""
    import torch  # noqa: PLC0415

    wanted = {
        node.name: names
        for node, names in _rectifiers(program).items()
        if any(active(candidate, name) for name in names)
    }
    seen: list[Tensor] = []

    class Watcher(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            result = super().run_node(n)
            if n.name in wanted:
                seen.append(result > 0)
            return result

    given = [torch.from_numpy(tensors[name]) for name in program.tensors]
    with torch.no_grad():
        Watcher(_graph(program)).run(torch.from_numpy(batch.hidden), *given)
    result: NDArray[np.bool_] = torch.cat([part.flatten(1) for part in seen], dim=1).numpy()
    return result


def update_patterns(
    program: TrainingProgram,
    batch: Minibatch,
    tensors: Mapping[str, Floats],
    plain: Mapping[str, Floats],
) -> NDArray[np.bool_]:
    """Where the adapter raises the features, bool [n, d]; any family has these.

    Args:
        program: The family's suffix.
        batch: The minibatch.
        tensors: The perturbed adapter.
        plain: The same before the perturbation, with which the suffix computes the base.
    """
    import torch  # noqa: PLC0415

    hidden = torch.from_numpy(batch.hidden)
    with torch.no_grad():
        adapted, base = (
            program(hidden, {name: torch.from_numpy(value) for name, value in given.items()})
            for given in (tensors, plain)
        )
    result: NDArray[np.bool_] = (adapted > base).numpy()
    return result


def activation_score(patterns: NDArray[np.bool_]) -> float:
    """How differently the units respond to different samples: NASWOT.

    log |K| with K[i, j] the number of units that agree on samples i and j (Mellor et al., "Neural
    architecture search without training", 2021, equation 2).

    Args:
        patterns: bool [n, units].
    """
    on = patterns.astype(np.float64)
    kernel = on @ on.T + (1.0 - on) @ (1.0 - on).T
    # Two samples with one pattern would give −inf, and no order among candidates that have some.
    kernel += np.eye(len(kernel)) * 1e-3
    return float(np.linalg.slogdet(kernel)[1])


def gradient_score(
    program: TrainingProgram, batch: Minibatch, tensors: Mapping[str, Floats], candidate: Candidate
) -> float:
    """How strongly the loss pulls at the adapter: the sum of its tensors' gradient norms.

    GradNorm of Abdelfattah et al., "Zero-cost proxies for lightweight NAS" (2021), section 3.1,
    with the cosine cross-entropy to the prototypes as the loss.
    """
    import torch  # noqa: PLC0415

    leaves, given = _leaves(tensors, candidate)
    loss = _loss(program, batch, given, slice(None))
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return sum(float(g.norm()) for g in gradients if g is not None)


def spectral_score(
    program: TrainingProgram, batch: Minibatch, tensors: Mapping[str, Floats], candidate: Candidate
) -> float:
    """How evenly the adapter can move different samples: minus the tangent kernel's condition.

    −log(λmax/λmin) of the kernel of the samples' loss gradients (after Chen, Gong and Wang,
    "Neural architecture search on ImageNet in four GPU hours", 2021, equation 2), over at most
    16 samples.
    """
    import torch  # noqa: PLC0415

    leaves, given = _leaves(tensors, candidate)
    rows = []
    for at in range(min(len(batch.targets), _TANGENT_SAMPLES)):
        loss = _loss(program, batch, given, slice(at, at + 1))
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        parts = [
            torch.zeros_like(leaf) if g is None else g
            for leaf, g in zip(leaves, gradients, strict=True)
        ]
        rows.append(torch.cat([part.flatten() for part in parts]).numpy().astype(np.float64))
    gradient = np.stack(rows)
    # A sample that is right already has next to no gradient; its direction still counts.
    gradient /= np.maximum(np.linalg.norm(gradient, axis=1, keepdims=True), 1e-12)
    values = np.linalg.eigvalsh(gradient @ gradient.T)
    return -float(np.log(max(values[-1], 1e-12) / max(values[0], 1e-12)))


def _leaves(
    tensors: Mapping[str, Floats], candidate: Candidate
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The tensors that would be trained, and all of them by name."""
    import torch  # noqa: PLC0415

    given = {name: torch.from_numpy(value.copy()) for name, value in tensors.items()}
    leaves = [t.requires_grad_() for name, t in given.items() if active(candidate, name)]
    return leaves, given


def _loss(
    program: TrainingProgram, batch: Minibatch, given: Mapping[str, Tensor], rows: slice
) -> Tensor:
    import torch  # noqa: PLC0415
    from torch.nn import functional  # noqa: PLC0415

    head = torch.from_numpy(batch.prototypes)
    centre = head.mean(dim=0)
    features = program(torch.from_numpy(batch.hidden[rows]), given)[:, : head.shape[1]]
    unit = functional.normalize(functional.normalize(features, dim=1) - centre, dim=1)
    logits = _LOGIT_SCALE * unit @ functional.normalize(head - centre, dim=1).T
    return functional.cross_entropy(logits, torch.from_numpy(batch.targets[rows]))


def _graph(program: TrainingProgram) -> Any:
    """The captured program as a graph that can be walked; torch types it as any module."""
    return program.module


def _rectifiers(program: TrainingProgram) -> dict[Any, frozenset[str]]:
    """Rectifications of what an adapter's tensors computed, and the names of those tensors.

    A node that depends on adapter tensors and not on the activations is the adapter's weight,
    however a family puts it together; a rectifier right behind an operation with such a weight is
    the adapter's, and the encoder's own rectifiers are not.
    """
    weights: dict[Any, frozenset[str]] = {}
    found: dict[Any, frozenset[str]] = {}
    names = iter(program.tensors)
    activations = True
    for node in _graph(program).graph.nodes:
        if node.op == "placeholder":
            if not activations:
                weights[node] = frozenset({next(names)})
            activations = False
        elif node.op == "call_function":
            inputs = node.all_input_nodes
            if inputs and all(item in weights for item in inputs):
                weights[node] = frozenset().union(*(weights[item] for item in inputs))
            elif "relu" in str(node.target) and inputs:
                behind = [weights[i] for i in inputs[0].all_input_nodes if i in weights]
                if behind:
                    found[node] = frozenset().union(*behind)
    return found
