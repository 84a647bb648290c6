"""Entry point of the command mts-fast."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

DEFAULT_SEEDS = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run one verb; returns the exit status."""
    parser = argparse.ArgumentParser(prog="mts-fast", description=sys.modules["mts_fast"].__doc__)
    parser.add_argument("-v", "--verbose", action="store_true", help="say which engine and backend")
    verbs = parser.add_subparsers(dest="verb", required=True)
    _add_demo(verbs)
    _add_features(verbs)
    doctor = verbs.add_parser("doctor", help="what runs here, and why what does not run does not")
    doctor.add_argument(
        "--model",
        metavar="PACKAGE.MODULE:FACTORY",
        help="which engine serves a model; FACTORY() returns it, or (model, inputs, labels)",
    )
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING)
    try:
        return RUN[arguments.verb](arguments)
    except (OSError, ModuleNotFoundError, TypeError, ValueError) as error:
        message = str(error).removeprefix(f"{arguments.verb}: ")
        print(f"mts-fast {arguments.verb}: {message}", file=sys.stderr)
        return 2


def _add_demo(verbs: argparse._SubParsersAction) -> None:
    demo = verbs.add_parser("demo", help="learn which synthetic images help, on real data")
    demo.add_argument("--data", choices=("digits", "fashion"), default="digits")
    demo.add_argument("--root", help="folder with Fashion-MNIST's IDX files")
    demo.add_argument("--seeds", type=_positive, default=DEFAULT_SEEDS, help="how many seeds")
    demo.add_argument("--first-seed", type=int, default=0)
    demo.add_argument("--steps", type=_positive, help="training steps of every arm")
    demo.add_argument("--out", type=Path, help="folder for results (default runs/demo-DATA)")
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
    features.add_argument("-k", type=_positive, default=3, help="nearest of the class and source")
    features.add_argument("--neighbors", type=_positive, default=5, help="K of label agreement")
    features.add_argument(
        "--small-class",
        choices=("error", "pad"),
        default="error",
        help="where a class has k or fewer samples of a source: stop, or repeat its last cosine",
    )
    features.add_argument("--chunk", type=_positive, help="rows in memory, twice (8192)")
    features.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on with what an interrupted run left in OUT.partial",
    )


def _features(arguments: argparse.Namespace) -> int:
    try:
        import safetensors  # noqa: F401  (asked for before the work, not after it)
    except ModuleNotFoundError as error:
        hint = "install it with pip install 'mts_fast[features]'"
        raise ModuleNotFoundError(f"{error}; {hint}") from error
    from mts_fast.cli.features import run_features

    return run_features(arguments)


def _demo(arguments: argparse.Namespace) -> int:
    try:
        from mts_fast.cli.demo.run import run_demo
        from mts_fast.cli.demo.study import run_batch_size_study
    except ModuleNotFoundError as error:
        hint = "install the demo's packages with pip install 'mts_fast[demo]'"
        raise ModuleNotFoundError(f"{error}; {hint}") from error
    if arguments.study is not None:
        out = arguments.out or Path("runs", f"study-batch-size-{arguments.data}")
        run_batch_size_study(arguments.data, arguments.first_seed, out, arguments.root)
        return 0
    out = arguments.out or Path("runs", f"demo-{arguments.data}")
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    run_demo(arguments.data, seeds, out, arguments.root, arguments.steps)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from mts_fast.cli.doctor import model_report, report

    print(report() if arguments.model is None else model_report(arguments.model))
    return 0


RUN = {"demo": _demo, "doctor": _doctor, "features": _features}


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
