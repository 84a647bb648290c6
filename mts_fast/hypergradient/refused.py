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
        self.engine = engine
        self.reasons = sorted(set(reasons))
        self.final = final
        hint = "engine='auto' takes one that serves the model"
        super().__init__(
            message
            or f"MTSStep: engine must be able to serve the model, got {engine!r}; "
            f"{'; '.join([*self.reasons, hint])}"
        )
