"""From the sources of a run to inputs, labels and members of every role, all checked."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from mts_fast._check import fail
from mts_fast._files import replaced_file, writing
from mts_fast.pipeline.config import Config
from mts_fast.pipeline.data import ROLES, Findings, Role, Samples
from mts_fast.pipeline.data.checks import (
    list_of_classes,
    split_validation,
    tell_copies,
    tell_unreadable,
)
from mts_fast.pipeline.decode import (
    UnreadableFiles,
    known_unreadable,
    open_pixels,
    pixels_key,
    remember_unreadable,
    scan,
    write_pixels,
)
from mts_fast.pipeline.inputs import Images, Inputs
from mts_fast.pipeline.sources import read_sources
from mts_fast.pipeline.team import Team
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
    store: Path  # in the run's folder: the pixels (.npy), or the texts (.json)
    copies: list[tuple[str, str]]

    def without_samples(self) -> Prepared:
        """What other processes need: no names and files, and no pixels, which they open."""
        inputs: Any = None if isinstance(self.inputs, Images) else self.inputs
        return replace(self, samples={}, copies=[], inputs=inputs)

    def opened(self, config: Config) -> Prepared:
        """The same with its pixels.

        Raises:
            FileNotFoundError: the first process's file is not here.
        """
        if self.inputs is not None:
            return self
        if not self.store.exists():
            got = f"no file {str(self.store)!r} on one of its hosts"
            hint = "name a folder on a shared file system"
            fail(FileNotFoundError, "train", "--out", "a folder that every rank sees", got, hint)
        return replace(self, inputs=Images(open_pixels(self.store), config))


@dataclass(frozen=True)
class Content:
    """Samples that can be read, role by role, with a hash of each, and their inputs."""

    samples: dict[Role, Samples]
    hashes: dict[Role, list[str]]
    inputs: Inputs
    key: str
    store: Path


def prepare(config: Config, out: Path, findings: Findings, progress: Progress) -> Prepared:
    """Read, check and decode everything.

    Raises:
        ValueError: what is wrong with the data, all of it.
    """
    samples = read_sources(config, findings)
    findings.raise_errors()
    classes = list_of_classes(samples, findings)
    stages = out / "stages"
    samples = {role: samples[role] for role in ROLES if role in samples}
    content = read_content(config, samples, stages, findings, progress)
    members, start = {}, 0
    for role, of_role in content.samples.items():
        members[role] = torch.arange(start, start + len(of_role))
        start += len(of_role)
    labels = torch.tensor(
        [classes.index(label) for part in content.samples.values() for label in part.labels]
    )
    samples, hashes = dict(content.samples), dict(content.hashes)
    if "val" not in samples:
        real = samples["real"]
        chosen = split_validation(real, config.val_share, config.seed, findings)
        findings.raise_errors()
        others = sorted({*range(len(real))} - {*chosen})
        samples |= {"real": real.only(others), "val": replace(real.only(chosen), role="val")}
        for role, indices in (("val", chosen), ("real", others)):
            members[role] = members["real"][indices]
            hashes[role] = [content.hashes["real"][i] for i in indices]
    copies = tell_copies(samples, hashes, findings)
    training = len(samples["real"]) + len(samples["synthetic"])
    if config.batch_size > training:
        findings.remark(
            f"batch_size {config.batch_size} is more than the {training} training samples: every"
            " batch is all of them"
        )
    key = _digest([content.key, *classes, *labels.tolist(), *_roles(members, len(labels))])
    return Prepared(samples, classes, content.inputs, labels, members, key, content.store, copies)


def prepare_together(
    config: Config, out: Path, findings: Findings, progress: Progress, team: Team
) -> Prepared:
    """`prepare` by the first process; the others have all but the names and files of samples."""
    whole: list[Prepared] = []

    def lead() -> Prepared:
        whole.append(prepare(config, out, findings, progress))
        return whole[0].without_samples()

    sent = team.led(lead)
    return team.together(lambda: whole[0] if team.leads else sent.opened(config))


def read_content(
    config: Config,
    samples: dict[Role, Samples],
    folder: Path,
    findings: Findings,
    progress: Progress,
) -> Content:
    """Decode or tokenize everything; what is kept of it lies in `folder`.

    Raises:
        ValueError: what is wrong with the data so far, all of it.
    """
    if config.text_column is None:
        return _read_images(config, samples, folder, findings, progress)
    return _read_texts(config, samples, folder, findings)


def _read_images(
    config: Config,
    samples: dict[Role, Samples],
    stages: Path,
    findings: Findings,
    progress: Progress,
) -> Content:
    """Decode all pictures at one size; a file that is none leaves no trace in the result."""
    places = [(role, i) for role, of_role in samples.items() for i in range(len(of_role))]
    files: list[Any] = list(chain.from_iterable(part.contents for part in samples.values()))
    scanned = scan(files, _advance(progress, "reading", len(files)))
    unreadable = known_unreadable(stages)
    reasons = {
        n: one.error or unreadable[one.sha256]
        for n, one in enumerate(scanned)
        if one.error or one.sha256 in unreadable
    }
    skip = config.on_corrupt == "skip"
    while True:
        readable = [n for n in range(len(files)) if n not in reasons]
        hashes = [scanned[n].sha256 for n in readable]
        size = config.image_size or _usual_size([scanned[n].side or 1 for n in readable])
        key = pixels_key(hashes, size)
        file = stages / f"pixels-{key}.npy"
        if file.exists() or not readable:
            break
        advance = _advance(progress, "decoding", len(readable))
        try:
            write_pixels([files[n] for n in readable], size, file, config.workers, advance)
        except UnreadableFiles as error:
            new = {readable[i]: reason for i, reason in error.reasons.items()}
            reasons |= new
            if not skip:
                break
            remember_unreadable(stages, {scanned[n].sha256: why for n, why in new.items()})
    by_role: dict[Role, dict[int, str]] = {role: {} for role in samples}
    for n, reason in reasons.items():
        role, i = places[n]
        by_role[role][i] = reason
    tell_unreadable(samples, by_role, findings, skip=skip)
    findings.raise_errors()
    of_role: dict[Role, list[str]] = {role: [] for role in samples}
    for n, digest in zip(readable, hashes, strict=True):
        of_role[places[n][0]].append(digest)
    samples = {role: part.without([*by_role[role]]) for role, part in samples.items()}
    for role, part in samples.items():
        if not part:
            findings.stop(f"--{role} {part.source!r} has no readable samples", "mend them")
    findings.raise_errors()
    return Content(samples, of_role, Images(open_pixels(file), config), key, file)


def _read_texts(
    config: Config, samples: dict[Role, Samples], stages: Path, findings: Findings
) -> Content:
    findings.raise_errors()
    texts = [str(text) for part in samples.values() for text in part.contents]
    inputs = tokenize(config.model, texts, config.max_tokens, findings)
    content = inputs.ids.numpy().tobytes() + inputs.mask.numpy().tobytes()
    store = stages / f"texts-{_digest(texts)[:16]}.json"
    if not store.exists():
        with replaced_file("train", store) as part, writing("train", store):
            part.write_text(json.dumps(texts))
    hashes = {role: [_digest([text]) for text in of.contents] for role, of in samples.items()}
    return Content(samples, hashes, inputs, hashlib.sha256(content).hexdigest(), store)


def _advance(progress: Progress, name: str, total: int) -> Callable[[int], None]:
    task = progress.add_task(name, total=total, note="")
    return lambda n: progress.advance(task, n)


def _digest(parts: list[Any]) -> str:
    text = "\n".join(map(str, parts))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _roles(members: dict[Role, Tensor], count: int) -> list[str]:
    """The role of every sample."""
    roles = [""] * count
    for role, of_role in members.items():
        for i in of_role.tolist():
            roles[i] = role
    return roles


def _usual_size(sides: list[int]) -> int:
    """The median of the shorter sides, up to LARGEST_SIZE."""
    return min(LARGEST_SIZE, int(statistics.median(sides))) if sides else LARGEST_SIZE
