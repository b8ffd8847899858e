"""A stand-in for `mx.fast.metal_kernel` that runs a kernel on the host: the call an Apple GPU would get is executed.

The signature of the kernel is put together from the call as MLX does it (mlx/backend/common/metal_kernel.cpp), the text
is compiled by g++ behind shim.h, and its threads run one by one on the memory of the arrays. What shim.h watches for,
an access outside an array or a race, raises `EmulationError`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

SHIM = Path(__file__).with_name("shim.h")
COMPILER = shutil.which("g++")
CACHE = Path(tempfile.gettempdir()) / f"fastlvm-metal-{os.getuid()}"
MOST_BUFFERS = 31  # that Metal binds
IN_CONSTANT_MEMORY = 8  # elements, from where on MLX passes an input in device memory

TYPES = {
    mx.float32: "float",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.uint32: "uint32_t",
}
VECTORS = {
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "threads_per_threadgroup",
    "threadgroups_per_grid",
    "threads_per_grid",
}
ATTRIBUTES = sorted(
    VECTORS
    | {"thread_index_in_threadgroup", "thread_index_in_simdgroup", "simdgroup_index_in_threadgroup"}
    | {"simdgroups_per_threadgroup", "threads_per_simdgroup"}
)


class EmulationError(AssertionError):
    """A launch did what no kernel may do."""


class _Array(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("lowest", ctypes.c_int64),
        ("highest", ctypes.c_int64),
        ("shape", ctypes.POINTER(ctypes.c_int)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("rank", ctypes.c_int),
        ("loads", ctypes.c_int64),
        ("stores", ctypes.c_int64),
        ("group_loads", ctypes.c_int64),
        ("group_stores", ctypes.c_int64),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        ("arrays", ctypes.POINTER(_Array)),
        ("grid", ctypes.c_int * 3),
        ("group", ctypes.c_int * 3),
        ("most_columns", ctypes.c_int),
        ("ulps", ctypes.c_int),
        ("exps", ctypes.c_int64),
        ("logs", ctypes.c_int64),
        ("barriers", ctypes.c_int64),
        ("simd_ops", ctypes.c_int64),
        ("error", ctypes.c_char * 256),
    )


@dataclass
class Launch:
    """One launch and what it counted; loads and stores by array, as (of threads, of different elements of a group)."""

    name: str
    source: str
    header: str
    template: dict
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    sizes: dict[str, int]
    loads: dict[str, tuple[float, float]] = field(default_factory=dict)
    stores: dict[str, tuple[float, float]] = field(default_factory=dict)
    exps: float = 0
    logs: float = 0
    barriers: float = 0
    simd_ops: float = 0


class Recorder:
    """`Recorder().metal_kernel` takes the place of `mx.fast.metal_kernel`; `launches` are what was run through it.

    With `most_columns` no more threadgroups than that are run along x, and their counts stand for those of all. With
    `ulps`, exp, exp2 and log are off by up to so many units in the last place.
    """

    def __init__(self, most_columns: int = 0, ulps: int = 0) -> None:
        self.launches: list[Launch] = []
        self.most_columns = most_columns
        self.ulps = ulps

    def metal_kernel(
        self,
        name,
        input_names,
        output_names,
        source,
        header="",
        ensure_row_contiguous=True,
        atomic_outputs=False,
        compile_options=None,
    ):
        assert not atomic_outputs

        def launch(*, inputs, output_shapes, output_dtypes, grid, threadgroup, template=(), **rest):
            assert not rest.keys() - {"stream", "verbose"}, rest
            assert len(inputs) == len(input_names)
            assert len(output_shapes) == len(output_dtypes) == len(output_names)
            assert all(type(n) is int and n > 0 for n in (*grid, *threadgroup)), (grid, threadgroup)
            assert all(n % m == 0 for n, m in zip(grid, threadgroup, strict=True)), "threadgroups of several sizes"
            assert np.prod(threadgroup) <= 1024
            if ensure_row_contiguous:
                inputs = [mx.contiguous(x) for x in inputs]
            mx.eval(inputs)
            held = [_raw(x) for x in inputs]
            assert all(x.size for x in held), "an empty array has no buffer to bind"
            results = [_poison(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
            record = Launch(name, source, header, dict(template), tuple(grid), tuple(threadgroup), {})
            library = _library(
                name,
                header,
                source,
                list(zip(input_names, [TYPES[x.dtype] for x in inputs], strict=True)),
                list(zip(output_names, [TYPES[t] for t in output_dtypes], strict=True)),
                template,
            )
            _run(library, [*input_names, *output_names], [*held, *results], record, self.most_columns, self.ulps)
            self.launches.append(record)
            return [_mlx(x, dtype) for x, dtype in zip(results, output_dtypes, strict=True)]

        return launch


def _raw(x: mx.array) -> np.ndarray:
    """The memory of an evaluated array, without a copy."""
    if x.dtype == mx.bfloat16:
        x = x.view(mx.uint16)
        mx.eval(x)
    return np.asarray(memoryview(x))


def _poison(shape, dtype) -> np.ndarray:
    """An output as it comes: NaN stands for whatever there was."""
    kind = {mx.float32: np.float32, mx.float16: np.float16, mx.bfloat16: np.uint16, mx.int32: np.int32}[dtype]
    return np.full(int(np.prod(shape)) * np.dtype(kind).itemsize, 0xFF, dtype=np.uint8).view(kind).reshape(shape)


def _mlx(x: np.ndarray, dtype) -> mx.array:
    out = mx.array(x)
    return out.view(mx.bfloat16) if dtype == mx.bfloat16 else out


def _run(library, names: list[str], arrays: list[np.ndarray], record: Launch, most_columns: int, ulps: int) -> None:
    structs = (_Array * len(arrays))()
    held = []
    for name, x, struct in zip(names, arrays, structs, strict=True):
        strides = [s // x.itemsize for s in x.strides]
        reach = [(n - 1) * s for n, s in zip(x.shape, strides, strict=True)]
        held += [(ctypes.c_int * max(x.ndim, 1))(*x.shape), (ctypes.c_int64 * max(x.ndim, 1))(*strides)]
        struct.name = name.encode()
        struct.data = x.ctypes.data
        struct.lowest = sum(min(r, 0) for r in reach)
        struct.highest = sum(max(r, 0) for r in reach) + 1
        struct.shape, struct.strides, struct.rank = held[-2], held[-1], x.ndim
    call = _Call(structs, record.grid, record.threadgroup, most_columns, ulps)
    failed = library.emu_launch(ctypes.byref(call))
    if failed:
        raise EmulationError(f"{record.name} {record.template}: {call.error.decode()}")
    record.sizes = {name: x.size for name, x in zip(names, arrays, strict=True)}
    columns = record.grid[0] // record.threadgroup[0]
    each = columns / min(columns, most_columns or columns)
    for name, struct in zip(names, structs, strict=True):
        record.loads[name] = struct.loads * each, struct.group_loads * each
        record.stores[name] = struct.stores * each, struct.group_stores * each
    for count in ("exps", "logs", "barriers", "simd_ops"):
        setattr(record, count, getattr(call, count) * each)


def parameters(source, inputs, outputs) -> list[tuple[str, str, str]]:
    """(type, name, argument) of all that a kernel is given, in MLX's order; inputs and outputs are (name, dtype)."""
    found = []
    for i, (name, kind) in enumerate(inputs):
        found.append((f"emu::In<{kind}, {i}>", name, f"{{&m[{i}], 0}}"))
        for what, of in (("shape", "int"), ("strides", "int64_t")):
            if f"{name}_{what}" in source:
                argument = f"{{m[{i}].array->{what}, m[{i}].array->rank}}"
                found.append((f"emu::Numbers<{of}>", f"{name}_{what}", argument))
        assert f"{name}_ndim" not in source
    for i, (name, kind) in enumerate(outputs, start=len(inputs)):
        found.append((f"emu::Out<{kind}, {i}>", name, f"{{&m[{i}], 0}}"))
    assert len(found) <= MOST_BUFFERS, f"{len(found)} buffers"
    known = [name for name in ATTRIBUTES if name in source]
    return found + [("uint3" if name in VECTORS else "uint", name, f"p.{name}") for name in known]


