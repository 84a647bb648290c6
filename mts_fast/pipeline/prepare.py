"""From the sources of a run to inputs, labels and members of every role, all checked."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from PIL import Image
from rich.progress import Progress
from torch import Tensor

from mts_fast.pipeline.config import Config
from mts_fast.pipeline.data import ROLES, Findings, Role, Samples
from mts_fast.pipeline.data.checks import (
    list_of_classes,
    read_all,
    split_validation,
    tell_copies,
)
from mts_fast.pipeline.inputs import Images, Inputs
from mts_fast.pipeline.pixels import open_pixels, pixels_key, write_pixels
from mts_fast.pipeline.sources import read_sources
from mts_fast.pipeline.tokens import tokenize

LARGEST_SIZE = 224


@dataclass(frozen=True)
class Prepared:
    """The data of a run; members index `inputs` and `labels`."""

    samples: dict[Role, Samples]
    classes: tuple[str, ...]
    inputs: Inputs
    labels: Tensor
    members: dict[Role, Tensor]
    key: str  # of the content: of every sample, its label and its role, in order


def prepare(config: Config, out: Path, findings: Findings, progress: Progress) -> Prepared:
    """Read, check and decode everything.

    Raises:
        ValueError: what is wrong with the data, all of it.
    """
    samples = read_sources(config, findings)
    findings.raise_errors()
    classes = list_of_classes(samples, findings)
    task = progress.add_task("checking", total=sum(map(len, samples.values())))
    skip = config.on_corrupt == "skip"
    samples, hashes = read_all(samples, findings, lambda n: progress.advance(task, n), skip=skip)
    findings.raise_errors()
    if "val" not in samples:
        real, val = split_validation(samples["real"], config.val_share, config.seed, findings)
        if not val:
            what = "no --val, and no class of the real samples has two to split one off"
            findings.stop(what, "pass a validation set")
        samples = {**samples, "real": real, "val": val}
    tell_copies(samples, hashes, findings)
    findings.raise_errors()
    samples = {role: samples[role] for role in ROLES if role in samples}
    training = len(samples["real"]) + len(samples["synthetic"])
    if config.batch_size > training:
        findings.remark(
            f"batch_size {config.batch_size} is more than the {training} training samples: every"
            " batch is all of them"
        )
    labels = torch.tensor(
        [classes.index(label) for of_role in samples.values() for label in of_role.labels]
    )
    members, start = {}, 0
    for role, of_role in samples.items():
        members[role] = torch.arange(start, start + len(of_role))
        start += len(of_role)
    inputs, content = _inputs(config, samples, hashes, out, findings, progress)
    roles = [role for role, of_role in samples.items() for _ in of_role.names]
    text = "\n".join(map(str, [content, *classes, *labels.tolist(), *roles]))
    key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return Prepared(samples, classes, inputs, labels, members, key)


def _inputs(
    config: Config,
    samples: dict[Role, Samples],
    hashes: dict[Path, str],
    out: Path,
    findings: Findings,
    progress: Progress,
) -> tuple[Inputs, str]:
    """Inputs of all roles, one after the other, and a name of their content."""
    contents = list(chain.from_iterable(of_role.contents for of_role in samples.values()))
    texts = [content for content in contents if isinstance(content, str)]
    if texts:
        inputs = tokenize(config.model, texts, config.max_tokens, findings)
        digest = hashlib.sha256(inputs.ids.numpy().tobytes() + inputs.mask.numpy().tobytes())
        return inputs, digest.hexdigest()
    paths = [content for content in contents if isinstance(content, Path)]
    size = config.image_size or _usual_size(paths)
    key = pixels_key([hashes[path] for path in paths], size)
    file = out / "stages" / f"pixels-{key}.npy"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        task = progress.add_task("decoding", total=len(paths))
        advance: Callable[[int], None] = lambda n: progress.advance(task, n)  # noqa: E731
        write_pixels(paths, size, file, config.workers, advance)
    return Images(open_pixels(file), config), key


def _usual_size(paths: list[Path]) -> int:
    """The median of the shorter sides, up to LARGEST_SIZE."""
    sides = []
    for path in paths:
        with Image.open(path) as image:
            sides.append(min(image.size))
    return min(LARGEST_SIZE, int(statistics.median(sides)))
