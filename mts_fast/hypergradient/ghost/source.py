"""Where a tensor that a layer received comes from: a parameter, or a tensor derived from parameters
alone, behind some linear maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from mts_fast.hypergradient.engine import dense
from mts_fast.hypergradient.ghost.reasons import Reason, Unsupported


@dataclass(frozen=True)
class ParameterSource:
    """A root and the views that led from it to the tensor in use (chunk, transpose, ...).

    The root is a parameter, or the leaf of a `Derived` tensor.
    """

    root: Tensor
    maps: tuple[Callable[[Tensor], Tensor], ...] = ()
    by_rule: bool = False  # one of the maps is a layer's replay, of which autograd knows nothing

    def then(self, view: Callable[[Tensor], Tensor], *, by_rule: bool = False) -> ParameterSource:
        """The same with one view more."""
        return ParameterSource(self.root, (*self.maps, view), self.by_rule or by_rule)

    def image(self, tangent: Tensor) -> Tensor:
        """The tangent of the tensor in use for a tangent of the root."""
        for view in self.maps:
            tangent = view(tangent)
        return tangent

    def pullback(self, cotangent: Tensor) -> Tensor:
        """The root's gradient for a gradient of the tensor in use."""
        if not self.maps:
            return cotangent
        with torch.enable_grad():
            leaf = self.root.detach().requires_grad_()
            image = self.image(leaf)
        return torch.autograd.grad(image, leaf, cotangent.to(image.dtype))[0]


# <c, J v> and <J^T c, v> of right products differed by less than this many roots of eps of their
# terms, and of wrong ones, where a part has no second derivative, by its share
ADJOINT = 1.0


class Derived:
    """A tensor computed from parameters and constants alone (1 + w, g v / |v|, a table indexed).

    `value` has the graph that leads to the parameters; the model's layers get `leaf`, the same
    values cut off from it, so that the graph of the samples can be freed before this one.
    """

    def __init__(self, value: Tensor, paths: frozenset[str], *, spread: bool) -> None:
        self.value = value
        self.paths = paths  # of the parameters
        self.spread = spread  # whether it may have one entry for every sample
        self.edge: GradientEdge | None = None  # of the value, from its first use on
        self._leaf: Tensor | None = None

    @property
    def path(self) -> str:
        """The parameters' paths, as reasons name them."""
        return ", ".join(sorted(self.paths))

    @property
    def leaf(self) -> Tensor:
        """What layers get instead of the value."""
        if self._leaf is None:
            self.edge = get_gradient_edge(self.value)
            self._leaf = self.value.detach().requires_grad_()
        return self._leaf

    @property
    def is_used(self) -> bool:
        """Whether a layer got it."""
        return self._leaf is not None


class DerivedTensors:
    """All derived tensors that the layers of one forward used, and the graph of parameters alone.

    One product with the Jacobian of that graph serves all tangents, one with its transpose all
    gradients. It has no axis of samples, so that both are cheap.
    """

    def __init__(self, used: Sequence[Derived], parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self.leaves = [d.leaf for d in used]
        # whose gradients autograd has; those of the others follow from their uses
        self.summed = [d.leaf for d in used if not d.spread]
        self._edges = [d.edge for d in used if d.edge is not None]
        self.paths = frozenset(path for d in used for path in d.paths)

    def tangents(self, direction: Sequence[Tensor]) -> dict[int, Tensor]:
        """The tangents of the leaves, by id, for a tangent of every parameter.

        They are the transpose of the transpose: what autograd takes for the gradient decides, also
        where that is not the derivative (a straight-through estimator).

        Raises:
            Unsupported: the graph of the parameters has no second derivative.
        """
        if not self.leaves:
            return {}
        with torch.enable_grad():
            cotangents = [torch.zeros_like(leaf, requires_grad=True) for leaf in self.leaves]
            gradients = self._transposed(cotangents, create_graph=True)
            pairs = [
                (g, v.to(g.dtype))
                for g, v in zip(gradients, direction, strict=True)
                if g is not None and g.requires_grad
            ]
            with self._named("no second derivative of a tensor made of them"):
                images = torch.autograd.grad(
                    [g for g, _ in pairs], cotangents, [v for _, v in pairs], allow_unused=True
                )
        return {
            id(leaf): torch.zeros_like(leaf) if t is None else t
            for leaf, t in zip(self.leaves, images, strict=True)
        }

    def check(self) -> None:
        """See that tangents and gradients can be had.

        Raises:
            Unsupported: they cannot.
        """
        v = [torch.randn_like(p) for p in self._parameters]
        c = {leaf: torch.randn_like(leaf) for leaf in self.leaves}
        tangents, gradients = self.tangents(v), self.pull_back(c)
        pairs = [(c[leaf], tangents[id(leaf)]) for leaf in self.leaves]
        others = [(g, t) for g, t in zip(gradients, v, strict=True) if g is not None]
        forward, backward = (
            sum((x.double() * y.double()).sum() for x, y in terms) for terms in (pairs, others)
        )
        size = sum(float(x.double().norm() * y.double().norm()) for x, y in pairs + others)
        eps = max((torch.finfo(leaf.dtype).eps for leaf in self.leaves), default=0.0)
        if abs(float(forward) - float(backward)) > ADJOINT * math.sqrt(eps) * size:
            text = ": the backward of a tensor made of them leaves out its own derivative"
            raise Unsupported([Reason(self.paths, text)])

    def reached(self) -> list[Tensor]:
        """The parameters behind the leaves."""
        gradients = self.pull_back({leaf: torch.zeros_like(leaf) for leaf in self.leaves})
        return [p for p, g in zip(self._parameters, gradients, strict=True) if g is not None]

    def pull_back(self, gradients: Mapping[Tensor, Tensor]) -> list[Tensor | None]:
        """Each parameter's gradient for gradients of the leaves."""
        if not any(leaf in gradients for leaf in self.leaves):
            return [None] * len(self._parameters)
        cotangents = [
            torch.zeros_like(leaf) if (g := gradients.get(leaf)) is None else g.to(leaf.dtype)
            for leaf in self.leaves
        ]
        return dense(self._transposed(cotangents, create_graph=False))

    def add_pulled_back(self, total: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Sums by root -> sums by parameter."""
        for parameter, g in zip(self._parameters, self.pull_back(total), strict=True):
            if g is not None:
                total[parameter] = total[parameter] + g if parameter in total else g
        return total

    def _transposed(
        self, cotangents: Sequence[Tensor], *, create_graph: bool
    ) -> Sequence[Tensor | None]:
        with self._named("a tensor made of them cannot be differentiated"):
            return torch.autograd.grad(
                self._edges,
                self._parameters,
                cotangents,
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
            )

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Errors of torch inside become a reason; out of memory is raised as it is."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            first = str(error).strip().splitlines()[:1]
            raise Unsupported([Reason(self.paths, f": {what} ({first})")]) from error
