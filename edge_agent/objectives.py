"""What an adapter is trained for: heads and losses beside it, and what happens after a step.

`trainer_loop.train` is given one of these; strategies add their own by deriving from `Classifier`.
An objective sees raw features and class indices, never images, and writes no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Floats = NDArray[np.float32]

# Cosine logits need a scale for the softmax to be decisive; 16 suits tens of classes.
LOGIT_SCALE: Final = 16.0


class Classifier:
    """Cross-entropy of some logits, and nothing else: what the shared objectives derive from."""

    def logits(self, features: Tensor) -> Tensor:
        """Raw features [b, d] to logits [b, c]."""
        raise NotImplementedError

    def parameters(self) -> dict[str, Tensor]:
        """What is trained beside the adapter, by name."""
        return {}

    def buffers(self) -> dict[str, Tensor]:
        """What changes in training without gradients, by name."""
        return {}

    def loss(self, features: Tensor, classes: Tensor) -> Tensor:
        """Mean cross-entropy of a batch: raw features [b, d], class indices int64 [b]."""
        return functional.cross_entropy(self.logits(features), classes)

    def correct(self, features: Tensor, classes: Tensor) -> int:
        """Samples of a batch the head gets right, for progress."""
        return int((self.logits(features).argmax(1) == classes).sum())

    def after_step(self, tensors: Mapping[str, Tensor]) -> None:
        """Called after every step, without gradients; may change the adapter's tensors."""

    def adapter_frozen(self, epoch: int) -> bool:
        """Whether only the head learns in an epoch (from 0)."""
        del epoch
        return False


class CosineHead(Classifier):
    """A local cosine head, and the momentum merge of MOS (Sun et al., AAAI 2025).

    Logits are scaled cosines between features and rows, the rows' common mean taken off both: it
    is what all classes share. After every step W <- (1 - m) W + m mean(earlier adapters).

    Args:
        head: Rows to start from (class means of normalised features), float32 [c, d]; narrower
            than the features, it looks at their first d numbers only.
        momentum: m above; the share of the earlier adapters' mean.
        earlier: Mean of the earlier adapters; empty when there is none.
    """

    def __init__(
        self, head: Floats, *, momentum: float = 0.0, earlier: Mapping[str, Floats] | None = None
    ) -> None:
        self._width = head.shape[1]
        self._centre = torch.from_numpy(head.mean(axis=0))
        self._rows = (torch.from_numpy(head.copy()) - self._centre).requires_grad_()
        self._momentum = momentum
        self._earlier = {k: torch.from_numpy(mean.copy()) for k, mean in (earlier or {}).items()}

    def parameters(self) -> dict[str, Tensor]:
        """The head's rows."""
        return {"head": self._rows}

    def logits(self, features: Tensor) -> Tensor:
        """Scaled cosines to the rows, [b, c]."""
        unit = functional.normalize(features[:, : self._width], dim=1) - self._centre
        unit = functional.normalize(unit, dim=1)
        return LOGIT_SCALE * unit @ functional.normalize(self._rows, dim=1).T

    def after_step(self, tensors: Mapping[str, Tensor]) -> None:
        """Merge with the earlier adapters."""
        merge_momentum(tensors, self._earlier, self._momentum)


def merge_momentum(
    tensors: Mapping[str, Tensor], earlier: Mapping[str, Tensor], momentum: float
) -> None:
    """W <- (1 - m) W + m mean(earlier adapters), in place: MOS, section 4.1.

    Args:
        tensors: The adapter in training.
        earlier: Mean of the earlier adapters, by tensor name; empty changes nothing.
        momentum: m above.
    """
    for name, mean in earlier.items():
        tensors[name].mul_(1.0 - momentum).add_(mean, alpha=momentum)


class ContrastiveHead(CosineHead):
    """What MOS trains an adapter for: the local cosine head and a term that keeps classes apart.

    The term asks of every stored class mean and every sample of the batch to be most like itself
    (cross-entropy of their similarities, temperature 0.8, against the diagonal), which pushes new
    features away from each other and from the old classes.

    Args:
        head: As for `CosineHead`.
        means: Means of the classes of earlier tasks, normalised, float32 [k, d]; k may be 0.
        weight: Of the contrastive term.
        temperature: Of its similarities.
        momentum: As for `CosineHead`.
        earlier: As for `CosineHead`.
    """

    def __init__(
        self,
        head: Floats,
        means: Floats,
        *,
        weight: float = 0.1,
        temperature: float = 0.8,
        momentum: float = 0.1,
        earlier: Mapping[str, Floats] | None = None,
    ) -> None:
        super().__init__(head, momentum=momentum, earlier=earlier)
        self._means = torch.from_numpy(means.copy())
        self._weight, self._temperature = weight, temperature

    def loss(self, features: Tensor, classes: Tensor) -> Tensor:
        """Local cross-entropy and the contrastive term."""
        unit = functional.normalize(features[:, : self._width], dim=1)
        points = torch.cat([self._means, unit])
        similarities = points @ points.T / self._temperature
        apart = functional.cross_entropy(similarities, torch.arange(len(points)))
        return super().loss(features, classes) + self._weight * apart


class AveragedHead(CosineHead):
    """What LAE trains an adapter for: the classes of one task, with a slow average beside it.

    LAE (Gao et al., "A Unified Continual Learning Framework with General Parameter-Efficient
    Tuning", ICCV 2023): the cross-entropy runs over the present task's classes only (section 3.2),
    the adapter rests in the first epochs (3.3, adaptation speed calibration), and the offline
    adapter follows it by an exponential moving average (3.4, equation 5).

    Args:
        head: As for `CosineHead`, the present task's classes.
        offline: The offline adapter so far, by tensor name; empty when there is none yet.
        decay: Share the offline adapter keeps in a step.
        frozen_epochs: Epochs in which only the head learns.
    """

    def __init__(
        self, head: Floats, offline: Mapping[str, Floats], *, decay: float, frozen_epochs: int
    ) -> None:
        super().__init__(head)
        self._offline = {name: torch.from_numpy(v.copy()) for name, v in offline.items()}
        self._decay, self._frozen_epochs = decay, frozen_epochs

    def buffers(self) -> dict[str, Tensor]:
        """The offline adapter."""
        return self._offline

    def after_step(self, tensors: Mapping[str, Tensor]) -> None:
        """Let the offline adapter follow."""
        for name, tensor in self._offline.items():
            tensor.mul_(self._decay).add_(tensors[name], alpha=1.0 - self._decay)

    def adapter_frozen(self, epoch: int) -> bool:
        """True in the first epochs."""
        return epoch < self._frozen_epochs

    def offline(self) -> dict[str, Floats]:
        """The offline adapter as it is now."""
        return {name: tensor.numpy().copy() for name, tensor in self._offline.items()}