def translation_unit(name, header, source, inputs, outputs, template) -> str:
    """The text that is compiled: shim.h, the header and the source as they are, between a signature and a caller."""
    given = parameters(source, inputs, outputs)
    kinds, values = [], []
    for key, value in template:
        kind = {bool: "bool", int: "int"}.get(type(value), "typename")
        kinds.append(f"{kind} {key}")
        values.append(TYPES[value] if kind == "typename" else str(value).lower())
    lines = [
        f'#include "{SHIM}"',
        f'#line 1 "{name} header"',
        header,
        f"template <{', '.join(kinds)}>",
        f"static void kernel({', '.join(f'{kind} {key}' for kind, key, _ in given)}) {{",
        f'#line 1 "{name}"',
        source,
        "}",
        'extern "C" int emu_launch(emu::Call* call) {',
        f"  return emu::launch(call, {len(inputs) + len(outputs)}, [](const emu::Position& p, emu::Memory* m) {{",
        f"    kernel<{', '.join(values)}>({', '.join(argument for _, _, argument in given)});",
        "  });",
        "}",
    ]
    return "\n".join(lines)


_loaded: dict[str, ctypes.CDLL] = {}


def _library(*parts) -> ctypes.CDLL:
    """The shared object of a kernel and its types, compiled unless it was before."""
    text = translation_unit(*parts)
    key = hashlib.sha256((text + SHIM.read_text()).encode()).hexdigest()[:32]
    if key not in _loaded:
        path = CACHE / f"{key}.so"
        if not path.exists():
            _compile(text, path)
        _loaded[key] = ctypes.CDLL(str(path))
    return _loaded[key]


def _compile(text: str, path: Path) -> None:
    CACHE.mkdir(mode=0o700, exist_ok=True)
    assert CACHE.stat().st_uid == os.getuid(), f"{CACHE} is somebody else's"
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        source, built = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
        source.write_text(text)
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
        # An index outside an array of a thread ends the process: nothing would watch it otherwise.
        flags += ["-fsanitize=bounds", "-fsanitize-undefined-trap-on-error"]
        result = subprocess.run([COMPILER, *flags, str(source), "-o", str(built)], capture_output=True, text=True)
        if result.returncode:
            raise EmulationError(f"does not compile:\n{result.stderr[:6000]}")
        built.replace(path)
