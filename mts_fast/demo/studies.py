"""`--study NAME`: what moves the result, one thing changed at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from mts_fast._outputs import output_folder
from mts_fast.demo.data.coloured import HELPFUL, KINDS
from mts_fast.demo.figures import draw_study
from mts_fast.demo.jobs import Job, JobResult
from mts_fast.demo.options import OPTIONS
from mts_fast.demo.run import machine, run_jobs
from mts_fast.demo.store import save_json
from mts_fast.demo.summary import standard_error, summarize
from mts_fast.demo.tables import plus_minus, print_table
from mts_fast.demo.training import SETTINGS, Settings

OURS = ("MTS itself", "MTS weights")


@dataclass(frozen=True)
class Variant:
    """Changes of one variant."""

    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    scenario: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """Variants by name, the arms that are trained for each, and what is varied."""

    xlabel: str
    arms: tuple[str, ...]
    variants: Callable[[Settings], dict[str, Variant]]


def _features(_: Settings) -> dict[str, Variant]:
    sets = ("all", "paper", "distribution", "dynamics", "online", "loss")
    return {name: Variant(options={"features": name}) for name in sets}


def _batch_size(settings: Settings) -> dict[str, Variant]:
    """Of MTS alone, at equal steps, and at equal samples (more steps for smaller batches)."""
    variants = {}
    for size in (32, 128, 512):
        variants[f"{size}"] = Variant(options={"batch_size": size})
    steps = settings.steps * settings.batch_size
    for size in (128, 2048):
        changed = {"batch_size": size, "steps": steps // size}
        variants[f"{size}, equal samples"] = Variant(options=changed)
    return variants


def _validation_size(_: Settings) -> dict[str, Variant]:
    return {f"{10 * n}": Variant(scenario={"val_per_class": n}) for n in (2, 3, 6, 10, 20, 50)}


def _bad_share(_: Settings) -> dict[str, Variant]:
    """More and more samples that do not help, kinds otherwise in the usual proportions."""
    variants = {}
    for bad in (0.4, 0.6, 0.8, 0.9, 0.95):
        of_bad = {"colour of its class": 0.625, "wrong label": 0.375}
        shares = [1 - bad if kind in HELPFUL else bad * of_bad[kind] for kind in KINDS]
        variants[f"{100 * bad:.0f} %"] = Variant(scenario={"shares": tuple(shares)})
    return variants


def _selector_every(_: Settings) -> dict[str, Variant]:
    return {f"{k}": Variant(settings={"selector_every": k}) for k in (1, 2, 4, 8)}


def _embeddings(_: Settings) -> dict[str, Variant]:
    names = ("pixels", "validation", "real")
    return {name: Variant(options={"embeddings": name}) for name in names}


# price of a step that computes an eighth of its candidates, relative to one that computes all
# (forwards: 5 of a computed sample, 1 of a candidate), so the share of a batch of equal price
EQUAL_PRICE = (1 + 5 / 8) / 5


def _sampled(settings: Settings) -> dict[str, Variant]:
    """A part of each batch computed, against all of it, and a smaller batch of the least price."""
    size = settings.batch_size
    equal = round(EQUAL_PRICE * size)
    return {
        f"all {size}": Variant(),
        f"{size // 4} of {size}": Variant(settings={"compute": size // 4}),
        f"{size // 8} of {size}": Variant(settings={"compute": size // 8}),
        f"auto of {size}": Variant(settings={"compute": "auto"}),
        f"all {equal}": Variant(options={"batch_size": equal}),
    }


FILTERS = ("filter by validation", "filter twice", "just train twice")
STUDIES = {
    "features": Study("features of the selector", OURS, _features),
    "batch-size": Study("batch size", OURS, _batch_size),
    "validation-size": Study(
        "validation images", ("validation alone", *FILTERS, *OURS), _validation_size
    ),
    "bad-share": Study(
        "share of samples that do not help",
        ("everything + validation", *FILTERS, *OURS),
        _bad_share,
    ),
    "selector-every": Study("steps per selector step", OURS, _selector_every),
    "sampled": Study("computed samples of a batch", OURS, _sampled),
    "embeddings": Study("embeddings of the distribution features", OURS, _embeddings),
}


def run_study(
    name: str, data: str, seeds: Sequence[int], out: Path, root: str | None, steps: int | None
) -> dict[str, dict[str, dict[str, Any]]]:
    """Train every variant for every seed; writes results.json and study.png, prints the table."""
    study = STUDIES[name]
    variants = study.variants(SETTINGS[data])
    shorter = {} if steps is None else {"steps": steps}
    jobs = [
        Job(
            *(data, seed, study.arms),
            variant=f"{name}={label}",
            root=root,
            settings={**variant.settings, **shorter},
            options=variant.options,
            scenario=variant.scenario,
        )
        for label, variant in variants.items()
        for seed in seeds
    ]
    with output_folder("demo", "--out", out):
        results = run_jobs(jobs, out)
        by_variant = {
            label: [r for r in results if r.variant == f"{name}={label}"] for label in variants
        }
        summary = {label: _with_means(summarize(r), r) for label, r in by_variant.items()}
        record = {
            "study": name,
            "data": data,
            "seeds": list(seeds),
            "variants": {label: asdict(variant) for label, variant in variants.items()},
            "options": OPTIONS.get(data, {}),
            "machine": machine(),
            "summary": summary,
            "accuracy": {
                label: [result.accuracy for result in r] for label, r in by_variant.items()
            },
        }
        console = Console()
        try:
            save_json(out / "results.json", record, indent=1)
            lines = {
                arm: [(s[arm]["accuracy"], s[arm]["accuracy_se"] or 0.0) for s in summary.values()]
                for arm in study.arms
            }
            title = f"{data}, {len(seeds)} seeds: mean, two standard errors"
            picture = draw_study(title, study.xlabel, lines, list(variants), out / "study.png")
        finally:  # where the disk has filled up meanwhile, the table is the only output
            print_table(console, *_table(study, data, summary, plus_minus(console)))
    console.print(f"Written to {out}/: results.json, {picture.name}", markup=False)
    return summary


def _with_means(
    rows: dict[str, dict[str, Any]], results: Sequence[JobResult]
) -> dict[str, dict[str, Any]]:
    """The rows of a variant, with means over training: the GSNR, and how many samples of a batch
    were computed, where they were noted."""
    for name in ("gsnr", "computed"):
        curves = [r.curves[name] for r in results if r.curves.get(name)]
        if curves:
            means = [sum(curve) / len(curve) for curve in curves]
            rows["MTS itself"] |= {
                name: sum(means) / len(means),
                f"{name}_se": standard_error(means),
            }
    return rows


def _table(
    study: Study, data: str, summary: dict[str, dict[str, dict[str, Any]]], sign: str
) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows: accuracies of the arms by variant."""
    columns = [study.xlabel, *study.arms]
    gsnr = all("gsnr" in rows.get("MTS itself", {}) for rows in summary.values())
    if gsnr:
        columns.append("GSNR within a batch, mean")
    lines = []
    for label, rows in summary.items():
        line = [label]
        for arm in study.arms:
            error = rows[arm]["accuracy_se"]
            mean = f"{rows[arm]['accuracy']:.1f}"
            line.append(mean if error is None else f"{mean} {sign} {error:.1f}")
        if gsnr:
            line.append(f"{rows['MTS itself']['gsnr']:.3f}")
        lines.append(line)
    return f"{data}: test accuracy % by {study.xlabel}", columns, lines
