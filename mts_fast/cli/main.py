"""Entry point of the command mts-fast. Nothing here imports torch: `--help` answers at once."""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.exceptions import TyperException

from mts_fast._process import INTERRUPTED, interrupts, postponed, tolerant_output
from mts_fast._version import __version__
from mts_fast.cli.packages import hint_for
from mts_fast.cli.usage import usage_message, whole

DEFAULT_SEEDS = 4
# no setting was chosen on seeds from here on
DEFAULT_FIRST_SEED = 400
# torch counts in int64
LARGEST = 2**63 - 1
# imported before the demo's work, so that the main process reports what is missing
DEMO_NEEDS = ("matplotlib.pyplot", "PIL.ImageFont", "rich", "sklearn.datasets", "sklearn.metrics")
TRAIN_NEEDS = ("pydantic", "PIL.Image", "rich", "safetensors")
# every seed takes minutes, and has a line in the progress display
MOST_SEEDS = 1000
# what a command line can meet; anything else is a fault of this package and shows its traceback
ERRORS = (OSError, ImportError, TypeError, ValueError, RuntimeError, MemoryError)
# how a failed allocation shows in torch, which has no class for it on the CPU
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")

logger = logging.getLogger("mts_fast")
VERBS: list[str] = []
app = typer.Typer(name="mts-fast", no_args_is_help=True, pretty_exceptions_enable=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run one verb; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    verb = next((word for word in words if word in VERBS), "")
    name = f"mts-fast {verb}".strip()
    if verb and "--help" not in words:
        # outside of the handlers below: an exception in the middle of some imports would be lost
        importlib.import_module("mts_fast.training")
    with tolerant_output() as out, interrupts():
        try:
            command = typer.main.get_command(app)
            status = command.main(args=words, prog_name="mts-fast", standalone_mode=False) or 0
            if out is not None:
                out.flush()
                # a reader that closes the pipe is no error, a full disk behind stdout is one
                if out.error is not None and not isinstance(out.error, BrokenPipeError):
                    raise OSError(
                        f"{verb}: standard output must be writable, got {out.error}; free the disk,"
                        " or let it go elsewhere"
                    )
        except (KeyboardInterrupt, _Interrupted):
            with postponed():
                print(f"{name}: interrupted", file=sys.stderr)
            return INTERRUPTED
        except TyperException as error:
            with postponed():
                print(f"{name}: {usage_message(error, VERBS, name)}", file=sys.stderr)
            return 2
        except ERRORS as error:
            with postponed():
                logger.info("where it was raised:", exc_info=error)
                print(f"{name}: {_one_line(error, verb)}", file=sys.stderr)
            return 2
        return int(status)


def _one_line(error: Exception, verb: str) -> str:
    """What went wrong, and what to do."""
    message = " ".join(str(error).split()).removeprefix(f"{verb}: ")
    message = message.replace("use backend 'auto'", "set MTS_FAST_BACKEND to 'auto'")
    if isinstance(error, MemoryError) or any(words in message for words in NO_MEMORY):
        hint = "pass a smaller --chunk, or close other programs"
        hint = hint if verb == "features" else "close other programs"
        return f"memory must be enough, got {message or 'none left'}; {hint}"
    if isinstance(error, ImportError):
        hint = hint_for((error.name or "").partition(".")[0])
        if hint and "pip install" not in message:
            return f"{message}; {hint}"
    if isinstance(error, RuntimeError) and "; " not in message:
        return f"{message}; `mts-fast -v {verb}` shows where, `mts-fast doctor` what runs here"
    return message


class _Interrupted(Exception):
    """Ctrl-C in a verb; Typer would take a KeyboardInterrupt for an exit without a message."""


def _verb(run: Callable[..., int]) -> Callable[..., int]:
    """Registers a verb."""

    @functools.wraps(run)
    def interruptible(*args: Any, **kwargs: Any) -> int:
        try:
            return run(*args, **kwargs)
        except KeyboardInterrupt:
            raise _Interrupted from None

    VERBS.append(run.__name__)
    app.command()(interruptible)
    return run


def _print_version(asked: bool) -> None:
    if asked:
        print(f"mts-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Say which engine and backend; tracebacks.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it and end."),
    ] = False,
) -> None:
    """Learn which training data to use (MTS), fast, on any torch model."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING)


@_verb
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
            "gsnr",
        ]
        | None,
        typer.Option(help="What moves the result, instead of the comparison of arms."),
    ] = None,
) -> int:
    """Learn which synthetic images help, where labels alone do not tell; against what else one
    could do."""
    for module in DEMO_NEEDS:
        importlib.import_module(module)
    from mts_fast._check import fail
    from mts_fast.demo.gsnr import run_gsnr_study
    from mts_fast.demo.run import run_demo
    from mts_fast.demo.studies import run_study

    if root is not None and not data.endswith("fashion"):
        hint = "leave it out, or pass --data coloured-fashion or fashion"
        fail(ValueError, "demo", "--root", "given with data of Fashion-MNIST only", data, hint)
    if out == "":
        fail(ValueError, "demo", "--out", "a folder", "an empty name", "name one, or leave it out")
    if study is not None and study != "gsnr" and not data.startswith("coloured"):
        hint = "pass --data coloured-digits or coloured-fashion"
        fail(ValueError, "demo", "--data", f"coloured with --study {study}", data, hint)
    chosen = range(first_seed, first_seed + (seeds or DEFAULT_SEEDS))
    folder = Path(out or f"runs/{'demo' if study is None else f'study-{study}'}-{data}")
    if study == "gsnr":
        for flag, value in (("--seeds", seeds), ("--steps", steps)):
            if value is not None:
                expected = f"left out with --study {study}"
                hint = "it has one seed, --first-seed, and steps of its own"
                fail(ValueError, "demo", flag, expected, value, hint)
        run_gsnr_study(data, first_seed, folder, root)
    elif study is not None:
        run_study(study, data, chosen, folder, root, steps)
    else:
        run_demo(data, chosen, folder, root, steps)
    return 0


@_verb
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
        str | None, typer.Option(metavar="FILE", help="A TOML file of options.")
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
    for module in TRAIN_NEEDS:
        importlib.import_module(module)
    from mts_fast.cli.train import run_train

    options = {
        **{"real": real, "synthetic": synthetic, "val": val, "test": test, "model": model},
        **{"pretrained": pretrained, "text_column": text_column, "on_corrupt": on_corrupt},
        "seed": seed,
    }
    return run_train(options, config, set_ or [], out, recipe, data)


@_verb
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
    for module in TRAIN_NEEDS:
        importlib.import_module(module)
    from mts_fast.cli.recipe import run_recipe

    return run_recipe(name, data, prepare)


FILE = "FILE[:KEY]"


@_verb
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
    resume: Annotated[
        bool, typer.Option(help="Go on with what an interrupted run left in OUT.partial.")
    ] = True,
) -> int:
    """Distribution features of a pool of embeddings, as a FeatureTable."""
    import safetensors  # noqa: F401  (a missing package is reported before the work, not after it)

    from mts_fast.cli.features import FeaturesOptions, run_features

    options = FeaturesOptions(
        embeddings, labels, is_synthetic, out, k, neighbors, small_class, chunk, resume
    )
    return run_features(options)


@_verb
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


if __name__ == "__main__":
    raise SystemExit(main())
