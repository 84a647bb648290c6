"""Embeddings in files: every format gives the same rows, and bad files are refused by name."""

import io
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mts_fast.features import open_embeddings, open_vector

X = torch.randn(23, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def as_npy(path, x):
    np.save(path / "x.npy", x.numpy())
    return path / "x.npy", None


def as_fortran_npy(path, x):
    np.save(path / "x.npy", np.asfortranarray(x.numpy()))
    return path / "x.npy", None


def as_big_endian_npy(path, x):
    np.save(path / "x.npy", x.numpy().astype(x.numpy().dtype.newbyteorder(">")))
    return path / "x.npy", None


def as_npz(path, x):
    np.savez(path / "x.npz", labels=np.arange(23), x=x.numpy())
    return path / "x.npz", "x"


def as_compressed_npz(path, x):
    np.savez_compressed(path / "x.npz", x=x.numpy())
    return path / "x.npz", None


def as_safetensors(path, x):
    save_file({"labels": torch.arange(23), "x": x}, path / "x.safetensors")
    return path / "x.safetensors", "x"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "write",
    [as_npy, as_fortran_npy, as_big_endian_npy, as_npz, as_compressed_npz, as_safetensors],
)
def test_every_format_gives_the_rows(write, dtype, tmp_path):
    x = X.to(dtype)
    path, key = write(tmp_path, x)
    source = open_embeddings(path, key=key)
    assert tuple(source.shape) == (23, 5)
    for rows in (slice(0, 1), slice(3, 17), slice(20, 30), slice(0, 23)):  # one, some, past the end
        assert source[rows].dtype == dtype and torch.equal(source[rows], x[rows])


@pytest.mark.parametrize("write", [as_npy, as_npz])
def test_rows_stay_on_disk(write, tmp_path):
    path, key = write(tmp_path, X)
    array = open_embeddings(path, key=key).array
    assert isinstance(array, np.memmap) and array.filename == path


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, bool])
def test_vectors(dtype, tmp_path):
    y = np.arange(7).astype(dtype)
    np.savez(tmp_path / "y.npz", y=y, x=np.ones((2, 3)))
    assert open_vector(tmp_path / "y.npz", key="y").tolist() == y.tolist()


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
def test_unsigned_vectors_are_refused(dtype, tmp_path):
    np.save(tmp_path / "y.npy", np.array([0, 60_000, 3], dtype=dtype))
    message = rf"must be an array of signed .*, got dtype {np.dtype(dtype)}; save it as int64"
    with pytest.raises(ValueError, match=message):
        open_vector(tmp_path / "y.npy")


def truncated(path):
    as_npy(path, X)
    (path / "x.npy").write_bytes((path / "x.npy").read_bytes()[:-8])
    return "x.npy"


def truncated_zip(path):
    as_npz(path, X)
    (path / "x.npz").write_bytes((path / "x.npz").read_bytes()[:-40])
    return "x.npz"


def truncated_safetensors(path):
    as_safetensors(path, X)
    (path / "x.safetensors").write_bytes((path / "x.safetensors").read_bytes()[:-8])
    return "x.safetensors"


def foreign(path):
    (path / "x.npy").write_text("labels,embedding\n0,1\n")
    return "x.npy"


def empty(path):
    (path / "x.npy").touch()
    return "x.npy"


def pickled(path):
    np.save(path / "x.npy", np.array([[{}], [3]], dtype=object), allow_pickle=True)
    return "x.npy"


def pickled_member(path):
    np.savez(path / "x.npz", x=np.array([[{}], [3]], dtype=object))
    return "x.npz"


def words(path):
    np.save(path / "x.npy", np.array([["a"], ["b"]]))
    return "x.npy"


def one_axis(path):
    np.save(path / "x.npy", np.ones(4))
    return "x.npy"


def no_rows(path):
    np.save(path / "x.npy", np.ones((0, 4)))
    return "x.npy"


def another_suffix(path):
    (path / "x.csv").write_text("1,2\n")
    return "x.csv"


def long_double(path):
    np.save(path / "x.npy", np.ones((3, 2), dtype=np.longdouble))
    return "x.npy"


def complex_numbers(path):
    np.save(path / "x.npy", np.ones((3, 2), dtype=np.complex64))
    return "x.npy"


def header(shape, dtype="<f4"):
    """The header of a .npy file of any shape."""
    out = io.BytesIO()
    description = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, description)
    return out.getvalue()


def negative_rows(path):
    (path / "x.npy").write_bytes(header((-3, 2)) + bytes(24))
    return "x.npy"


def huge(path):
    (path / "x.npy").write_bytes(header((5 * 10**15, 2)) + bytes(24))
    return "x.npy"


