"""Backward passes over a captured forward that pass each output gradient b to a function."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.autograd.graph import Node

from mts_fast.hypergradient.ghost.recorded import RecordedCall

# (position of the use, its b)
Consumer = Callable[[int, Tensor], object]


def nodes_of(graph: Tensor) -> Iterator[Node]:
    """Every node of the graph behind a tensor."""
    waiting = [] if graph.grad_fn is None else [graph.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        new = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= new
        waiting += new


def _has_other_leaves(graph: Tensor, uses: Sequence[RecordedCall]) -> bool:
    """Whether the graph has a leaf that is neither a parameter of a use nor a copy of one."""
    tracked = {id(source.root) for use in uses for source in use.sources.values()}
    return any(
        id(node.variable) not in tracked for node in nodes_of(graph) if hasattr(node, "variable")
    )


def in_callers_context(function: Consumer, device: torch.device) -> Consumer:
    """The function under the autocast setting and the context variables of the caller.

    Autograd runs hooks of GPU nodes in a thread of its own, to which neither the dtype of autocast
    nor a context variable (the backend in force) is passed on.
    """
    enabled = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type)
    context = contextvars.copy_context()

    def run(i: int, b: Tensor) -> object:
        with (
            torch.no_grad(),
            torch.autocast(device.type, dtype, enabled=enabled, cache_enabled=False),
        ):
            # a copy, since a context can be entered only once at a time
            return context.copy().run(function, i, b)

    return run


def visit_output_gradients(
    graph: Tensor,
    uses: Sequence[RecordedCall],
    cotangent: Tensor,
    consume: Consumer,
    *,
    retain: bool,
) -> None:
    """Call `consume` with every b as the backward reaches its use; others are left out."""
    consume = in_callers_context(consume, graph.device)
    # a layer whose input requires a gradient because of a leaf outside the uses is reached only by
    # a second pass
    twice = retain or _has_other_leaves(graph, uses)
    # the first pass asks for b of the uses whose input requires no gradient; hooks see other uses
    first = {i for i, use in enumerate(uses) if use.is_first}
    unmet = set(range(len(uses))) - first

    def meet(i: int, b: Tensor | None) -> None:
        unmet.discard(i)
        if b is not None:
            consume(i, b)

    def capture(which: Sequence[int], keep: bool) -> None:
        if which:
            edges = [uses[i].edge for i in which]
            gradients = torch.autograd.grad(
                graph, edges, cotangent, retain_graph=keep, allow_unused=True
            )
            for i, b in zip(which, gradients, strict=True):
                meet(i, b)

    with ExitStack() as hooks:
        for i in unmet:
            edge = uses[i].edge
            handle = edge.node.register_prehook(lambda b, i=i, k=edge.output_nr: meet(i, b[k]))
            hooks.callback(handle.remove)
        capture(sorted(first), twice)
    if twice or not first:
        capture(sorted(unmet), retain)


def visit_with_gradients(
    graph: Tensor,
    uses: Sequence[RecordedCall],
    roots: Sequence[Tensor],
    cotangent: Tensor,
    consume: Consumer,
) -> list[Tensor | None]:
    """Autograd's gradients of the roots, and every b on the way; the graph is kept."""
    consume = in_callers_context(consume, graph.device)
    copies = [i for i, use in enumerate(uses) if use.call is None]

    with ExitStack() as hooks:
        for i, use in enumerate(uses):
            if use.call is not None:
                node, k = use.edge.node, use.edge.output_nr

                def meet(b: tuple[Tensor | None, ...], i: int = i, k: int = k) -> None:
                    gradient = b[k]
                    if gradient is not None:
                        consume(i, gradient)

                hooks.callback(node.register_prehook(meet).remove)
        leaves: list = [*roots, *(uses[i].edge for i in copies)]
        gradients = torch.autograd.grad(
            graph, leaves, cotangent, retain_graph=True, allow_unused=True
        )
    for i, b in zip(copies, gradients[len(roots) :], strict=True):
        if b is not None:
            consume(i, b)
    return list(gradients[: len(roots)])
