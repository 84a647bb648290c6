"""`mts-fast report`: writes the page of a finished run, and says where it is."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from mts_fast.pipeline.outcome import load_outcome, output_file
from mts_fast.pipeline.report import write_report
from mts_fast.pipeline.report.page import REPORT
from mts_fast.pipeline.report.verdict import arm_rows, verdict


def run_report(run: str, out: str | None) -> int:
    """Write it, and print its first sentence."""
    outcome = load_outcome("report", Path(run))
    with output_file("report", outcome, out, REPORT) as path:
        write_report(outcome, path)
    console = Console()
    console.print(verdict(arm_rows(outcome)), markup=False, highlight=False, soft_wrap=True)
    console.print(f"Written: {path}", markup=False, soft_wrap=True)
    return 0
