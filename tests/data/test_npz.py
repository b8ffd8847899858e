from __future__ import annotations

import io
import lzma
import struct
import zipfile

import numpy as np
import pytest

from fastlvm.data import npz
from fastlvm.errors import InputError, IntegrityError

pytestmark = pytest.mark.filterwarnings("error")


def npy(shape="(2, 3)", descr="'<f4'", order="False", body=bytes(24)):
    return headed(f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n") + body


def headed(text, version=(1, 0), length=None):
    raw = text.encode("latin1")
    size = len(raw) if length is None else length
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", size) + raw


def archive(path, method=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return path


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=">i2").reshape(2, 3)),
        np.zeros((0, 4), np.float16),
        np.array(3, np.uint64),
        np.array(["ab", "c"]),
        np.array([b"ab"]),
        np.array([True]),
        np.array([1j]),
        np.array(["2026-01-01"], "M8[D]"),
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_what_numpy_writes_comes_back(tmp_path, array, version):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version)
    with npz.Archive(archive(tmp_path / "a.npz", a=file.getvalue())) as found:
        back = found.array("a")
    assert back.dtype == array.dtype and back.shape == array.shape
    np.testing.assert_array_equal(back, array)


def test_headers_in_another_order_and_spacing_are_read():
    text = "{'shape':(7L,3),'fortran_order':True,'descr':'|u1'}"
    assert npz.read_header(io.BytesIO(headed(text)), "a") == ((7, 3), True, np.dtype("u1"))


@pytest.mark.parametrize(
    "data",
    [
        npy("(True, False)"),
        npy("(-1, 4)"),
        npy("(2**40,)"),
        npy("(1,) * 10**9"),
        npy("(4)(5)"),
        npy("('a',)"),
        npy("(4,"),
        npy("(" * 5000 + ")" * 5000),
        npy("(4611686018427387904, 4)"),
        npy("(" + "9" * 5000 + ",)"),
        npy("(" + "1, " * 100 + ")"),
        npy(descr="'<U9999999999'"),
        npy(descr="'<U0'", shape="(9999999999,)"),
        npy(descr="'zz'"),
        npy(descr="'f4,f4'"),
        npy(descr="'\\d'"),
        npy(descr="'|a4'"),
        npy(descr="('<f4', (2,))"),
        npy(descr="[('a', '<f4'), ('b', 'O')]"),
        npy(descr="'<f4', 'x': 1"),
        npy(descr="'<f4', 'descr': '<f4'"),
        npy(order="'maybe'"),
        headed("{'descr': '<f4'}"),
        headed("x" * 20_000, (2, 0)),
        headed("\x00" * 40),
        headed("", length=60_000),
        headed("", (2, 0), length=2**32 - 1),
        b"\x93NUMPY\x09\x09" + bytes(60),
        b"\x93NUMPY",
        b"\x80\x04K\x01.",
        b"",
    ],
)
def test_a_header_that_makes_no_sense_is_refused_in_one_line(tmp_path, data):
    with npz.Archive(archive(tmp_path / "a.npz", a=data)) as found, pytest.raises(IntegrityError) as caught:
        found.array("a")
    message = str(caught.value)
    assert "a.npz array 'a'" in message and message.endswith("restore the file")
    assert message.isprintable() and len(message) < 400


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_that_numpy_does_not_write_is_refused(tmp_path, method):
    path = archive(tmp_path / "a.npz", method, a=npy())
    data = bytearray(path.read_bytes())
    data[60:70] = b"\xff" * 10
    path.write_bytes(data)
    with npz.Archive(path) as found:
        try:
            with pytest.raises(IntegrityError, match=r"a\.npz is truncated or damaged .*: restore it"):
                found.array("a")
        except lzma.LZMAError as error:
            pytest.fail(f"LZMAError gets out: {error}")


def test_names_of_arrays_are_told_in_one_line(tmp_path):
    members = {f"a\nb{number}{'x' * 1000}": npy() for number in range(50)}
    with npz.Archive(archive(tmp_path / "a.npz", **members)) as found, pytest.raises(InputError) as caught:
        found.array("context")
    assert "a.npz has no array 'context'" in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 800


SHAPE = (3, 2)


@pytest.fixture
def mapped(tmp_path):
    """Map what `content` writes to a.npy as int32 [3, 2]."""

    def read(content):
        if isinstance(content, bytes):
            (tmp_path / "a.npy").write_bytes(content)
        else:
            np.save(tmp_path / "a.npy", content)
        return npz.map_array(tmp_path / "a.npy", "int32", SHAPE, "save it again")

    return read


def test_a_file_is_mapped_where_it_is_what_is_wanted(mapped):
    array = np.arange(6, dtype=np.int32).reshape(SHAPE)
    np.testing.assert_array_equal(mapped(array), array)
    np.testing.assert_array_equal(mapped(np.asfortranarray(array).copy(order="C")), array)


@pytest.mark.parametrize(
    "content, says",
    [
        (np.zeros(SHAPE, np.int64), r"holds int64 \[3, 2\], and int32 \[3, 2\] is wanted"),
        (np.zeros(SHAPE, ">i4"), r"holds >i4 \[3, 2\], and int32"),
        (np.zeros((4, 2), np.int32), r"holds int32 \[4, 2\]"),
        (np.int32(3), r"holds int32 \[\]|truncated"),
        (np.zeros(SHAPE, np.int32, order="F"), "Fortran order"),
        (npy("(3, 2)", "'<i4'", body=bytes(20)), "is truncated: .* bytes"),
        (npy("(3, 2)", "'<i4'", body=bytes(500)), "bytes after its end"),
        (npy("(1, " * 30 + ")" * 30, "'<i4'", body=bytes(500)), "no .npy header"),
        (b"", "is truncated"),
    ],
)
def test_what_is_not_wanted_is_told(mapped, content, says):
    with pytest.raises(IntegrityError, match=says) as caught:
        mapped(content)
    assert "a.npy" in str(caught.value) and "save it again" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(IntegrityError, match=r"a\.npy is missing: save it again"):
        npz.map_array(tmp_path / "a.npy", "int32", SHAPE, "save it again")
