"""Options of the verbs demo, features, tune, bench and doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mts_fast.cli.app import LARGEST, import_all, verb
from mts_fast.cli.usage import decimal, whole

DEFAULT_SEEDS = 4
# no setting was chosen on seeds from here on
DEFAULT_FIRST_SEED = 400
# imported before the demo's work, so that the main process reports what is missing
DEMO_NEEDS = ("matplotlib.pyplot", "PIL.ImageFont", "rich", "sklearn.datasets", "sklearn.metrics")
BENCH_NEEDS = ("pytest_benchmark",)
# every seed takes minutes, and has a line in the progress display
MOST_SEEDS = 1000


@verb
def demo(
    data: Annotated[
        Literal["coloured-digits", "coloured-fashion", "digits", "fashion"],
        typer.Option(
            help="coloured-*: a spurious correlation; others: planted failures of generators."
            " fashion needs Fashion-MNIST's files."
        ),
    ] = "coloured-digits",
    root: Annotated[str | None, typer.Option(help="Folder of Fashion-MNIST's files.")] = None,
    seeds: Annotated[
        int | None,
        typer.Option(parser=whole(1, MOST_SEEDS), metavar="N", help="How many seeds (4)."),
    ] = None,
    first_seed: Annotated[
        int, typer.Option(parser=whole(0, LARGEST - MOST_SEEDS), metavar="N", help="The first.")
    ] = DEFAULT_FIRST_SEED,
    steps: Annotated[
        int | None,
        typer.Option(parser=whole(1, LARGEST), metavar="N", help="Of each training."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            help="Folder for results (runs/demo-DATA, runs/study-STUDY-DATA); goes on there."
        ),
    ] = None,
    study: Annotated[
        Literal[
            "features",
            "batch-size",
            "validation-size",
            "bad-share",
            "selector-every",
            "embeddings",
            "sampled",
            "gsnr",
            "sampled-gradient",
        ]
        | None,
        typer.Option(help="What moves the result, instead of the comparison of arms."),
    ] = None,
) -> int:
    """Learn which synthetic images help, where labels alone do not tell; against what else one
    could do."""
    import_all(DEMO_NEEDS)
    from mts_fast._check import fail
    from mts_fast.demo.gsnr import run_gsnr_study
    from mts_fast.demo.run import run_demo
    from mts_fast.demo.sampled_gradient import run_gradient_study
    from mts_fast.demo.studies import run_study

    if root is not None and not data.endswith("fashion"):
        hint = "leave it out, or pass --data coloured-fashion or fashion"
        fail(ValueError, "demo", "--root", "given with data of Fashion-MNIST only", data, hint)
    if out == "":
        fail(ValueError, "demo", "--out", "a folder", "an empty name", "name one, or leave it out")
    of_all_data = ("gsnr", "sampled", "sampled-gradient")
    if study is not None and study not in of_all_data and not data.startswith("coloured"):
        hint = "pass --data coloured-digits or coloured-fashion"
        fail(ValueError, "demo", "--data", f"coloured with --study {study}", data, hint)
    chosen = range(first_seed, first_seed + (seeds or DEFAULT_SEEDS))
    folder = Path(out or f"runs/{'demo' if study is None else f'study-{study}'}-{data}")
    if study in ("gsnr", "sampled-gradient"):
        for flag, value in (("--seeds", seeds), ("--steps", steps)):
            if value is not None:
                expected = f"left out with --study {study}"
                hint = "it has one seed, --first-seed, and steps of its own"
                fail(ValueError, "demo", flag, expected, value, hint)
        measure = run_gsnr_study if study == "gsnr" else run_gradient_study
        measure(data, first_seed, folder, root)
    elif study is not None:
        run_study(study, data, chosen, folder, root, steps)
    else:
        run_demo(data, chosen, folder, root, steps)
    return 0


FILE = "FILE[:KEY]"


@verb
def features(
    embeddings: Annotated[
        str,
        typer.Argument(
            metavar=FILE,
            help="Embeddings [N, D]: .npy, .npz or .safetensors; KEY names an array in it.",
        ),
    ],
    labels: Annotated[str, typer.Option(metavar=FILE, help="Classes [N].")],
    is_synthetic: Annotated[str, typer.Option(metavar=FILE, help="0/1 flags [N].")],
    out: Annotated[str, typer.Option(help="The table: a .safetensors file.")],
    k: Annotated[
        int,
        typer.Option("-k", parser=whole(1, LARGEST), metavar="N", help="Nearest of a source."),
    ] = 3,
    neighbors: Annotated[
        int, typer.Option(parser=whole(1, LARGEST), metavar="N", help="K of the label agreement.")
    ] = 5,
    small_class: Annotated[
        Literal["error", "pad"],
        typer.Option(help="Where a class has k samples of a source or fewer: stop, or repeat."),
    ] = "error",
    chunk: Annotated[
        int | None,
        typer.Option(parser=whole(1, LARGEST), metavar="N", help="Rows in memory, twice (8192)."),
    ] = None,
    search: Annotated[
        Literal["exact", "approximate"],
        typer.Option(help="All pairs; or by faiss, for pools where that takes too long."),
    ] = "exact",
    recall: Annotated[
        float, typer.Option(parser=decimal, metavar="SHARE", help="Of an approximate search.")
    ] = 0.95,
    seed: Annotated[
        int, typer.Option(parser=whole(0, LARGEST), metavar="N", help="Of an approximate search.")
    ] = 0,
    exact_below: Annotated[
        int,
        typer.Option(
            parser=whole(0, LARGEST), metavar="N", help="Smaller pools and classes: all pairs."
        ),
    ] = 100_000,
    resume: Annotated[
        bool, typer.Option(help="Go on with what an interrupted run left in OUT.partial.")
    ] = True,
) -> int:
    """Distribution features of a pool of embeddings, as a FeatureTable."""
    import safetensors  # noqa: F401  (a missing package is reported before the work, not after it)

    from mts_fast.cli.features import FeaturesOptions, run_features

    options = FeaturesOptions(
        *(embeddings, labels, is_synthetic, out, k, neighbors, small_class, chunk),
        *(search, recall, seed, exact_below, resume),
    )
    return run_features(options)


@verb
def tune(
    from_: Annotated[
        str | None,
        typer.Option("--from", metavar="FILE", help="Requests of mts_fast.record_requests."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE.MODULE:FACTORY",
            help="Or the requests of a step of a model; FACTORY() returns (model, inputs, labels).",
        ),
    ] = None,
    optimizer: Annotated[
        Literal["adamw", "sgd"] | None, typer.Option(help="With --model: its optimizer (adamw).")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="To time on (cuda where there is one, else cpu).")
    ] = None,
    again: Annotated[bool, typer.Option(help="Time anew what was timed before.")] = False,
) -> int:
    """Time the kernels on this machine: later runs take those that win (backend "auto")."""
    from mts_fast.cli.tune import run_tune

    return run_tune(from_, model, optimizer, device, again)


@verb
def bench(
    name: Annotated[
        str | None, typer.Argument(help="Which benchmark; without one they are listed.")
    ] = None,
    checkout: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Where benchmarks/ is."),
    ] = None,
) -> int:
    """Run a committed benchmark on this machine, and compare its ratios with the record."""
    import_all(BENCH_NEEDS)
    from mts_fast.cli.bench import run_bench

    return run_bench(name, checkout)


@verb
def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE.MODULE:FACTORY",
            help="Which engine serves a model; FACTORY() returns it, or (model, inputs, labels).",
        ),
    ] = None,
) -> int:
    """What runs here, and reasons for what does not."""
    from mts_fast.cli.doctor import model_report, report

    print(report() if model is None else model_report(model))
    return 0
