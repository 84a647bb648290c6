"""What has to hold between the samples of a run: one list of classes, no copies across splits."""

from __future__ import annotations

import difflib
import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

from mts_fast.pipeline.data.findings import SHOWN, Findings, counted, listed
from mts_fast.pipeline.data.samples import ROLES, TRAINING, Role, Samples


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


def tell_unreadable(
    samples: Mapping[Role, Samples],
    reasons: Mapping[Role, Mapping[int, str]],
    findings: Findings,
    *,
    skip: bool,
) -> None:
    """Files that are no whole pictures, all of them: with `skip` left out, else fatal.

    Args:
        reasons: by role and index.
    """
    for role, of_role in reasons.items():
        if not of_role:
            continue
        names = samples[role].names
        named = ", ".join(f"{names[i]!r} ({reason})" for i, reason in sorted(of_role.items()))
        count = counted(len(of_role), "file")
        what = f"--{role} {samples[role].source!r}: {count} cannot be read: {named}"
        if skip:
            findings.remark(f"{what}; left out")
        else:
            findings.stop(what, "mend or remove them, or pass --on-corrupt skip")


def tell_copies(
    samples: Mapping[Role, Samples], hashes: Mapping[Role, Sequence[str]], findings: Findings
) -> list[tuple[str, str]]:
    """Pairs of identical samples between test or validation and training, and of two classes.

    Remarks name the first of each kind; all pairs are returned.

    Args:
        hashes: of the content of every sample.
    """
    places: dict[str, list[tuple[Role, int]]] = defaultdict(list)
    for role, of_role in hashes.items():
        for i, digest in enumerate(of_role):
            places[digest].append((role, i))
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
        findings.remark(f"{counted(len(pairs), 'identical pair')} {kind}: {shown}{more}")
    return [pair for pairs in kinds.values() for pair in pairs]


def _kind(samples: Mapping[Role, Samples], role: Role, i: int, other: Role, j: int) -> str | None:
    if (role in TRAINING) != (other in TRAINING):
        held_out = other if role in TRAINING else role
        return f"between training and {held_out}"
    if role != other and role not in TRAINING:
        return "between val and test"
    if role != other and role in TRAINING:
        return "between real and synthetic"
    if samples[role].labels[i] != samples[other].labels[j]:
        return "under two classes"
    return None


def split_validation(real: Samples, share: float, seed: int, findings: Findings) -> list[int]:
    """Indices of the validation set: a share of every class of the real samples, at least one of
    each class that has two; a class of one sample stays in training, told in a remark."""
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
    if not chosen:
        what = "no --val, and no class of the real samples has two to split one off"
        findings.stop(what, "pass a validation set")
    return sorted(chosen)


def _draw(seed: int, label: str, name: str) -> bytes:
    """A random number of a sample that does not depend on what else there is."""
    return hashlib.sha256(f"{seed}\0{label}\0{name}".encode("utf-8", "surrogatepass")).digest()
