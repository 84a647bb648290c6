"""The error of an engine that cannot serve."""

from __future__ import annotations

from collections.abc import Sequence


class Refused(RuntimeError):
    """An engine cannot serve this model or batch; `reasons` say why.

    Where `final`, no other engine could: `engine="auto"` does not go on to the next.
    """

    def __init__(
        self, engine: str, reasons: Sequence[str], *, final: bool = False, message: str = ""
    ) -> None:
        super().__init__(message)
        self.engine = engine
        self.reasons = sorted(set(reasons))
        self.final = final
        self.op = "MTSStep"  # the public function or class that was called
        self._message = message

    def __str__(self) -> str:
        if self._message:
            return self._message
        reasons = "; ".join([*self.reasons, "engine='auto' takes one that serves the model"])
        return f"{self.op}: engine must be able to serve the model, got {self.engine!r}; {reasons}"
