"""Why the ghost engine cannot serve a forward, or some of its parameters."""

from __future__ import annotations

from collections.abc import Iterable

from mts_fast.hypergradient.refused import Refused


class Reason(str):
    """Why the parameters of these paths cannot be served."""

    paths: frozenset[str]

    def __new__(cls, paths: Iterable[str], text: str, shown: str | None = None) -> Reason:
        """`shown` stands before the text; all paths, where it is left out."""
        names = frozenset(paths)
        before = ", ".join(sorted(names)) if shown is None else shown
        self = super().__new__(cls, f"{before}{text}")
        self.paths = names
        return self


class Unsupported(Refused):
    """The ghost engine cannot serve this forward; `reasons` say why. Those that concern some
    parameters alone are each a `Reason`."""

    def __init__(self, reasons: Iterable[str]) -> None:
        super().__init__("ghost", list(reasons))
