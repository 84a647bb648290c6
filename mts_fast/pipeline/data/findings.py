"""Everything that is wrong or odd about the data, told at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mts_fast._check import fail

# examples in one line; all of them are in the run folder
SHOWN = 10


@dataclass
class Findings:
    """Errors, which stop a run before it trains, and remarks, which do not."""

    errors: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def stop(self, what: str, do: str) -> None:
        """Something that must be mended: what is wrong, and what to do."""
        self.errors.append(f"{what}; {do}")

    def remark(self, what: str) -> None:
        """Something that one may want to know."""
        self.remarks.append(what)

    def raise_errors(self) -> None:
        """Raise where there are errors.

        Raises:
            ValueError: all of them.
        """
        if not self.errors:
            return
        count = "1 problem" if len(self.errors) == 1 else f"{len(self.errors)} problems"
        got = "\n".join([f"{count}:", *(f"- {error}" for error in self.errors)])
        fail(ValueError, "train", "the data", "free of errors", got, "nothing was trained")


def listed(names: Sequence[str]) -> str:
    """Names in one line, the first ones of many, and how many there are."""
    shown = ", ".join(repr(name) for name in names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


def tell_empty(
    option: str, column: str, rows: Sequence[str], findings: Findings, *, skip: bool
) -> None:
    """Rows without a text, by where they stand: they stop the run, or with `skip` are left out."""
    if not rows:
        return
    what = f"{option}: {len(rows)} rows have no {column}: {', '.join(rows)}"
    if skip:
        findings.remark(f"{what}; left out")
    else:
        findings.stop(what, "fill them, or pass --on-corrupt skip")
