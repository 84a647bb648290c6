"""Entry point of the command mts-fast."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import mts_fast
from mts_fast._check import fail
from mts_fast.cli.doctor import OPTIONAL
from mts_fast.cli.process import INTERRUPTED, interrupts, postponed, tolerant_output
from mts_fast.ops import registry

DEFAULT_SEEDS = 2
# torch counts in int64
LARGEST = 2**63 - 1
# asked for before the demo's work, in the process that is seen
DEMO_NEEDS = ("matplotlib.pyplot", "PIL.ImageFont", "rich", "sklearn.datasets", "sklearn.metrics")
# every seed takes minutes, and has a line in the progress display
MOST_SEEDS = 1000
# what a command line can meet; anything else is a fault of this package and shows its traceback
ERRORS = (OSError, ImportError, TypeError, ValueError, RuntimeError, MemoryError)
# how a failed allocation shows in torch, which has no class for it on the CPU
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")

logger = logging.getLogger("mts_fast")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run one verb; returns the exit status."""
    with tolerant_output() as out, interrupts():
        verb = ""
        try:
            arguments = _parser().parse_args(argv)
            verb = f" {arguments.verb}"
            level = logging.INFO if arguments.verbose else logging.WARNING
            logging.basicConfig(level=level)
            status = RUN[arguments.verb](arguments)
            if out is not None:
                out.flush()
                # a reader that has seen enough is no error, a full disk behind stdout is one
                if out.error is not None and not isinstance(out.error, BrokenPipeError):
                    hint = "free the disk, or let it go elsewhere"
                    fail(OSError, arguments.verb, "standard output", "writable", out.error, hint)
        except KeyboardInterrupt:
            with postponed():
                print(f"mts-fast{verb}: interrupted", file=sys.stderr)
            return INTERRUPTED
        except ERRORS as error:
            with postponed():
                logger.info("where it was raised:", exc_info=error)
                print(f"mts-fast{verb}: {_one_line(error, verb.strip())}", file=sys.stderr)
            return 2
        return status


def _one_line(error: Exception, verb: str) -> str:
    """What went wrong, and what to do."""
    message = " ".join(str(error).split()).removeprefix(f"{verb}: ")
    message = message.replace(
        "use backend 'auto'", f"set {registry.ENVIRONMENT_VARIABLE} to 'auto'"
    )
    if isinstance(error, MemoryError) or any(words in message for words in NO_MEMORY):
        hint = "pass a smaller --chunk, or close other programs"
        hint = hint if verb == "features" else "close other programs"
        return f"memory must be enough, got {message or 'none left'}; {hint}"
    if isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
        if package in OPTIONAL and "pip install" not in message:
            return f"{message}; pip install {OPTIONAL[package][1]}"
    if isinstance(error, RuntimeError) and "; " not in message:
        return f"{message}; `mts-fast -v {verb}` shows where, `mts-fast doctor` what runs here"
    return message


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mts-fast", description=mts_fast.__doc__)
    version = f"mts-fast {mts_fast.__version__}"
    parser.add_argument("--version", action="version", version=version)
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="say which engine and backend; tracebacks"
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    _add_demo(verbs)
    _add_features(verbs)
    doctor = verbs.add_parser("doctor", help="what runs here, and why what does not run does not")
    doctor.add_argument(
        "--model",
        metavar="PACKAGE.MODULE:FACTORY",
        help="which engine serves a model; FACTORY() returns it, or (model, inputs, labels)",
    )
    return parser


def _add_demo(verbs: argparse._SubParsersAction) -> None:
    demo = verbs.add_parser("demo", help="learn which synthetic images help, on real data")
    demo.add_argument("--data", choices=("digits", "fashion"), default="digits")
    demo.add_argument("--root", help="folder with Fashion-MNIST's IDX files")
    demo.add_argument(
        "--seeds", type=_whole(1, MOST_SEEDS), help=f"how many seeds (default {DEFAULT_SEEDS})"
    )
    demo.add_argument("--first-seed", type=_whole(0, LARGEST - MOST_SEEDS), default=0)
    demo.add_argument("--steps", type=_whole(1), help="training steps of every arm")
    demo.add_argument("--out", help="folder for results (default runs/demo-DATA)")
    demo.add_argument(
        "--study", choices=("batch-size",), help="GSNR of the selector gradient against its batch"
    )


def _add_features(verbs: argparse._SubParsersAction) -> None:
    features = verbs.add_parser(
        "features", help="distribution features of a pool of embeddings, as a FeatureTable"
    )
    features.add_argument(
        "embeddings",
        metavar="FILE[:KEY]",
        help="embeddings [N, D] in a .npy, .npz or .safetensors file; KEY names an array in it",
    )
    for name, what in (("labels", "classes [N]"), ("is-synthetic", "0/1 flags [N]")):
        features.add_argument(f"--{name}", required=True, metavar="FILE[:KEY]", help=what)
    features.add_argument("--out", required=True, help="the table: a .safetensors file")
    features.add_argument("-k", type=_whole(1), default=3, help="nearest of the class and source")
    features.add_argument("--neighbors", type=_whole(1), default=5, help="K of label agreement")
    features.add_argument(
        "--small-class",
        choices=("error", "pad"),
        default="error",
        help="where a class has k or fewer samples of a source: stop, or repeat its last cosine",
    )
    features.add_argument("--chunk", type=_whole(1), help="rows in memory, twice (8192)")
    features.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on with what an interrupted run left in OUT.partial",
    )


def _whole(low: int, high: int = LARGEST) -> Callable[[str], int]:
    """A whole number in [low, high], with a message that says so."""

    def number(text: str) -> int:
        expected = f"must be a whole number from {low} to {high}, got {text!r}; pass one in digits"
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(expected) from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(expected)
        return value

    return number


def _features(arguments: argparse.Namespace) -> int:
    import safetensors  # noqa: F401  (asked for before the work, not after it)

    from mts_fast.cli.features import run_features

    return run_features(arguments)


def _demo(arguments: argparse.Namespace) -> int:
    for module in DEMO_NEEDS:
        importlib.import_module(module)
    from mts_fast.cli.demo.run import run_demo
    from mts_fast.cli.demo.study import run_batch_size_study

    if arguments.root is not None and arguments.data != "fashion":
        hint = "leave it out, or pass --data fashion"
        fail(ValueError, "demo", "--root", "given with --data fashion only", "digits", hint)
    if arguments.out == "":
        fail(ValueError, "demo", "--out", "a folder", "an empty name", "name one, or leave it out")
    if arguments.study is not None:
        for flag, value in (("--seeds", arguments.seeds), ("--steps", arguments.steps)):
            if value is not None:
                expected = f"left out with --study {arguments.study}"
                hint = "it has one seed, --first-seed, and steps of its own"
                fail(ValueError, "demo", flag, expected, value, hint)
        out = Path(arguments.out or f"runs/study-batch-size-{arguments.data}")
        run_batch_size_study(arguments.data, arguments.first_seed, out, arguments.root)
        return 0
    out = Path(arguments.out or f"runs/demo-{arguments.data}")
    seeds = range(arguments.first_seed, arguments.first_seed + (arguments.seeds or DEFAULT_SEEDS))
    run_demo(arguments.data, seeds, out, arguments.root, arguments.steps)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from mts_fast.cli.doctor import model_report, report

    print(report() if arguments.model is None else model_report(arguments.model))
    return 0


RUN = {"demo": _demo, "doctor": _doctor, "features": _features}


if __name__ == "__main__":
    raise SystemExit(main())
