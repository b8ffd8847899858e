"""Ways to damage an artifact held in memory: bytes, JSON, safetensors headers and contents, arrays, whole models."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastlvm.data import Space
from fastlvm.predictor.artifact import Golden
from fastlvm.predictor.blocks import LAYERS
from fastlvm.predictor.forward import Forward, Plan
from fastlvm.predictor.pack import PRECISIONS, pack

from .fuzz_artifacts import MALFORMED, Base, Files, contexts, weights_of

DEEP = "@deep@"  # stands for nesting that no JSON writer would write
LONG = "@long@"  # for a number of more digits than Python reads
ODD = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 12, 16, 17, 255, 65536, 65537, 2**20, 2**20 + 1, 2**24, 2**31, 2**53),
    *(2**63 - 1, 2**63, 2**64, -(2**63), 10**400, 0.0, -0.0, 0.5, 1.0, 5.0, 1e-5, 1e-320, 1e308, -1e308),
    *(math.nan, math.inf, -math.inf, "", "x", "x" * 2000, "a\nb", "\ud800", "\0", "../../x", "/etc/passwd", "embed"),
    *([], {}, [[]], [1, 2], [-1], {"a": 1}, DEEP, LONG),
)


class Target(NamedTuple):
    """What is damaged, by what, and what else there is to take parts from."""

    files: Files
    space: Space
    bases: list[Base]
    rng: random.Random

    def some(self, suffix: str = "") -> str:
        """The name of a file that ends like that; "" where none is left."""
        names = [name for name in sorted(self.files) if name.endswith(suffix)]
        return self.rng.choice(names) if names else ""

    def arrays(self) -> np.random.Generator:
        return np.random.default_rng(self.rng.getrandbits(64))


Damage = Callable[[Target], None]
DAMAGE: dict[str, Damage] = {}


def damage(times: int = 1) -> Callable[[Damage], Damage]:
    """Enter a way into DAMAGE; `times` is how often it is drawn."""

    def enter(way: Damage) -> Damage:
        DAMAGE[way.__name__] = way
        ODDS[way.__name__] = times
        return way

    return enter


ODDS: dict[str, int] = {}


def spoil(target: Target) -> list[str]:
    """One to three of the ways, and their names."""
    names = target.rng.choices(list(ODDS), list(ODDS.values()), k=target.rng.choice((1, 1, 1, 2, 3)))
    for name in names:
        with contextlib.suppress(*MALFORMED):  # what came before may have left nothing to do this to
            DAMAGE[name](target)
    return names


# Bytes of any file.


def _position(data: bytes, rng: random.Random) -> int:
    """Anywhere, and half the time near either end, where headers and directories are."""
    near = min(len(data), 200)
    return rng.choice((rng.randrange(len(data)), rng.randrange(near), len(data) - 1 - rng.randrange(near)))


@damage(4)
def flipped_bytes(target: Target) -> None:
    name = target.some()
    data = bytearray(target.files.get(name, b""))
    for _ in range(target.rng.choice((1, 1, 2, 8, 40)) if data else 0):
        at = _position(data, target.rng)
        data[at] = target.rng.choice((data[at] ^ 1 << target.rng.randrange(8), 0, 0xFF, 0x7F, 0x80))
    if name:
        target.files[name] = bytes(data)


@damage(2)
def huge_number(target: Target) -> None:
    """Four or eight bytes that a reader may take for a size."""
    name = target.some()
    data = bytearray(target.files.get(name, b""))
    if len(data) < 8:
        return
    wide = target.rng.random() < 0.5
    value = target.rng.choice((0, 1, 2**16, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1))
    at = min(_position(data, target.rng), len(data) - 8)
    data[at : at + (8 if wide else 4)] = struct.pack("<Q", value)[: 8 if wide else 4]
    target.files[name] = bytes(data)


@damage(3)
def moved_bytes(target: Target) -> None:
    """A range cut out, written twice, or over another one."""
    name = target.some()
    data = target.files.get(name, b"")
    if not data:
        return
    a, b = sorted((_position(data, target.rng), _position(data, target.rng)))
    b = min(b, a + target.rng.choice((1, 8, 64, 10**6)))
    at = _position(data, target.rng)
    target.files[name] = target.rng.choice(
        (data[:a] + data[b:], data[:at] + data[a:b] + data[at:], data[:at] + data[a:b] + data[at + b - a :])
    )


@damage(2)
def truncated(target: Target) -> None:
    name = target.some()
    data = target.files.get(name, b"")
    if data:
        target.files[name] = target.rng.choice((data[: _position(data, target.rng)], b"", data + bytes(100), data[:-1]))


@damage()
def missing(target: Target) -> None:
    target.files.pop(target.some(), None)


@damage(2)
def of_another(target: Target) -> None:
    """A file of another artifact."""
    other = target.rng.choice(target.bases).files
    name = target.rng.choice(sorted(other))
    target.files[name] = other[name]


# JSON.


def _edit_json(target: Target, name: str, edit: Callable[[Any], Any]) -> None:
    target.files[name] = _text(edit(json.loads(target.files[name])), target.rng)


def _text(value: Any, rng: random.Random) -> bytes:
    depth = rng.choice((50, 500, 5000, 200_000))
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    nested = opening * depth + "1" + closing * depth
    return json.dumps(value).replace(f'"{DEEP}"', nested).replace(f'"{LONG}"', "9" * 5000).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    found, left = [], [value]
    while left:
        container = left.pop()
        if isinstance(container, dict | list):
            keys: Any = container if isinstance(container, dict) else range(len(container))
            found += [(container, key) for key in keys]
            left += [container[key] for key in keys]
    return found


def _anything(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(ODD))


def _odd(value: Any, rng: random.Random) -> Any:
    """Something else in the place of a value: near it or not like it at all."""
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice((value + 1, value - 1, 2 * value, -value, str(value), value * 2**32))
    return _anything(rng)


def _spoil_tree(content: Any, rng: random.Random) -> Any:
    for _ in range(rng.choice((1, 1, 2, 5))):
        places = _places(content)
        if not places:
            return _anything(rng)
        container, key = rng.choice(places)
        way = rng.randrange(6)
        if way == 0:
            container.pop(key)
        elif way == 1 and isinstance(container, dict):
            container[rng.choice(("extra", "type", "bias", "prefix", "layers", ""))] = _anything(rng)
        elif way == 2:
            other, at = rng.choice(places)
            if at in other if isinstance(other, dict) else at < len(other):
                container[key] = json.loads(json.dumps(other[at]))
        else:
            container[key] = _odd(container[key], rng)
    return content if rng.random() < 0.98 else _anything(rng)


@damage(5)
def odd_config(target: Target) -> None:
    _edit_json(target, "config.json", lambda content: _spoil_tree(content, target.rng))


@damage(5)
def odd_layer(target: Target) -> None:
    """A field of a layer, the rest of config.json left alone."""

    def edit(content: Any) -> Any:
        content["layers"] = _spoil_tree(content["layers"], target.rng)
        return content

    _edit_json(target, "config.json", edit)


@damage(4)
def other_layers(target: Target) -> None:
    """Layers in another order, of another type, more, fewer, or nested."""
    rng = target.rng

    def edit(content: Any) -> Any:
        layers = content["layers"]
        for _ in range(rng.choice((1, 1, 2))):
            at = rng.randrange(len(layers))
            way = rng.randrange(6)
            if way == 0:
                layers.insert(rng.randrange(len(layers) + 1), layers[at])
            elif way == 1:
                layers[at]["type"] = rng.choice([*LAYERS, "local_attention", "Linear", "context"])
            elif way == 2:
                layers.insert(at, layers.pop(rng.randrange(len(layers))))
            elif way == 3 and len(layers) > 1:
                layers.pop(at)
            elif way == 4:
                inner: Any = layers[at]
                for _ in range(rng.choice((1, 2, 3, 100))):
                    inner = {"type": "residual", "layers": [inner]}
                layers[at] = inner
            else:
                layers.insert(at, {"type": rng.choice(("gelu", "last", "l2_norm", "residual"))})
        return content

    _edit_json(target, "config.json", edit)


@damage(3)
def odd_index_record(target: Target) -> None:
    _edit_json(target, "index/index.json", lambda content: _spoil_tree(content, target.rng))


@damage()
def twisted_json(target: Target) -> None:
    """Text that is JSON for some readers alone."""
    name = target.some(".json")
    text = target.files.get(name, b"")
    if not text:
        return
    target.files[name] = target.rng.choice(
        (
            b"\xef\xbb\xbf" + text,
            text.decode("utf-8", "replace").encode("utf-16"),
            b"[" * 100_000,
            b"[" * 100_000 + b"]" * 100_000,
            text.replace(b'"dim"', b'"dim": 1, "dim"'),
            text.replace(b"12", b"NaN"),
            text.replace(b"12", b"1e999"),
            text.replace(b"12", b"9" * 6000),
            text.replace(b"{", b'{"\\ud800": 1, ', 1),
            text + b"{}",
            b"null",
        )
    )


# safetensors: model.safetensors and the index's space.safetensors.


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _join(header: Any, body: bytes, rng: random.Random, size: int | None = None) -> bytes:
    text = _text(header, rng)
    text += b" " * (-len(text) % 8)
    return ((len(text) if size is None else size) % 2**64).to_bytes(8, "little") + text + body


_DTYPES = (
    "F32",
    "F16",
    "BF16",
    "I8",
    "U8",
    "I16",
    "I32",
    "I64",
    "F64",
    "BOOL",
    "F8_E4M3",
    "F4",
    "C64",
    "X",
    "",
    3,
    None,
)


@damage(6)
def hostile_header(target: Target) -> None:
    name, rng = target.some(".safetensors"), target.rng
    header, body = _split(target.files[name])
    tensor = header[rng.choice([key for key in header if key != "__metadata__"])]
    begin, end = tensor["data_offsets"]
    size: int | None = None
    way = rng.randrange(8)
    if way == 0:
        size = rng.choice((0, 1, 7, 8, 2**16, 10**8, 10**8 + 1, 2**32, 2**40, 2**63, 2**64 - 1, 2**64 - 8, len(body)))
    elif way == 1:
        tensor["data_offsets"] = rng.choice(
            (
                *([end, begin], [begin, end + 4], [begin + 4, end + 4], [begin - 4, end - 4], [0, end - begin]),
                *([begin, 2**63], [begin, 2**64], [2**64 - 4, 4], [-4, 4], [0, 0], [begin], [begin, end, end], "x"),
                *([len(body) - 4, len(body) + end - begin - 4], [begin, begin], [0, len(body)], None, [0.5, 4.5]),
            )
        )
    elif way == 2:
        tensor["dtype"] = rng.choice(_DTYPES)
    elif way == 3:
        shape = list(tensor["shape"])
        tensor["shape"] = rng.choice(
            (
                *(shape[::-1], [math.prod(shape)], [1, *shape], [*shape, 1], shape[:-1], [], [0], [0, *shape]),
                *([-1, *shape], [2**32, 2**32], [2**62, 4], [2**64 - 1], [2**63, 2], [-1, -math.prod(shape)], None),
                *([1] * 100, [1.0] * len(shape), "12", [str(side) for side in shape], [side + 1 for side in shape]),
            )
        )
    elif way == 4:
        header = _spoil_tree(header, rng)
    elif way == 5:
        header["__metadata__"] = rng.choice(
            ({"a": "b"}, {"fastlvm": "{"}, {"fastlvm": "[]"}, {"a": 1}, 3, None, DEEP, {})
        )
    elif way == 6:
        body = rng.choice((body[: rng.randrange(len(body) + 1)], body + bytes(8), b"", body[4:], body * 2))
    else:
        header = rng.choice(([], None, 3, "x", {}, DEEP, {"a": {}}, [header]))
    target.files[name] = _join(header, body, rng, size)


class Tensor(NamedTuple):
    dtype: str
    shape: list[int]
    data: bytes


def _read(data: bytes) -> tuple[dict[str, Tensor], Any]:
    header, body = _split(data)
    about = header.pop("__metadata__", None)
    return {
        name: Tensor(part["dtype"], part["shape"], body[slice(*part["data_offsets"])]) for name, part in header.items()
    }, about


def _write(tensors: dict[str, Tensor], about: Any, rng: random.Random) -> bytes:
    """A file that is in order, whatever the tensors are: as safetensors has it, the widest first."""
    header: dict[str, Any] = {} if about is None else {"__metadata__": about}
    body = b""
    for name in sorted(tensors, key=lambda name: (-_SIZES.get(tensors[name].dtype, 1), name)):
        dtype, shape, data = tensors[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    return _join(header, body, rng)


_SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_ODD_FLOATS = (
    math.nan,
    math.inf,
    -math.inf,
    3e38,
    -3e38,
    1e-45,
    1e-38,
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e10,
    -1e10,
    1e-20,
    100.0,
)


def _edit_tensors(target: Target, edit: Callable[[dict[str, Tensor], str], None]) -> None:
    name = target.some(".safetensors")
    tensors, about = _read(target.files[name])
    edit(tensors, target.rng.choice(sorted(tensors)))
    target.files[name] = _write(tensors, about, target.rng)


@damage(5)
def odd_numbers(target: Target) -> None:
    """NaN, infinities, subnormals and sizes that overflow, in one place of a tensor or everywhere."""
    rng = target.rng

    def edit(tensors: dict[str, Tensor], name: str) -> None:
        dtype, shape, data = tensors[name]
        value = rng.choice(_ODD_FLOATS)
        if dtype == "I8":
            one = struct.pack("b", rng.choice((-128, 127, 0, -1)))
        else:
            one = struct.pack("<f", value)
            one = one[2:] if dtype == "BF16" else one
        if rng.random() < 0.5:
            data = one * (len(data) // len(one))
        else:
            at = rng.randrange(len(data) // len(one)) * len(one)
            data = data[:at] + one + data[at + len(one) :]
        tensors[name] = Tensor(dtype, shape, data)

    _edit_tensors(target, edit)


@damage(5)
def other_tensors(target: Target) -> None:
    """Tensors of another type or shape, spare or missing, in a file that is in order."""
    rng = target.rng

    def resized(dtype: str, shape: list[int], data: bytes) -> Tensor:
        size = math.prod(shape) * _SIZES[dtype]
        return Tensor(dtype, shape, (data * (size // max(len(data), 1) + 1))[:size])

    def edit(tensors: dict[str, Tensor], name: str) -> None:
        dtype, shape, data = tensors[name]
        way = rng.randrange(7)
        if way == 0:
            tensors[name] = resized(rng.choice(sorted(_SIZES)), shape, data)
        elif way == 1:
            other = rng.choice((shape[::-1], [math.prod(shape)], [1, *shape], [*shape, 1], [0], [0, *shape[1:]], []))
            tensors[name] = resized(dtype, other, data)
        elif way == 2:
            tensors[name] = resized(dtype, [rng.choice((side, side + 1, side - 1, 2 * side)) for side in shape], data)
        elif way == 3:
            del tensors[name]
        elif way == 4:
            tensors[rng.choice((f"{name}_scale", f"{name}x", "", "a\nb", "__metadata", "\ud800"))] = tensors[name]
        elif way == 5:
            tensors[name + "_scale"] = resized("F32", shape[:1], struct.pack("<f", rng.choice(_ODD_FLOATS)))
        else:
            scales = [each for each in sorted(tensors) if each.endswith("_scale")]
            for each in rng.sample(scales, min(len(scales), rng.choice((1, 100)))):
                del tensors[each]

    _edit_tensors(target, edit)


# Arrays: golden.npz and the index's keys and groups.


def _npy(array: Any, rng: random.Random) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asanyarray(array), version=rng.choice((None, (1, 0), (2, 0), (3, 0))))
    return file.getvalue()


def _header(text: str, version: tuple[int, int] = (1, 0), length: int | None = None) -> bytes:
    raw = text.encode()
    size = len(raw) if length is None else length
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", size % 2**16) + raw


def _hostile_npy(rng: random.Random) -> bytes:
    def described(shape: str, descr: str = "'<f4'", order: str = "False") -> bytes:
        return _header(f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n") + bytes(64)

    return rng.choice(
        (
            described("(4,)", "'|O'"),
            described("(4611686018427387904, 4)"),
            described("(-1, 4)"),
            described("(1000000000000,)"),
            described("(2**40,)"),
            described("()"),
            described("(4,", "'<f4'"),
            described("(True, False)"),
            described("('a',)"),
            described("(1,) * 10**9"),
            described("(0,)"),
            described("(" * 5000 + ")" * 5000),
            described("(4,)", "'<f4', 'x': 1"),
            described("(4,)", "[('a', '<f4'), ('b', 'O')]"),
            described("(4,)", "'<U9999999999'"),
            described("(4,)", "'zz'"),
            described("(4,)", "'<f4'", "'maybe'"),
            described("(4, 4)", "'>f4'", "True"),
            described("(4,)", "'<M8[s]'"),
            _header("{'descr': '<f4'}"),
            _header("x" * 20_000, (2, 0)),
            _header("\x00" * 40),
            _header("", length=60_000),
            b"\x93NUMPY\x09\x09" + bytes(60),
            b"\x93NUMPY",
            b"\x80\x04K\x01.",
            b"",
        )
    )


@damage(4)
def hostile_golden(target: Target) -> None:
    """golden.npz with members that make no sense, or no zip at all."""
    rng, file = target.rng, io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(file, "w", method) as archive:
        for name in rng.choice((("context", "prediction"), ("context",), ("context", "context"), ())):
            odd = rng.random() < 0.7
            content = _hostile_npy(rng) if odd else _npy(contexts(target.arrays(), 3, 4, 12), rng)
            archive.writestr(name + rng.choice((".npy", ".npy", "")), content)
    data = bytearray(file.getvalue())
    if rng.random() < 0.3:
        data = bytearray(_hostile_npy(rng))
    elif rng.random() < 0.3 and len(data) > 30:
        # flags, method and sizes as the local header and the directory have them
        at = rng.choice(
            (data.find(b"PK\x03\x04") + rng.randrange(4, 30), data.find(b"PK\x01\x02") + rng.randrange(4, 46))
        )
        data[at % len(data)] = rng.choice((0, 1, 8, 9, 0x7F, 0x80, 0xFF))
    target.files["golden.npz"] = bytes(data)


@damage(3)
def other_golden(target: Target) -> None:
    """Golden windows of other shapes, types or values."""
    rng, arrays = target.rng, target.arrays()
    with np.load(io.BytesIO(target.files["golden.npz"])) as golden:
        found = {name: golden[name] for name in golden.files}
    name = rng.choice(("context", "prediction"))
    array = found[name]
    ways: tuple[Callable[[], Any], ...] = (
        lambda: array.astype(rng.choice(("<f8", "<f2", ">f4", "<i4", "<c8", "U5", "?"))),
        lambda: array[:0],
        lambda: array[0],
        lambda: np.array(3.0, np.float32),
        lambda: np.repeat(array, 500, axis=0),
        lambda: array[..., :-1],
        lambda: np.asfortranarray(array),
        lambda: array * np.float32(rng.choice(_ODD_FLOATS)),
        lambda: np.where(arrays.random(array.shape) < 0.1, np.float32(rng.choice(_ODD_FLOATS)), array),
        lambda: array[::-1],
        lambda: np.zeros(len(array), [("a", "<f4"), ("b", "<i4")]),
    )
    file = io.BytesIO()
    with np.errstate(all="ignore"):
        found[name] = rng.choice(ways)()
    np.savez(file, **found)
    target.files["golden.npz"] = file.getvalue()


@damage(3)
def other_rows(target: Target) -> None:
    """Keys or groups of the index of other shapes, types or values."""
    rng = target.rng
    name = f"index/{rng.choice(('keys', 'groups'))}.npy"
    if rng.random() < 0.4:
        target.files[name] = _hostile_npy(rng)
        return
    array = np.load(io.BytesIO(target.files[name]))
    ways: tuple[Callable[[], Any], ...] = (
        lambda: array.astype(rng.choice(("<f4", "<i8", ">i4", "<u4", "?", "U3", "<c8"))),
        lambda: array[:-1],
        lambda: array.ravel(),
        lambda: array - rng.choice((1, 100, 2**31)),
        lambda: array + rng.choice((1, 100, 2**31)),
        lambda: np.where(np.arange(len(array)) == 9, rng.choice((-1, 10**6, 2**31 - 1)), array.T).T,
        lambda: np.zeros_like(array),
        lambda: np.asfortranarray(array),
        lambda: array[0],
        lambda: array[::-1],
    )
    with np.errstate(all="ignore"):
        target.files[name] = _npy(rng.choice(ways)(), rng)


@damage(3)
def odd_faiss(target: Target) -> None:
    """A number of FAISS's file changed: fields of its headers, and sizes and rows of its lists wherever they are."""
    rng, name = target.rng, "index/index.faiss"
    if name not in target.files:
        return odd_lists(target)
    data = bytearray(target.files[name])
    for _ in range(rng.choice((1, 1, 2))):
        layout = rng.choice("bihqQ")
        wide = struct.calcsize(layout)
        at = rng.choice(
            (rng.choice((0, 4, 8, 32, 33, 37, 45, 53, 57, 61, 90)), rng.randrange(260), rng.randrange(10**6))
        )
        at %= len(data) - wide
        (old,) = struct.unpack_from(f"<{layout}", data, at)
        new = rng.choice((old + 1, old - 1, -old, 2 * old, 0, 1, 2**31, 2**34, 2**62, 2**63 - 1, 2**64 - 1, -1))
        data[at : at + wide] = (new % 2 ** (8 * wide)).to_bytes(wide, "little")
    target.files[name] = bytes(data)


