"""What has to hold between roles: classes by name, whole images, no copies."""

import pytest

from mts_fast.pipeline.data import Findings, Samples
from mts_fast.pipeline.data.checks import (
    list_of_classes,
    split_validation,
    tell_copies,
    tell_unreadable,
)


def samples_of(role, *pairs, empty=()):
    names, labels, contents = zip(*pairs, strict=True) if pairs else ((), (), ())
    return Samples(role, f"data/{role}", names, labels, contents, empty_classes=empty)


def texts(role, *labels, prefix="t"):
    return samples_of(role, *((f"{prefix}{i}", c, f"{role} {i}") for i, c in enumerate(labels)))


def roles(**labels):
    return {role: texts(role, *of_role) for role, of_role in labels.items()}


def test_classes_are_those_of_the_real_samples():
    findings = Findings()
    both = ["red", "blue"]
    samples = roles(real=[*both, "red"], synthetic=["red"], val=["blue"], test=both)
    assert list_of_classes(samples, findings) == ("blue", "red")
    assert not findings.errors
    assert findings.remarks == [
        "--synthetic 'data/synthetic' has no samples of 'blue'",
        "--val 'data/val' has no samples of 'red'",
    ]


@pytest.mark.parametrize("role", ["synthetic", "val", "test"])
def test_a_class_that_real_samples_lack_stops(role):
    findings = Findings()
    list_of_classes(roles(real=["red", "green"], **{role: ["red", "greens"]}), findings)
    (error,) = findings.errors
    assert f"--{role}" in error and "'greens'" in error and "('green'?)" in error


def test_empty_and_single_classes_stop():
    findings = Findings()
    real = samples_of("real", ("a", "red", "x"), ("b", "blue", "y"), empty=("green",))
    list_of_classes({"real": real}, findings)
    assert "class 'green' is empty (0 images)" in findings.errors[0]
    findings = Findings()
    list_of_classes(roles(real=["red", "red"]), findings)
    assert "has 1 classes ('red')" in findings.errors[0]


def test_unreadable_files_are_all_told():
    samples = roles(real=["red", "red", "blue"], val=["red"])
    reasons = {"real": {2: "damaged", 0: "0 bytes"}, "val": {0: "cannot be opened"}}
    findings = Findings()
    tell_unreadable(samples, reasons, findings, skip=False)
    assert "2 files cannot be read: 't0' (0 bytes), 't2' (damaged)" in findings.errors[0]
    assert "--val" in findings.errors[1] and "--on-corrupt skip" in findings.errors[1]
    with pytest.raises(ValueError, match="got 2 problems:\n- --real"):
        findings.raise_errors()
    findings = Findings()
    tell_unreadable(samples, {**reasons, "val": {}}, findings, skip=True)
    assert not findings.errors and len(findings.remarks) == 1


def test_copies_are_told_in_pairs():
    samples = {
        "real": samples_of("real", ("r/a", "red", ""), ("r/b", "blue", "")),
        "synthetic": samples_of("synthetic", ("s/t", "red", "")),
        "val": samples_of("val", ("v/t", "red", "")),
        "test": samples_of("test", ("t/b", "blue", "")),
    }
    hashes = {"real": ["1", "1"], "synthetic": ["2"], "val": ["2"], "test": ["1"]}
    findings = Findings()
    pairs = tell_copies(samples, hashes, findings)
    assert {frozenset(pair) for pair in pairs} == {
        frozenset({"real/r/a", "real/r/b"}),
        frozenset({"real/r/a", "test/t/b"}),
        frozenset({"real/r/b", "test/t/b"}),
        frozenset({"synthetic/s/t", "val/v/t"}),
    }
    told = "\n".join(findings.remarks)
    assert "1 identical pair under two classes: real/r/a = real/r/b" in told
    assert "2 identical pairs between training and test" in told
    assert not tell_copies(samples, {"real": ["1", "2"], "test": ["3"]}, Findings())


def test_a_validation_set_is_split_off_by_class():
    real = texts("real", *(["red"] * 10 + ["blue"] * 2 + ["green"]))
    findings = Findings()
    val = split_validation(real, 0.2, 0, findings)
    assert real.only(val).counts() == {"red": 2, "blue": 1} and not findings.errors
    assert "stays in training: 'green'" in findings.remarks[1] and "no --val" in findings.remarks[0]
    again = split_validation(real, 0.2, 0, Findings())
    assert again == val != split_validation(real, 0.2, 1, Findings())
    # a sample more changes no other's place
    more = texts("real", *(["red"] * 10 + ["blue"] * 2 + ["green"] * 2))
    assert {*val} <= {*split_validation(more, 0.2, 0, Findings())}
