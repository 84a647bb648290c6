"""Writes the tables of README.md from the committed results, between `<!-- NAME -->` marks.

`python scripts/tables.py` rewrites; `--check` only says whether anything differs (exit status 1).
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def demo_table(name: str) -> str:
    """The arms of one demo run."""
    record = json.loads((RESULTS / name / "results.json").read_text())
    lines = [
        "| trained on | test accuracy % | AUC of the weights | seconds |",
        "|---|---:|---:|---:|",
    ]
    for arm, row in record["summary"].items():
        auc = "" if row["auc"] is None else f"{row['auc']:.2f} ± {row['auc_spread']:.2f}"
        mean = f"{row['accuracy']:.1f} ± {row['accuracy_spread']:.1f}"
        lines.append(f"| {arm} | {mean} | {auc} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def study_table(name: str) -> str:
    """GSNR by selector batch."""
    rows = json.loads((RESULTS / name / "results.json").read_text())["rows"]
    sizes = " | ".join(str(r["batch_size"]) for r in rows)
    over = " | ".join(f"{r['gsnr_over_draws']:.2f}" for r in rows)
    return f"| selector batch | {sizes} |\n|---|{'---:|' * len(rows)}\n| GSNR | {over} |"


TABLES = {
    "demo-digits": demo_table,
    "demo-fashion": demo_table,
    "study-batch-size-digits": study_table,
}


def render(text: str) -> str:
    """README with every table brought up to date."""
    for name, make in TABLES.items():
        block = f"<!-- {name} -->\n{make(name)}\n<!-- /{name} -->"
        text, count = re.subn(f"<!-- {name} -->.*?<!-- /{name} -->", block, text, flags=re.S)
        if count != 1:
            raise SystemExit(f"README.md must have one block <!-- {name} -->, got {count}")
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = render(old)
    if "--check" in sys.argv:
        raise SystemExit(0 if new == old else "README.md is older than benchmarks/results")
    readme.write_text(new)
