"""The summaries of the committed runs of the demo, which `mts-fast demo` prints beside its own."""

from __future__ import annotations

import json
from pathlib import Path

from mts_fast import demo
from mts_fast.demo.run import COMMITTED

RESULTS = Path(__file__).resolve().parents[1] / "results" / "evidence"


def main() -> None:
    """The command."""
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*/results.json"))]
    rows = {record["data"]: record["summary"] for record in records if "runs" in record}
    path = Path(demo.__file__).with_name(COMMITTED)
    path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
