"""Samples of a run: read from folders or lists, and checked together before anything runs."""

from mts_fast.pipeline.data.findings import Findings
from mts_fast.pipeline.data.samples import ROLES, Role, Samples

__all__ = ["ROLES", "Findings", "Role", "Samples"]