def hostile_header(path):
    (path / "x.npy").write_bytes(header((3, 2)).replace(b"(3, 2)", b"(3,2),") + bytes(24))
    return "x.npy"


def nested_header(path):
    text = b"{'descr': " + b"(" * 3000 + b"\n"
    (path / "x.npy").write_bytes(np.lib.format.magic(1, 0) + struct.pack("<H", len(text)) + text)
    return "x.npy"


def member(path, data, compression):
    with zipfile.ZipFile(path / "x.npz", "w", compression) as archive:
        archive.writestr("x.npy", data)
        archive.writestr("y.npy", header((64, 2)) + bytes(512))
    return "x.npz"


def short_member(path):
    """A stored member with too little data: the bytes after it would be read as its rows."""
    return member(path, header((9, 2)) + bytes(24), zipfile.ZIP_STORED)


def long_member(path):
    return member(path, header((2, 2)) + bytes(24), zipfile.ZIP_STORED)


def huge_member(path):
    return member(path, header((5 * 10**15, 2)) + bytes(24), zipfile.ZIP_DEFLATED)


def negative_member(path):
    return member(path, header((-3, -2)) + bytes(24), zipfile.ZIP_DEFLATED)


def encrypted_member(path):
    name = member(path, header((3, 2)) + bytes(24), zipfile.ZIP_STORED)
    data = bytearray((path / name).read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + flags] |= 1
    (path / name).write_bytes(data)
    return name


def damaged_member(path):
    """A member whose data do not match its checksum."""
    name = member(path, header((300, 2)) + bytes(2400), zipfile.ZIP_DEFLATED)
    data = bytearray((path / name).read_bytes())
    data[60] ^= 1
    (path / name).write_bytes(data)
    return name


def eight_bits(path):
    save_file({"x": torch.ones(3, 2).to(torch.float8_e4m3fn)}, path / "x.safetensors")
    return "x.safetensors"


@pytest.mark.parametrize(
    "write",
    [
        long_double,
        complex_numbers,
        negative_rows,
        huge,
        hostile_header,
        nested_header,
        short_member,
        long_member,
        huge_member,
        negative_member,
        encrypted_member,
        damaged_member,
        eight_bits,
        truncated,
        truncated_zip,
        truncated_safetensors,
        foreign,
        empty,
        pickled,
        pickled_member,
        words,
        one_axis,
        no_rows,
        another_suffix,
    ],
)
def test_bad_files_are_refused_by_name(write, tmp_path):
    name = write(tmp_path)
    key = "x" if name == "x.npz" else None
    with pytest.raises(ValueError, match=f"open_embeddings: file '.*{name}' must be .*, got .*; "):
        open_embeddings(tmp_path / name, key=key)


def test_other_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"existing file, got '.*nowhere.npy'"):
        open_embeddings(tmp_path / "nowhere.npy")
    np.save(tmp_path / "i.npy", np.ones((3, 2), dtype=int))
    with pytest.raises(TypeError, match=r"must be floating point, got torch\.int64"):
        open_embeddings(tmp_path / "i.npy")
    path, _ = as_npz(tmp_path, X)
    with pytest.raises(ValueError, match=r"key must be one of \['labels', 'x'\] in .*, got none"):
        open_embeddings(path)
    with pytest.raises(TypeError, match=r"open_embeddings: path must be a path \(str or pathlib"):
        open_embeddings(None)
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(FileNotFoundError, match="must be an existing file, got the folder"):
        open_embeddings(tmp_path / "folder.npy")
    with pytest.raises(ValueError, match=r"key must be None for '.*i\.npy', got 'x'; a \.npy file"):
        open_embeddings(tmp_path / "i.npy", key="x")
    with pytest.raises(TypeError, match="key must be a name or None, got int 0"):
        open_embeddings(path, key=0)
    with pytest.raises(ValueError, match=r"key must be one of .*, got 'y'"):
        open_embeddings(path, key="y")
    with pytest.raises(ValueError, match=r"an \[N\] array, got shape \(23, 5\); name another with"):
        open_vector(path, key="x")


def test_member_headers_of_any_length(tmp_path):
    """The data of a zip member begin after its local header; the directory may differ."""
    np.save(tmp_path / "x.npy", X.numpy())
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        info = zipfile.ZipInfo("a_long_name_for_a_member.npy")
        info.extra = b"\x99\x99\x04\x00abcd"
        archive.writestr(info, (tmp_path / "x.npy").read_bytes())
    assert torch.equal(open_embeddings(tmp_path / "x.npz")[0:23], X)