@damage(2)
def odd_lists(target: Target) -> None:
    """An array of our own lists with other numbers, or of another shape or type; of another kind, keys or groups."""
    rng = target.rng
    own = [name for name in sorted(target.files) if name.startswith("index/") and name.endswith(".npy")]
    name = rng.choice([one for one in own if one not in ("index/keys.npy", "index/groups.npy")] or own)
    array = np.load(io.BytesIO(target.files[name]))
    if rng.random() < 0.3:
        ways: tuple[Callable[[], Any], ...] = (
            lambda: array.astype(rng.choice(("<f8", "<i8", "<u4", "?"))),
            lambda: array[:-1],
            lambda: np.concatenate([array, array]),
            lambda: array.ravel(),
            lambda: array[None],
        )
        with np.errstate(all="ignore"):
            target.files[name] = _npy(rng.choice(ways)(), rng)
        return
    numbers = array.reshape(-1).view(np.uint8).reshape(array.size, array.itemsize)
    for _ in range(rng.choice((1, 1, 2, 50))):
        pattern = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80", bytes([rng.randrange(256)])))
        numbers[rng.randrange(array.size), rng.randrange(array.itemsize) :] = np.frombuffer(pattern, np.uint8)
    target.files[name] = _npy(array, rng)


@damage(2)
def other_space(target: Target) -> None:
    """A space of other numbers or another size whose id is its own, and which the index names."""
    rng, arrays = target.rng, target.arrays()
    dim = rng.choice((target.space.dim, target.space.dim, 1, 13))
    scale = np.float32(rng.choice((1, 0, 1e30, 1e-30, 3e38)))
    with np.errstate(all="ignore"):
        mean, matrix = scale * arrays.standard_normal(dim, np.float32), arrays.standard_normal((dim, dim), np.float32)
        space = Space(mean, matrix * (scale if rng.random() < 0.5 else np.float32(1)))
    about = {"format": "fastlvm-space-1", "id": space.id, "power": 0.1, "payload_id": None, "fitted_on": ""}
    tensors = {
        "mean": Tensor("F32", [dim], space.mean.tobytes()),
        "matrix": Tensor("F32", [dim, dim], space.matrix.tobytes()),
    }
    target.files["index/space.safetensors"] = _write(tensors, {"fastlvm": json.dumps(about)}, rng)

    def edit(content: Any) -> Any:
        content["space_id"] = space.id
        content["sha256"].setdefault("space.safetensors", "")
        return content

    _edit_json(target, "index/index.json", edit)


