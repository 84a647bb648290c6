"""Where a tensor that a layer received comes from: a parameter, behind some linear maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ParameterSource:
    """A parameter and the views that led from it to the tensor in use (chunk, transpose, ...)."""

    parameter: Tensor
    maps: tuple[Callable[[Tensor], Tensor], ...] = ()

    def then(self, view: Callable[[Tensor], Tensor]) -> ParameterSource:
        """The same with one view more."""
        return ParameterSource(self.parameter, (*self.maps, view))

    def image(self, tangent: Tensor) -> Tensor:
        """The tangent of the tensor in use for a tangent of the parameter."""
        for view in self.maps:
            tangent = view(tangent)
        return tangent

    def pullback(self, cotangent: Tensor) -> Tensor:
        """The parameter's gradient for a gradient of the tensor in use."""
        if not self.maps:
            return cotangent
        with torch.enable_grad():
            leaf = self.parameter.detach().requires_grad_()
            image = self.image(leaf)
        return torch.autograd.grad(image, leaf, cotangent.to(image.dtype))[0]
