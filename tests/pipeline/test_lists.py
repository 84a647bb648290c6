"""Lists: cells are text, an empty one is missing, rows are named."""

import sys
from pathlib import Path

import pytest

from mts_fast.pipeline.data import Findings
from mts_fast.pipeline.data.lists import read_list


def write(folder, text, name="real.csv", encoding="utf-8", files="abc"):
    for letter in files:
        (folder / f"{letter}.png").write_bytes(b"x")
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


def read(path, text_column=None, **options):
    findings = Findings()
    return read_list("real", path, text_column, findings, **options), findings


def test_words_are_words(tmp_path):
    path = write(tmp_path, "file,label\na.png,007\nb.png,NA\nc.png,1.0\n")
    samples, findings = read(path)
    assert samples.labels == ("007", "NA", "1.0") and samples.names == ("a.png", "b.png", "c.png")
    assert samples.contents == tuple(tmp_path / f"{x}.png" for x in "abc") and not findings.errors


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ('"file","label"\r\n"a.png","red"\r\n"b.png"," blue "\r\n', "utf-8-sig"),
        ("file;label\na.png;red\n\nb.png;blue\n", "utf-8"),
        ("file\tlabel\ra.png\tred\rb.png\tblue\r", "utf-8"),
        (" file , label \n a.png , red \n b.png , blue \n", "utf-8"),
        ("label|file\nred|a.png\nblue|b.png", "utf-8"),
    ],
)
def test_ways_of_writing_a_list(text, encoding, tmp_path):
    samples, findings = read(write(tmp_path, text, encoding=encoding))
    assert dict(zip(samples.names, samples.labels, strict=True)) == {
        "a.png": "red",
        "b.png": "blue",
    }
    assert not findings.errors


def test_a_cell_is_one_class(tmp_path):
    path = write(tmp_path, 'file,label\na.png,golden retriever\nb.png,a|b\nc.png,"x, y; z"\n')
    assert read(path)[0].labels == ("golden retriever", "a|b", "x, y; z")


def test_paths_start_at_the_list(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in", "")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    text = f"path,class\nin/a.png,x\nin\\b.png,y\n{tmp_path / 'in' / 'c.png'},z\n"
    samples, findings = read(write(tmp_path, text, files=""))
    assert not findings.errors
    assert [Path(p).resolve() for p in samples.contents] == [
        tmp_path / "in" / f"{x}.png" for x in "abc"
    ]


def test_what_is_missing_is_named_by_row(tmp_path):
    text = "file,label\na.png,\n,red\nb.png,red\nlost.png,red\n\nc,blue\n"
    _, findings = read(write(tmp_path, text))
    told = "\n".join(findings.errors)
    assert (
        "row 1 (line 2) has no label (a.png)" in told and "row 2 (line 3) has no file (red)" in told
    )
    assert (
        "names 2 files that do not exist: 'lost.png (row 4 (line 5))', 'c (row 5 (line 7))'" in told
    )
    assert len(findings.errors) == 3


def test_a_file_twice(tmp_path):
    text = "file,label\na.png,red\na.png,red\nb.png,red\n./b.png,red\nc.png,red\nc.png,blue\n"
    samples, findings = read(write(tmp_path, text))
    assert samples.names == ("a.png", "b.png", "c.png") and len(findings.remarks) == 2
    (error,) = findings.errors
    assert "'c.png' is of class 'red' and, in row 6 (line 7), 'blue'" in error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no column"),
        ("a.png,red\n", "has no column file or path"),
        ("file,colour\na.png,red\n", "has no column label; name one of 'file', 'colour' so"),
    ],
)
def test_columns_that_are_not_there(text, said, tmp_path):
    samples, findings = read(write(tmp_path, text))
    assert samples is None and any(said in error for error in findings.errors)


def test_files_that_are_no_lists(tmp_path):
    bad = tmp_path / "latin.csv"
    bad.write_bytes("file,label\na.png,caf\u00e9\n".encode("latin-1"))
    for path, said in (
        (bad, "is not UTF-8 in line 2"),
        (tmp_path / "no.csv", "cannot be read"),
        (tmp_path, "cannot be read"),
    ):
        samples, findings = read(path)
        assert samples is None and said in findings.errors[0]


def test_texts(tmp_path):
    odd = [
        "word " * 50_000,
        'line one\nline two, "quoted";\t',
        "before\0after",
        "\u05e9\u05dc",
        "null",
    ]
    quoted = ['"' + text.replace('"', '""') + '"' for text in odd]
    body = "".join(f"{text},good\r\n" for text in quoted)
    path = write(tmp_path, "text,label\r\n" + body + ",bad\r\n  ,bad\r\nfine,bad\r\n", files="")
    samples, findings = read(path, "text")
    assert samples.contents == (*odd, "fine")
    assert samples.names[0] == "real.csv:1" and samples.names[-1] == "real.csv:8"
    assert "2 rows have no text: row 6 (line 8), row 7 (line 9)" in findings.errors[0]
    samples, findings = read(path, "text", skip_empty=True)
    assert len(samples) == 6 and not findings.errors and "left out" in findings.remarks[0]


def test_groups(tmp_path):
    path = write(tmp_path, "file,label,group\na.png,red,land\nb.png,red,water\n")
    assert read(path)[0].groups == ("land", "water")


def test_parquet(tmp_path, monkeypatch):
    path = write(tmp_path, "", "real.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "needs pyarrow; pip install 'mts_fast[data]'" in read(path)[1].errors[0]
    monkeypatch.undo()
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    labels = arrow.array(["7", None, "7"]).dictionary_encode()
    table = arrow.table({"file": ["a.png", "b.png", "c.png"], "label": labels})
    parquet.write_table(table, path)
    samples, findings = read(path)
    assert samples.labels == ("7", "7") and "row 2 has no label (b.png)" in findings.errors[0]
    for values, expected in (
        ([1, 2, 3], ("1", "2", "3")),
        ([True, False, True], ("True", "False", "True")),
    ):
        parquet.write_table(
            arrow.table({"file": ["a.png", "b.png", "c.png"], "label": values}), path
        )
        assert read(path)[0].labels == expected