# Whole models.

_SIDES = (1, 2, 3, 5, 7, 12, 15, 16, 17, 31, 33, 64, 100)


def _branch(rng: random.Random, width: int, number: int, sequence: bool) -> tuple[list[dict[str, Any]], int]:
    """Layers that fit each other, and what they leave of `width`."""
    at = f"l{number}"
    side = rng.choice((*_SIDES, 70_000)) if width < 20 else rng.choice(_SIDES)
    heads, head = rng.choice((1, 2, 3)), rng.choice((1, 4, 7))
    eps = rng.choice((1e-5, 1.0, 1e-320, 1e300))
    gates = {"prefix": at, "inputs": width, "hidden": side % 101 or 1}
    block = {"prefix": at, "dim": width, "eps": eps, "d_state": rng.choice((1, 5, 40)), "d_conv": rng.choice((1, 2, 9))}
    two = {"n_heads": 2 * heads, "n_groups": rng.choice((1, 2, heads)), "head_dim": head}
    linear = [{"type": "linear", "prefix": at, "inputs": width, "outputs": side, "bias": rng.random() < 0.5}]
    qkv = [{"type": "linear", "prefix": at, "inputs": width, "outputs": 3 * heads * head}]
    attend = {"type": "attention", "dim": heads * head, "heads": heads, "window": rng.choice((1, 2, 5, 2**20))}
    anywhere: tuple[tuple[list[dict[str, Any]], int], ...] = (
        (linear, side),
        ([{"type": rng.choice(("rms_norm", "layer_norm")), "prefix": at, "dim": width, "eps": eps}], width),
        ([{"type": rng.choice(("gelu", "l2_norm"))}], width),
        ([{"type": "residual", "layers": [{"type": "gelu"}, {"type": "l2_norm"}]}], width),
    )
    along: tuple[tuple[list[dict[str, Any]], int], ...] = (
        ([{"type": "mamba_block", **block, "d_inner": side % 101 or 1, "dt_rank": rng.choice((1, 3, 17))}], width),
        ([{"type": "mamba2_block", **block, **two}], width),
        ([*qkv, attend], heads * head),
        ([{"type": rng.choice(("gru", "lstm")), **gates}], gates["hidden"]),
    )
    return rng.choice(anywhere + along if sequence else anywhere)


