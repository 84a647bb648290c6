"""Options of the verbs for folders, lists and data sets: train, recipe, select, score, report."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from mts_fast.cli.app import LARGEST, import_all, verb
from mts_fast.cli.usage import decimal, whole

TRAIN_NEEDS = ("pydantic", "PIL.Image", "rich", "safetensors")
REPORT_NEEDS = (*TRAIN_NEEDS, "captum.attr", "jinja2", "matplotlib.figure")


@verb
def train(
    real: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Real samples: class folders, or a CSV or Parquet."),
    ] = None,
    synthetic: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="Synthetic ones; can be repeated.")
    ] = None,
    val: Annotated[
        str | None, typer.Option(metavar="PATH", help="Clean ones to measure by (split off).")
    ] = None,
    test: Annotated[str | None, typer.Option(metavar="PATH", help="To report by.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Of timm, torchvision, transformers; a folder; package.module:function."),
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(metavar="FILE", help="Weights to start from.")
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="The column of texts in lists.")
    ] = None,
    on_corrupt: Annotated[
        Literal["error", "skip"] | None, typer.Option(help="What to do with damaged files (error).")
    ] = None,
    seed: Annotated[int | None, typer.Option(parser=whole(0, LARGEST), metavar="N")] = None,
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Options: TOML, or a run's config.json."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any option; can be repeated."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME", help="Options of a benchmark: `mts-fast recipe`.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Its samples, as the recipe lays them out.")
    ] = None,
    out: Annotated[str, typer.Option(help="Folder of the run; an interrupted one goes on.")] = (
        "runs/train"
    ),
) -> int:
    """Learn which samples to train on, train with them, and compare with what else one could do."""
    import_all(TRAIN_NEEDS)
    from mts_fast.cli.train import run_train

    options = {
        **{"real": real, "synthetic": synthetic, "val": val, "test": test, "model": model},
        **{"pretrained": pretrained, "text_column": text_column, "on_corrupt": on_corrupt},
        "seed": seed,
    }
    return run_train(options, config, set_ or [], out, recipe, data)


@verb
def recipe(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A recipe; without it, all are listed.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Say what is there, and what is missing.")
    ] = None,
    prepare: Annotated[
        str | None,
        typer.Option(metavar="ORIGINAL", help="Write lists of an original data set into FOLDER."),
    ] = None,
) -> int:
    """Recipes of benchmarks for `mts-fast train`, and whether their data are complete."""
    import_all(TRAIN_NEEDS)
    from mts_fast.cli.recipe import run_recipe

    return run_recipe(name, data, prepare)


RUN = Annotated[str, typer.Argument(metavar="RUN", help="Folder of a finished `mts-fast train`.")]


@verb
def select(
    run: RUN,
    keep: Annotated[
        float | None,
        typer.Option(parser=decimal, metavar="SHARE", help="The best share of synthetic ones."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(parser=decimal, metavar="WEIGHT", help="Those of at least this weight."),
    ] = None,
    per_class: Annotated[
        bool, typer.Option("--per-class", help="The share of each class, instead of all.")
    ] = False,
    with_real: Annotated[
        bool, typer.Option("--real/--no-real", help="With the real samples, too.")
    ] = True,
    out: Annotated[str | None, typer.Option(help="Folder (RUN/selected).")] = None,
) -> int:
    """The samples that a run recommends, as CSV, Parquet and weights of a sampler."""
    import_all(TRAIN_NEEDS)
    from mts_fast.cli.select import run_select

    return run_select(run, keep, threshold, out, per_class=per_class, with_real=with_real)


@verb
def score(
    run: RUN,
    synthetic: Annotated[
        list[str], typer.Option(metavar="PATH", help="New samples; can be repeated.")
    ],
    on_corrupt: Annotated[
        Literal["error", "skip"] | None,
        typer.Option(help="What to do with damaged files (as in the run)."),
    ] = None,
    out: Annotated[str | None, typer.Option(help="The table (RUN/scores.csv).")] = None,
) -> int:
    """Weights of new samples by the selector of a run, without training again."""
    import_all(TRAIN_NEEDS)
    from mts_fast.cli.select import run_score

    return run_score(run, synthetic, out, on_corrupt)


@verb
def report(
    run: RUN,
    out: Annotated[str | None, typer.Option(help="The page (RUN/report.html).")] = None,
) -> int:
    """One page that says whether selection paid, with samples and reasons for their weights."""
    import_all(REPORT_NEEDS)
    from mts_fast.cli.report import run_report

    return run_report(run, out)
