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

    def raise_errors(self, op: str = "train", hint: str = "nothing was trained") -> None:
        """Raise where there are errors.

        Raises:
            ValueError: all of them.
        """
        if not self.errors:
            return
        count = counted(len(self.errors), "problem")
        got = "\n".join([f"{count}:", *(f"- {error}" for error in self.errors)])
        fail(ValueError, op, "the data", "free of errors", got, hint)


def counted(count: int, noun: str) -> str:
    """A number of things: `1 file`, `2 files`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


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
    have = "has" if len(rows) == 1 else "have"
    what = f"{option}: {counted(len(rows), 'row')} {have} no {column}: {', '.join(rows)}"
    if skip:
        findings.remark(f"{what}; left out")
    else:
        findings.stop(what, "fill them, or pass --on-corrupt skip")
