"""What a site's output depends on linearly, and the changes that keep it so.

A linear family's `fold` writes an adapter into these weights; `exporter.fold` says which of an
encoder's weights they are. NumPy alone: a device without torch folds through here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from exporter.errors import EncoderError

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Affine:
    """The weights of a module `y = weight · z + bias`, in double precision.

    Attributes:
        weight: [outputs] of a norm or of a product by channel, [outputs, inputs] of a linear map,
            [outputs, inputs, kernel...] of a convolution.
        bias: [outputs], or None where the module adds nothing.
        of_input: z is what goes into the site, and not something computed from it.
    """

    weight: Doubles
    bias: Doubles | None
    of_input: bool

    def scaled(self, factor: Doubles) -> Affine:
        """Weights of `factor * y`, factor [outputs]."""
        weight = self.weight * factor.reshape(-1, *[1] * (self.weight.ndim - 1))
        return replace(self, weight=weight, bias=None if self.bias is None else self.bias * factor)

    def shifted(self, shift: Doubles) -> Affine:
        """Weights of `y + shift`, shift [outputs].

        Raises:
            EncoderError: The module has no bias to write it into.
        """
        if self.bias is None:
            raise EncoderError("the module has no bias, which a shift could be written into")
        return replace(self, bias=self.bias + shift)

    def mixed(self, matrix: Doubles) -> Affine:
        """Weights of `matrix · y`, matrix [outputs, outputs].

        Raises:
            EncoderError: The module keeps its channels apart.
        """
        if self.weight.ndim < 2:
            raise EncoderError("the module has one weight a channel and cannot mix its channels")
        bias = None if self.bias is None else matrix @ self.bias
        return replace(self, weight=np.tensordot(matrix, self.weight, axes=1), bias=bias)

    def plus(self, matrix: Doubles) -> Affine:
        """Weights of `y + matrix · x`, x being what goes into the site, matrix [outputs, inputs].

        On a convolution that keeps its maps' size, the matrix acts at the kernel's centre.

        Raises:
            EncoderError: The module is no linear map of what goes into the site.
        """
        kernel = self.weight.shape[2:]
        fits = self.weight.shape[:2] == matrix.shape and all(size % 2 for size in kernel)
        if not self.of_input or not fits:
            raise EncoderError("the module is no linear map of what goes into it")
        weight = self.weight.copy()
        weight[(..., *(size // 2 for size in kernel))] += matrix
        return replace(self, weight=weight)
