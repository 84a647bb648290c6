"""Writes the tables of the documents from the committed results, between `<!-- NAME -->` marks.

`python benchmarks/tables/documents.py` rewrites the documents; with `--check` it changes nothing
and exits with status 1 where a table differs.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evidence import (
    DATA,
    STUDIES,
    ahead_table,
    demo_table,
    gsnr_table,
    study_table,
    summary_table,
)
from sampled import accuracy_table, gradient_table, price_table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


# rows of bench_step in README.md
SUMMARY = ("plain", "auto, exact", "auto, reuse", "published", "double backward (torch.func)")


def step_table(value: str, shown: tuple[str, ...] = ()) -> Callable[[str], str]:
    """One value of bench_step, arms by models; empty where a model lacks the arm."""

    def make(_: str) -> str:
        models = _runs("step", "bench_step")
        arms = shown or list(max((run["rows"] for run in models.values()), key=len))
        lines = [f"| | {' | '.join(models)} |", f"|---|{'---:|' * len(models)}"]
        for arm in arms:
            values = [run["rows"].get(arm, {}).get(value, "") for run in models.values()]
            cells = [f"{x:.2f}" if isinstance(x, float) else str(x) for x in values]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
        return "\n".join(lines)

    return make


def _ratio(row: dict[str, Any]) -> str:
    return "refused" if "refused" in row else f"{row['time']:.2f}"


def compared_table(_: str) -> str:
    """After / before of a whole step, by model and optimizer; peak memory beside it."""
    rows = json.loads((RESULTS / "step_compared.json").read_text())["rows"]
    split = [tuple(label.split(", ", 2)) for label in rows]
    arms = list(dict.fromkeys(arm for _, _, arm in split))
    lines = [
        f"| | {' | '.join(f'{arm}: time' for arm in arms)} | peak MiB, exact, before → after |",
        f"|---|{'---:|' * (len(arms) + 1)}",
    ]
    for model, optimizer in dict.fromkeys(key[:2] for key in split):
        by_arm = [rows.get(f"{model}, {optimizer}, {arm}") for arm in arms]
        peak = next(row for row in by_arm if row and "peak_mib" in row)["peak_mib"]
        cells = ["" if row is None else _ratio(row) for row in by_arm]
        name = f"{model.replace('_', ' ')}, {optimizer}"
        lines.append(f"| {name} | {' | '.join(cells)} | {peak['before']} → {peak['after']} |")
    return "\n".join(lines)


def worlds_table(_: str) -> str:
    """Verdicts on the random worlds, and the engines that computed them."""
    record = json.loads((RESULTS / "worlds.json").read_text())
    count = record["count"]
    columns = {
        "computed": record["verdicts"]["computed"],
        **{f"by {engine}": n for engine, n in record["engines"].items()},
        "refused by name": record["verdicts"].get("refused", 0),
        "wrong, torn or a raw error": len(record["failures"]),
    }
    shares = [f"{n} ({100 * n / count:.1f} %)" for n in columns.values()]
    head = f"| {count} worlds | {' | '.join(columns)} |"
    return f"{head}\n|---|{'---:|' * len(columns)}\n| | {' | '.join(shares)} |"


def foreign_table(_: str) -> str:
    """Kinds of models by family: engine, share of ghost, error, cost of an exact step."""
    models = _runs("foreign_models", "bench_foreign")
    lines = [
        "| family | model | engine | served by ghost | error | exact step / plain |",
        "|---|---|---|---:|---:|---:|",
    ]
    for name, row in models.items():
        lines.append(
            f"| {row['family']} | {name} | {row['engine']} | {100 * row['ghost share']:.0f} % "
            f"| {row['error']:.0e} | {row['ratios']['exact step']:.2f} |"
        )
    return "\n".join(lines)


def foreign_summary(_: str) -> str:
    """How many kinds ghost serves wholly, their largest error, and the cost by quartiles."""
    rows = _runs("foreign_models", "bench_foreign").values()
    wholly = sum(row["ghost share"] == 1 for row in rows)
    costs = sorted(row["ratios"]["exact step"] for row in rows)
    quartiles = [costs[round(q * (len(costs) - 1))] for q in (0.25, 0.5, 0.75)]
    return (
        f"`ghost` serves {wholly} of {len(rows)} kinds wholly. The largest error is "
        f"{max(row['error'] for row in rows):.0e}; an exact step costs {quartiles[1]:.2f} times a "
        f"plain one in the median (quartiles {quartiles[0]:.2f} and {quartiles[2]:.2f}, "
        f"{costs[0]:.2f} to {costs[-1]:.2f})."
    )


def gradient_norm_table(_: str) -> str:
    """Times of the implementations over that of mts_fast, by model."""
    models = _runs("gradient_norm", "bench_gradient_norm")
    implementations = list(dict.fromkeys(name for run in models.values() for name in run["ratios"]))
    lines = [f"| | {' | '.join(models)} |", f"|---|{'---:|' * len(models)}"]
    for name in implementations:
        values = [run["ratios"].get(name) for run in models.values()]
        cells = ["" if x is None else f"{x:.1f}" for x in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def neighbor_table(value: str) -> Callable[[str], str]:
    """One value of bench_neighbor_statistics with two threads, implementations by pools."""

    def make(_: str) -> str:
        record = json.loads((RESULTS / "neighbor_statistics.json").read_text())
        runs = [row for row in record["rows"] if row.get("threads") == 2]
        implementations = list(max((run[value] for run in runs), key=len))
        heads = [f"{run['N'] // 1024}k x {run['D']}" for run in runs]
        lines = [f"| N x D | {' | '.join(heads)} |", f"|---|{'---:|' * len(runs)}"]
        for name in implementations:
            values = [run[value].get(name, "") for run in runs]
            cells = [f"{x:.2f}" if isinstance(x, float) else str(x) for x in values]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(lines)

    return make


def kernel_table(_: str) -> str:
    """Times of torch over that of each small C++ kernel."""
    lines = ["| op | sizes | reference | best other | C++ GB/s |", "|---|---|---:|---:|---:|"]
    for noun, base in (
        ("virtual_update", "reference"),
        ("cross_entropy", "reference"),
        ("norm_sample_gradients", "reference"),
    ):
        for row in json.loads((RESULTS / f"{noun}.json").read_text())["rows"]:
            rivals = {name: x for name, x in row["ratios"].items() if name not in ("C++", base)}
            best = min(rivals, key=lambda name: rivals[name])
            size = row["name"].partition("[")[2][:-1]
            lines.append(
                f"| {noun} | {size} | {row['ratios'][base]:.1f} "
                f"| {rivals[best]:.2f} ({best}) | {row['GB/s']} |"
            )
    for noun in ("class_centroids", "percentile_rank", "label_agreement"):
        rows = json.loads((RESULTS / f"{noun}.json").read_text())["rows"]
        median = {row["name"].partition("[")[2][:-1]: row for row in rows}
        for name, row in median.items():
            backend, _, size = name.partition("-")
            if backend == "cpp":
                ratio = median[f"reference-{size}"]["median_us"] / row["median_us"]
                lines.append(f"| {noun} | {size} | {ratio:.1f} |  | {row.get('GB/s', '')} |")
    return "\n".join(lines)


def ranks_table(_: str) -> str:
    """A step over several ranks, over the plain step of as many."""
    lines = ["| model | ranks | exact / plain | reuse / plain |", "|---|---:|---:|---:|"]
    for model, run in _runs("data_parallel", "bench_data_parallel").items():
        for ranks, row in run["rows"].items():
            number = ranks.partition(" ")[0]
            lines.append(f"| {model} | {number} | {row['exact']:.2f} | {row['reuse']:.2f} |")
    return "\n".join(lines)


def rank_features_table(_: str) -> str:
    """Processor time of all ranks over that of one process."""
    rows = json.loads((RESULTS / "rank_features.json").read_text())["rows"]
    ratios = {name: ratio for row in rows for name, ratio in row["ratios"].items()}
    lines = ["| ranks | processor time / one process |", "|---:|---:|"]
    lines += [f"| {name.split()[2]} | {ratio:.2f} |" for name, ratio in ratios.items()]
    return "\n".join(lines)


def approximate_features_table(_: str) -> str:
    """Approximate search over exact search: time, recall and error, by pool."""
    rows = json.loads((RESULTS / "approximate_features.json").read_text())["rows"]
    lines = [
        "| samples | classes | recall asked for | time / exact | recall: pool, class "
        "| error: agreement, cosine |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        recall = ", ".join(f"{value:.3f}" for value in row["recall"].values())
        error = ", ".join(f"{value:.1g}" for value in row["error"].values())
        lines.append(
            f"| {row['N']:,} | {row['classes']} | {row['asked']} "
            f"| {row['ratios']['approximate']:.2f} | {recall} | {error} |"
        )
    return "\n".join(lines)


def _runs(noun: str, benchmark: str) -> dict[str, dict]:
    """Model -> the row of one benchmark."""
    rows = json.loads((RESULTS / f"{noun}.json").read_text())["rows"]
    by_model = {row["name"].partition("[")[2][:-1]: row for row in rows if benchmark in row["name"]}
    return {name.replace("_", " "): row for name, row in by_model.items()}


def resource_table(_: str) -> str:
    """Registers and shared memory of the Triton kernels, the largest over all configurations."""
    rows = json.loads((RESULTS / "triton_resources.json").read_text())["rows"]
    lines = [
        "| kernel | configurations | registers sm_80 | sm_90 | shared KiB sm_80 | sm_90 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        configurations = [row for row in rows if row["kernel"] == kernel]
        cells = [str(sum(row["capability"] == 80 for row in configurations))]
        for value, unit in (("registers", 1), ("shared", 1024)):
            for chip in (80, 90):
                of_chip = [row[value] for row in configurations if row["capability"] == chip]
                cells.append(f"{max(of_chip) / unit:.0f}")
        lines.append(f"| {kernel} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {
    "README.md": {"step-summary": step_table("time", SUMMARY), "evidence-summary": summary_table},
    "docs/benchmarks.md": {
        "step-time": step_table("time"),
        "step-memory": step_table("peak_mib"),
        "step-compared": compared_table,
        "worlds": worlds_table,
        "foreign-summary": foreign_summary,
        "foreign-models": foreign_table,
        "gradient-norm": gradient_norm_table,
        "neighbor-statistics": neighbor_table("ratios"),
        "neighbor-memory": neighbor_table("peak_mib"),
        "kernels": kernel_table,
    },
    "docs/evidence.md": {
        "evidence-ahead": ahead_table,
        **dict.fromkeys(DATA, demo_table),
        **dict.fromkeys(STUDIES, study_table),
        "gsnr-coloured-fashion": gsnr_table,
    },
    "docs/sampling.md": {
        "sampled-step": price_table,
        "sampled-gradient": gradient_table,
        "sampled-accuracy": accuracy_table,
    },
    "docs/scaling.md": {
        "data-parallel": ranks_table,
        "rank-features": rank_features_table,
        "approximate-features": approximate_features_table,
    },
    "docs/gpu.md": {"triton-resources": resource_table},
}


def render(document: str, text: str) -> str:
    """A document with every table brought up to date."""
    for name, make in TABLES[document].items():
        block = f"<!-- {name} -->\n{make(name)}\n<!-- /{name} -->"
        text, count = re.subn(f"<!-- {name} -->.*?<!-- /{name} -->", block, text, flags=re.S)
        if count != 1:
            raise SystemExit(f"{document} must have one block <!-- {name} -->, got {count}")
    return text


if __name__ == "__main__":
    stale = []
    for document in TABLES:
        path = ROOT / document
        old = path.read_text()
        new = render(document, old)
        if new != old:
            stale.append(document)
            if "--check" not in sys.argv:
                path.write_text(new)
    if stale and "--check" in sys.argv:
        raise SystemExit(f"older than benchmarks/results: {', '.join(stale)}")
