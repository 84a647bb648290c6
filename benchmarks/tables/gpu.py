"""Tables of the GPU benchmarks' records in a folder.

`python benchmarks/tables/gpu.py FOLDER` prints markdown and writes it to FOLDER/table.md. A ratio
is a rival's time over ours: below 1 we lose.
"""

import json
import sys
from pathlib import Path

# the nouns of bench_<noun>.py
KERNELS = (
    *("cross_entropy", "linear_cross_entropy", "virtual_update", "hypergradient_dot"),
    "norm_sample_gradients",
)
STEPS, TUNING = "step", "tune"
# what roofline.py reports of a step
ROOFLINE = ("GB", "GB/s", "TFLOP", "TFLOP/s", "roof ms", "% of roof", "% of roof by bytes")
OURS = "triton"


def table(heads: list[str], rows: list[list[object]]) -> str:
    """Markdown table; None gives an empty cell."""
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        lines.append(f"| {' | '.join('' if cell is None else str(cell) for cell in row)} |")
    return "\n".join(lines)


def kernel_table(record: dict) -> str:
    """A row for each kernel, size and dtype; a column for each rival."""
    rows = record["rows"]
    implementations = dict.fromkeys(name for row in rows for name in row["ratios"])
    rivals = [name for name in implementations if name != OURS]
    heads = ["kernel", "size", "dtype", "us", "GB/s", "% of copy", "TFLOP/s", "% of product"]
    heads += ["MiB", "best rival / ours", "with the host"]
    heads += [f"{rival} / ours (MiB)" for rival in rivals]
    return table(heads, [_kernel_row(row, rivals) for row in rows])


def _kernel_row(row: dict, rivals: list[str]) -> list[object]:
    rates = [row.get(name) for name in ("GB/s", "% of copy", "TFLOP/s", "% of product")]
    ours = [row["kernel"], row["size"], row["dtype"], row["us"][OURS], *rates]
    host = row["ratios with the host"]
    best = [min(ratios[r] for r in rivals if r in ratios) for ratios in (row["ratios"], host)]
    cells = [
        f"{row['ratios'][r]} ({row['peak_mib'][r]})" if r in row["ratios"] else None for r in rivals
    ]
    return [*ours, row["peak_mib"][OURS], *best, *cells]


def step_table(record: dict) -> str:
    """A row for each model, batch, precision and arm."""
    rows = []
    for run in record["rows"]:
        arms = run["rows"]
        published = arms["published"].get("ms")
        for label, arm in arms.items():
            faster = round(published / arm["ms"], 2) if published and "ms" in arm else None
            values = [arm.get(name) for name in ("ms", "time")]
            rest = [faster, arm.get("peak_mib"), *map(arm.get, ROOFLINE), arm.get("gap")]
            rows.append([run["model"], run["batch"], run["precision"], label, *values, *rest])
    heads = ["model", "batch", "precision", "step", "ms", "time, plain = 1", "published / this"]
    return table([*heads, "peak MiB", *ROOFLINE, "gap to exact, reference"], rows)


def tuning_table(record: dict) -> str:
    """The setting in the source against the best that was tried."""
    heads = ["kernel", "size", "dtype", "in the source", "best", "in the source / best", "failed"]
    names = ["kernel", "size", "dtype", "now", "best", "now / best"]
    rows = [[*(row[n] for n in names), ", ".join(row["failed"]) or None] for row in record["rows"]]
    return table(heads, rows)


def copies(record: dict) -> str:
    """The rates that the percentages refer to."""
    names = ("copy GB/s", "product TFLOP/s")
    ceilings = [
        f"{row['dtype']} {name}: {row[name]}"
        for name in names
        for row in record["rows"]
        if name in row
    ]
    return "; ".join(dict.fromkeys(ceilings))


def step_ceilings(record: dict) -> str:
    """The rates of which the steps' roofs are made, by the precision of an arm."""
    arms = [arm for run in record["rows"] for arm in run["rows"].values() if "roof ms" in arm]
    products = [
        f"{dtype} product TFLOP/s in {arm['precision']}: {rate}"
        for arm in arms
        for dtype, rate in arm["product TFLOP/s"].items()
    ]
    copied = [f"copy GB/s: {arm['copy GB/s']}" for arm in arms]
    return "; ".join(dict.fromkeys([*copied, *products]))


def render(folder: Path) -> str:
    """All records in the folder, each under a heading."""
    parts = ["A ratio over 1 means that ours is faster, one below 1 that it loses."]
    makers = dict.fromkeys(KERNELS, kernel_table) | {STEPS: step_table, TUNING: tuning_table}
    for noun, make in makers.items():
        path = folder / f"{noun}.json"
        if not path.exists():
            parts.append(f"## {noun}\n\nnot measured")
            continue
        record = json.loads(path.read_text())
        about = [f"{record['command']}, {record['machine']}."]
        if noun in KERNELS:
            about.append(f"Ceilings: {copies(record)}.")
        if noun == STEPS:
            about.append(f"Ceilings: {step_ceilings(record)}.")
        parts.append(f"## {noun}\n\n{' '.join(about)}\n\n{make(record)}")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    text = render(folder)
    (folder / "table.md").write_text(text)
    print(text)
