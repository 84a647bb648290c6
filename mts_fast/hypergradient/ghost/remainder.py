"""Parameters whose uses the ghost engine cannot serve, beside those that it does: their part of the
dots is the second derivative of the same graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mts_fast.hypergradient.engine import dense
from mts_fast.hypergradient.ghost.reasons import Reason, Unsupported

# the largest share of the parameters' entries that may be left over: beyond it, an engine that
# treats all of them alike costs less
LARGEST_SHARE = 0.5


def left_over(
    reasons: Sequence[str], names: Mapping[Tensor, str], before: Mapping[Tensor, str]
) -> dict[Tensor, str]:
    """Parameters that reasons are about, each with its reason, and those that were left before.

    Empty where a reason is about the whole model, nothing is new, or little would be served.
    """
    by_path: dict[str, str] = {}
    for reason in reasons:
        if not isinstance(reason, Reason) or not reason.paths:
            return {}
        by_path |= dict.fromkeys(reason.paths, reason)
    new = {p: by_path[name] for p, name in names.items() if name in by_path and p not in before}
    left = {**before, **new}
    share = sum(p.numel() for p in left) / sum(p.numel() for p in names)
    return left if new and share <= LARGEST_SHARE else {}


class Remainder:
    """The parameters that are left over in one forward, on its graph."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self._first: tuple[Tensor, list[Tensor | None]] | None = None  # p and its gradient

    def __bool__(self) -> bool:
        return bool(self.parameters)

    def prepare(self, graph: Tensor, p: Tensor) -> None:
        """Take the gradient for p with a graph of its own; that of the forward is kept."""
        if self.parameters:
            p = p.detach().clone().requires_grad_()
            gradient = torch.autograd.grad(
                graph, self.parameters, p, create_graph=True, allow_unused=True
            )
            self._first = p, dense(gradient)

    def dots(self, tangents: Mapping[int, Tensor]) -> Tensor | None:
        """Their part of d [B], for tangents by id; once."""
        if self._first is None:
            return None
        (p, gradient), self._first = self._first, None
        terms = [
            (g * tangents[id(parameter)].to(g.dtype)).sum()
            for parameter, g in zip(self.parameters, gradient, strict=True)
            if g is not None and g.requires_grad
        ]
        if not terms:
            return torch.zeros_like(p)
        with torch.enable_grad():
            return torch.autograd.grad(torch.stack(terms).sum(), p)[0]

    def gradient(self, graph: Tensor, p: Tensor, *, retain: bool) -> dict[Tensor, Tensor]:
        """Their gradients for other weights p, on the graph of the forward."""
        gradient = torch.autograd.grad(
            graph, self.parameters, p, retain_graph=retain, allow_unused=True
        )
        pairs = zip(self.parameters, dense(gradient), strict=True)
        return {parameter: g for parameter, g in pairs if g is not None}

    def check(self, graph: Tensor) -> None:
        """See that the dots can be had; the graph is kept.

        Raises:
            Unsupported: a function on the way has no second derivative.
        """
        if not self.parameters:
            return
        try:
            self.prepare(graph, torch.ones_like(graph))
            assert self._first is not None
            if any(g is not None and not g.requires_grad and g.any() for g in self._first[1]):
                raise Unsupported(["no second derivative for what is left over (no graph)"])
            self.dots({id(p): torch.zeros_like(p) for p in self.parameters})
        except (torch.OutOfMemoryError, Unsupported):
            raise
        except RuntimeError as error:
            first = str(error).strip().splitlines()[:1]
            raise Unsupported([f"no second derivative for what is left over ({first})"]) from error
