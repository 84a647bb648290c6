"""What has to hold between roles: classes by name, whole images, no copies."""

import io

import numpy as np
import pytest
from PIL import Image

from mts_fast.pipeline.data import Findings, Samples
from mts_fast.pipeline.data.checks import (
    list_of_classes,
    read_all,
    split_validation,
    tell_copies,
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


def picture(path, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())
    return path


def test_damaged_files_are_all_told(tmp_path):
    good = [picture(tmp_path / f"{i}.png", i) for i in range(2)]
    bad = [tmp_path / "empty.png", tmp_path / "gone.png", picture(tmp_path / "half.png")]
    bad[0].write_bytes(b"")
    bad[2].write_bytes(bad[2].read_bytes()[:90])
    real = samples_of("real", ("0", "red", good[0]), ("e", "red", bad[0]), ("h", "red", bad[2]))
    val = samples_of("val", ("1", "red", good[1]), ("g", "red", bad[1]))
    counted = []
    findings = Findings()
    read_all({"real": real, "val": val}, findings, counted.append, skip=False)
    assert sum(counted) == 5 and len(findings.errors) == 2
    told = "\n".join(findings.errors)
    assert "2 files cannot be read: 'e' (0 bytes), 'h' (damaged" in told
    assert "'g' (cannot be opened: No such file or directory)" in told
    with pytest.raises(ValueError, match="got 2 problems:\n- --real"):
        findings.raise_errors()
    findings = Findings()
    readable, hashes = read_all({"real": real, "val": val}, findings, lambda _: None, skip=True)
    assert readable["real"].names == ("0",) and readable["val"].names == ("1",) and len(hashes) == 2
    assert not findings.errors and len(findings.remarks) == 2
    findings.raise_errors()


def test_copies_are_told_in_pairs(tmp_path):
    a, b = picture(tmp_path / "a.png"), picture(tmp_path / "b.png")
    samples = {
        "real": samples_of("real", ("r/a", "red", a), ("r/b", "blue", b)),
        "synthetic": samples_of("synthetic", ("s/t", "red", "text")),
        "val": samples_of("val", ("v/t", "red", "text")),
        "test": samples_of("test", ("t/b", "blue", b)),
    }
    findings = Findings()
    pairs = tell_copies(samples, {a: "1", b: "1"}, findings)
    assert {frozenset(pair) for pair in pairs} == {
        frozenset({"real/r/a", "real/r/b"}),
        frozenset({"real/r/a", "test/t/b"}),
        frozenset({"real/r/b", "test/t/b"}),
        frozenset({"synthetic/s/t", "val/v/t"}),
    }
    told = "\n".join(findings.remarks)
    assert "1 identical pairs under two classes: real/r/a = real/r/b" in told
    assert "2 identical pairs between training and test" in told
    assert not tell_copies({"real": samples["real"]}, {a: "1", b: "2"}, Findings())


def test_a_validation_set_is_split_off_by_class():
    real = texts("real", *(["red"] * 10 + ["blue"] * 2 + ["green"]))
    findings = Findings()
    left, val = split_validation(real, 0.2, 0, findings)
    assert val.counts() == {"red": 2, "blue": 1} and left.counts() == {
        "red": 8,
        "blue": 1,
        "green": 1,
    }
    assert val.role == "val" and not {*val.names} & {*left.names}
    assert "stays in training: 'green'" in findings.remarks[1] and "no --val" in findings.remarks[0]
    again = split_validation(real, 0.2, 0, Findings())[1]
    assert again == val != split_validation(real, 0.2, 1, Findings())[1]
    # a sample more changes no other's place
    more = texts("real", *(["red"] * 10 + ["blue"] * 2 + ["green"] * 2))
    assert {*val.names} <= {*split_validation(more, 0.2, 0, Findings())[1].names}