def _some_layers(rng: random.Random, context: int, dim: int) -> list[dict[str, Any]]:
    layers: list[dict[str, Any]] = []
    width = dim
    if rng.random() < 0.3:
        layers.append({"type": "positions", "prefix": "places", "context": context, "dim": dim})
    for number in range(rng.randrange(4)):
        more, width = _branch(rng, width, number, True)
        layers += more
    if rng.random() < 0.2:
        layers.append({"type": "context_attention", "prefix": "mix", "dim": width, "inner": rng.choice(_SIDES)})
        width *= 2
    else:
        layers.append({"type": "last"})
    for number in range(4, 4 + rng.randrange(3)):
        more, width = _branch(rng, width, number, False)
        layers += more
    if width != dim:
        layers.append({"type": "linear", "prefix": "head", "inputs": width, "outputs": dim})
    if rng.random() < 0.4:
        layers.append({"type": "recency_mixture", "prefix": "mixture", "context": context})
    return layers


@damage(6)
def another_model(target: Target) -> None:
    """Other layers with weights that fit them, and golden windows that fit half the time."""
    rng, arrays = target.rng, target.arrays()
    dim, context = target.space.dim, rng.choice((1, 2, 4, 9, 40, 300, 1500))
    layers = _some_layers(rng, context, dim)
    plan = Plan(layers, context, dim)
    content = json.loads(target.files["config.json"])
    if sum(math.prod(shape) for shape in plan.tensors().values()) > 1 << 21:
        return
    weights = weights_of(plan, arrays)
    kinds = [pack(plan, weights, precision) for precision in PRECISIONS]
    packed: dict[str, np.ndarray] = {}
    for name in weights:
        chosen = rng.choice(kinds)
        packed |= {each: chosen[each] for each in (name, f"{name}_scale") if each in chosen}
    raw = contexts(arrays, rng.choice((1, 2, 9)) if context < 1000 else 1, context, dim)
    golden = Golden(raw, contexts(arrays, len(raw), 1, dim)[:, 0])
    if rng.random() < 0.5:
        with contextlib.suppress(ValueError):
            golden = Golden(raw, Forward(plan, packed, target.space)(raw))
    names = {"float32": "F32", "uint16": "BF16", "int8": "I8"}
    tensors = {name: Tensor(names[each.dtype.name], list(each.shape), each.tobytes()) for name, each in packed.items()}
    file = io.BytesIO()
    np.savez(file, **golden._asdict())
    target.files["golden.npz"] = file.getvalue()
    target.files["model.safetensors"] = _write(tensors, None, rng)
    target.files["config.json"] = _text(content | {"layers": layers, "context": context, "dim": dim}, rng)
