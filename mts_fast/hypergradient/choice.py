"""Which engine serves which kind of batch: the explicit one, or for "auto" the first that can.

Decided per layout (modes of the modules, autocast, how the inputs are nested), kept in
`state_dict()`, and changed only by `commit`: a call that fails leaves it as it was.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from mts_fast._check import check_choice, check_positive_int, fail
from mts_fast.hypergradient.double_backward import DoubleBackward
from mts_fast.hypergradient.engine import Engine
from mts_fast.hypergradient.finite_difference import FiniteDifference
from mts_fast.hypergradient.forward_mode import ForwardMode
from mts_fast.hypergradient.ghost import Ghost
from mts_fast.hypergradient.objective import LabelledBatch, Objective
from mts_fast.hypergradient.refused import Refused
from mts_fast.hypergradient.streamed import Streamed

logger = logging.getLogger("mts_fast")

# in the order in which "auto" tries them: by price, and differences, the least exact, last
ENGINES: dict[str, type[Engine]] = {
    e.name: e for e in (Ghost, ForwardMode, DoubleBackward, FiniteDifference)
}
MEMORY = ("fast", "low")


def make_engine(
    name: str, objective: Objective, parameters: Sequence[Tensor], *, memory: str = "fast"
) -> Engine:
    """The engine of that name; its `reasons()` say whether it can serve."""
    if name == Ghost.name:
        return Ghost(objective, parameters, memory=memory)
    return ENGINES[name](objective, parameters)


@dataclass(frozen=True)
class Choice:
    """The engine of one layout, and why."""

    engine: str  # the engine that serves
    calls: int = 0  # in which it was asked for dots
    refusals: tuple[str, ...] = ()  # "engine: reason" of those before it

    def __str__(self) -> str:
        because = f", since {'; '.join(self.refusals)}" if self.refusals else ""
        return f"{self.engine}{because}"


@dataclass
class EngineChoice:
    """The engines of one list of parameters; `name` is "auto" or an engine's."""

    objective: Objective
    parameters: Sequence[Tensor]
    name: str = "auto"
    memory: str = "fast"
    micro_batch: int | None = None
    op: str = "MTSStep"
    across_ranks: bool = False  # batches of one sample are no kind of their own
    _engines: dict[str, Streamed] = field(default_factory=dict)
    _choices: dict[str, Choice] = field(default_factory=dict)  # by digest of the layout
    _pending: dict[str, Choice] = field(default_factory=dict)  # of the call that is under way

    def __post_init__(self) -> None:
        check_choice(self.op, "engine", self.name, ("auto", *ENGINES))
        check_choice(self.op, "memory", self.memory, MEMORY)
        if self.micro_batch is not None:
            check_positive_int(self.op, "micro_batch", self.micro_batch)
        if self.name != "auto":
            why = self._engine(self.name).reasons()
            if why:
                self.refuse("", Refused(self.name, why))

    def engine_for(self, layout: str) -> Engine:
        """The engine that serves a layout, as far as is known before its forward."""
        while True:
            choice = self._choice(layout)
            engine = self._engine(choice.engine)
            why = engine.reasons()
            if not why:
                return engine
            self.refuse(layout, Refused(choice.engine, why))

    def refuse(self, layout: str, refused: Refused) -> None:
        """Go on to the next engine; where there is none, or none may follow, raise."""
        refused.op = self.op
        choice = self._choice(layout)
        reasons = (*choice.refusals, *(f"{refused.engine}: {r}" for r in refused.reasons))
        order = list(ENGINES)
        rest = order[order.index(choice.engine) + 1 :]
        if self.name != "auto" or refused.final:
            raise refused
        if not rest:
            hint = "; ".join((*reasons, "see mts_fast.explain_engine"))
            fail(
                RuntimeError, self.op, "model", "served by an engine", "one that none serves", hint
            )
        self._pending[layout] = replace(choice, engine=rest[0], calls=0, refusals=reasons)

    def calls(self, layout: str) -> int:
        """How often the engine of a layout has been asked for dots."""
        return self._choice(layout).calls

    def is_probing(self, layout: str) -> bool:
        """Whether this call is number 1, 2, 4, 8, ... of its layout and engine."""
        number = self.calls(layout) + 1
        return number & (number - 1) == 0

    def begin(self) -> None:
        """A call begins: what an earlier one left pending is forgotten."""
        self._pending = {}

    def served(self, layout: str) -> None:
        """The engine of the layout gave dots that passed."""
        choice = self._choice(layout)
        self._pending[layout] = replace(choice, calls=choice.calls + 1)

    def commit(self) -> None:
        """The call is complete: keep what it decided, and say what has changed."""
        for layout, choice in self._pending.items():
            before = self._choices.get(layout)
            if before is None or before.engine != choice.engine:
                self._say(choice, first=not self._choices)
        self._choices.update(self._pending)
        self._pending = {}

    def __str__(self) -> str:
        """The engines that have served, and why not those before them."""
        served = dict.fromkeys(map(str, self._choices.values()))
        return f"engine={self.name!r}" + (f" takes {'; or '.join(served)}" if served else "")

    def state_dict(self) -> dict[str, Any]:
        """The choices by layout."""
        return {
            layout: {"engine": c.engine, "calls": c.calls, "refusals": list(c.refusals)}
            for layout, c in self._choices.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over choices; what the call under way has decided stays pending."""
        self._choices = {
            layout: Choice(c["engine"], c["calls"], tuple(c["refusals"]))
            for layout, c in state.items()
            # an engine that was named decides for itself
            if c["engine"] in ENGINES and self.name in ("auto", c["engine"])
        }

    def with_parameters(self, parameters: Sequence[Tensor]) -> EngineChoice:
        """The same for other parameters: nothing is known of them."""
        return EngineChoice(
            self.objective,
            parameters,
            self.name,
            self.memory,
            self.micro_batch,
            self.op,
            self.across_ranks,
        )

    def set_micro_batch(self, micro_batch: int) -> None:
        """Take that many samples at a time from now on."""
        self.micro_batch = micro_batch
        for engine in self._engines.values():
            engine.micro_batch = micro_batch

    def dots(self, batch: LabelledBatch, direction: Sequence[Tensor]) -> Tensor:
        """d_i = <direction, grad l_i> [B] by the first engine that can; leaves no trace."""
        layout = self.layout_of(batch)
        while True:
            engine = self.engine_for(layout)
            try:
                return engine.dots(batch, direction)
            except Refused as refused:
                self.refuse(layout, refused)

    def layout_of(self, batch: LabelledBatch) -> str:
        """A digest of what the choice depends on."""
        kind = repr(
            (
                self.objective.kind(batch.inputs, single=not self.across_ranks),
                str(batch.labels.dtype),
            )
        )
        return hashlib.blake2b(kind.encode(), digest_size=8).hexdigest()

    def _choice(self, layout: str) -> Choice:
        first = next(iter(ENGINES)) if self.name == "auto" else self.name
        return self._pending.get(layout) or self._choices.get(layout) or Choice(first)

    def _engine(self, name: str) -> Engine:
        if name not in self._engines:
            inner = make_engine(name, self.objective, self.parameters, memory=self.memory)
            self._engines[name] = Streamed(inner, self.micro_batch)
        return self._engines[name]

    def _say(self, choice: Choice, *, first: bool) -> None:
        level = logging.INFO if first or not choice.refusals else logging.WARNING
        logger.log(level, "%s: engine=%r takes %s", self.op, self.name, choice)
