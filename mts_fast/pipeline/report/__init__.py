"""`mts-fast report`: one page that says whether selection paid, and shows why."""

from mts_fast.pipeline.report.page import write_report

__all__ = ["write_report"]
