"""What has to hold between the samples of a run: one list of classes, no copies across splits."""

from __future__ import annotations

import difflib
import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

from mts_fast.pipeline.data.findings import SHOWN, Findings, listed
from mts_fast.pipeline.data.images import UnreadableImage, read_image
from mts_fast.pipeline.data.samples import ROLES, TRAINING, Role, Samples

# called with the number of files that were looked at
Progress = Callable[[int], None]


def list_of_classes(samples: Mapping[Role, Samples], findings: Findings) -> tuple[str, ...]:
    """The classes of the training data, sorted; labels of all roles meet by name.

    Stops: a class that the real samples lack, with the nearest one; an empty class among them.
    Remarks: a class that another role lacks.
    """
    real = samples["real"]
    classes = sorted({*real.labels} | {*real.empty_classes})
    for label in real.empty_classes:
        what = f"--real {real.source!r}: class {label!r} is empty (0 images)"
        findings.stop(what, "put samples there, or remove the folder")
    if len(classes) < 2:
        what = f"--real {real.source!r} has {len(classes)} classes ({listed(classes)})"
        findings.stop(what, "a classifier needs two")
    for role in ROLES[1:]:
        if role not in samples:
            continue
        other = samples[role]
        for label in sorted({*other.labels, *other.empty_classes} - {*classes}):
            nearest = difflib.get_close_matches(label, classes, n=1, cutoff=0)
            what = f"--{role} {other.source!r} has class {label!r}, which no real sample has"
            findings.stop(what, f"rename it ({nearest[0]!r}?), or take it out" if nearest else "")
        lacking = sorted({*classes} - {*other.labels})
        if lacking:
            findings.remark(f"--{role} {other.source!r} has no samples of {listed(lacking)}")
    return tuple(classes)


def read_all(
    samples: Mapping[Role, Samples], findings: Findings, progress: Progress, *, skip: bool
) -> tuple[dict[Role, Samples], dict[Path, str]]:
    """Decode every image once; returns the samples that can be read, and each file's SHA-256.

    Damaged files, all of them, stop the run, or with `skip` are left out with a remark.
    """
    hashes: dict[Path, str] = {}
    readable: dict[Role, Samples] = {}
    for role, of_role in samples.items():
        bad: dict[int, str] = {}
        for i, content in enumerate(of_role.contents):
            if not isinstance(content, Path):
                break
            try:
                data = content.read_bytes()
                read_image(data)
                hashes[content] = hashlib.sha256(data).hexdigest()
            except UnreadableImage as error:
                bad[i] = str(error)
            except OSError as error:
                bad[i] = f"cannot be opened: {error.strerror}"
            progress(1)
        if bad:
            named = ", ".join(f"{of_role.names[i]!r} ({reason})" for i, reason in bad.items())
            what = f"--{role} {of_role.source!r}: {len(bad)} files cannot be read: {named}"
            if skip:
                findings.remark(f"{what}; left out")
            else:
                findings.stop(what, "mend or remove them, or pass --on-corrupt skip")
        readable[role] = of_role.without([*bad])
    return readable, hashes


def tell_copies(
    samples: Mapping[Role, Samples], hashes: Mapping[Path, str], findings: Findings
) -> list[tuple[str, str]]:
    """Pairs of identical samples between test or validation and training, and of two classes.

    Remarks name the first of each kind; all pairs are returned.
    """
    places: dict[str, list[tuple[Role, int]]] = defaultdict(list)
    for role, of_role in samples.items():
        contents: tuple[Path | str, ...] = of_role.contents
        for i, content in enumerate(contents):
            places[_key(content, hashes)].append((role, i))
    kinds: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for members in places.values():
        for n, (role, i) in enumerate(members):
            for other, j in members[n + 1 :]:
                kind = _kind(samples, role, i, other, j)
                if kind is not None:
                    name = f"{role}/{samples[role].names[i]}"
                    kinds[kind].append((name, f"{other}/{samples[other].names[j]}"))
    for kind, pairs in kinds.items():
        shown = "; ".join(f"{a} = {b}" for a, b in pairs[:SHOWN])
        more = f" and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else ""
        findings.remark(f"{len(pairs)} identical pairs {kind}: {shown}{more}")
    return [pair for pairs in kinds.values() for pair in pairs]


def _key(content: Path | str, hashes: Mapping[Path, str]) -> str:
    if isinstance(content, Path):
        return hashes[content]
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def _kind(samples: Mapping[Role, Samples], role: Role, i: int, other: Role, j: int) -> str | None:
    if (role in TRAINING) != (other in TRAINING):
        held_out = other if role in TRAINING else role
        return f"between training and {held_out}"
    if role != other and role not in TRAINING:
        return "between val and test"
    if samples[role].labels[i] != samples[other].labels[j]:
        return "under two classes"
    return None


def split_validation(
    real: Samples, share: float, seed: int, findings: Findings
) -> tuple[Samples, Samples]:
    """(real, val): a share of every class of the real samples, at least one of each class that has
    two; a class of one sample stays in training, told in a remark."""
    by_class: dict[str, list[int]] = defaultdict(list)
    for i, label in enumerate(real.labels):
        by_class[label].append(i)
    chosen: list[int] = []
    single = sorted(label for label, members in by_class.items() if len(members) == 1)
    for label, members in by_class.items():
        if len(members) > 1:
            count = min(max(1, round(share * len(members))), len(members) - 1)
            draws = sorted((_draw(seed, label, real.names[i]), i) for i in members)
            chosen += [i for _, i in draws[:count]]
    findings.remark(
        f"no --val: {len(chosen)} of {len(real)} real samples were split off as the validation set;"
        " better pass one that is like the data you care about"
    )
    if single:
        what = f"classes of a single real sample, which stays in training: {listed(single)}"
        findings.remark(f"the validation split has no samples of {what}")
    others = [i for i in range(len(real)) if i not in {*chosen}]
    val = _as_role("val", real.without(others))
    return real.without(chosen), val


def _draw(seed: int, label: str, name: str) -> bytes:
    """A random number of a sample that does not depend on what else there is."""
    return hashlib.sha256(f"{seed}\0{label}\0{name}".encode("utf-8", "surrogatepass")).digest()


def _as_role(role: Role, samples: Samples) -> Samples:
    parts = (samples.names, samples.labels, samples.contents, samples.groups)
    return Samples(role, samples.source, *parts)
