"""A reader of the pickles that numpy writes for object arrays, in which no name but numpy's own can be reached.

Even numpy's are not called: the pickle builds inert records of what numpy would have been asked to build, and plain
arrays are made from those afterwards, with every size checked. A pickle that names anything else is refused at that
name, before anything runs.
"""

from __future__ import annotations

import math
import pickle
from typing import IO, Any, ClassVar, cast

import numpy as np

from fastlvm.errors import InputError, IntegrityError

_FLAT = "?bhilqBHILQefdSU"


class _Dtype:
    """numpy.dtype(spec), with the byte order its state sets."""

    __slots__ = ("order", "spec")

    def __init__(self, spec: Any, align: Any = False, copy: Any = False) -> None:
        if not isinstance(spec, str) or len(spec) > 16:
            raise pickle.UnpicklingError("a dtype that is not a plain one")
        self.spec, self.order = spec, "="

    def __setstate__(self, state: Any) -> None:
        plain = isinstance(state, tuple) and len(state) == 8 and state[0] == 3 and state[2:5] == (None, None, None)
        if not plain or state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("a dtype that is not a plain one")
        self.order = state[1]

    def real(self) -> np.dtype[Any]:
        try:
            dtype = np.dtype(self.spec)
        except (TypeError, ValueError, SyntaxError) as error:
            raise pickle.UnpicklingError(f"a dtype {self.spec!r}") from error
        if dtype.char != "O" and (dtype.char not in _FLAT or dtype.itemsize == 0 or dtype.subdtype is not None):
            raise pickle.UnpicklingError(f"a dtype {self.spec!r}")
        return (
            dtype
            if self.order == "|"
            else dtype.newbyteorder("<" if self.order == "<" else ">" if self.order == ">" else "=")
        )


class Array:
    """A numpy array as the pickle describes it; `value` makes it."""

    __slots__ = ("_data", "_dtype", "_fortran", "_shape")

    def __init__(self) -> None:
        self._dtype: _Dtype | None = None

    def __setstate__(self, state: Any) -> None:
        if not (isinstance(state, tuple) and len(state) == 5 and isinstance(state[2], _Dtype)):
            raise pickle.UnpicklingError("an array that is not numpy's")
        _, self._shape, self._dtype, self._fortran, self._data = state

    def value(self) -> np.ndarray:
        if self._dtype is None:
            raise pickle.UnpicklingError("an array without content")
        shape, data, dtype = self._shape, self._data, self._dtype.real()
        if not (isinstance(shape, tuple) and all(type(side) is int and 0 <= side < 2**48 for side in shape)):
            raise pickle.UnpicklingError("an array with a broken shape")
        count = math.prod(shape)
        if dtype.hasobject:
            if not isinstance(data, list) or len(data) != count:
                raise pickle.UnpicklingError("an array whose content does not fill its shape")
            result = np.empty(count, dtype=object)
            result[:] = data
        else:
            if not isinstance(data, (bytes, bytearray)) or len(data) != count * dtype.itemsize:
                raise pickle.UnpicklingError("an array whose content does not fill its shape")
            result = np.frombuffer(data, dtype=dtype)
        return result.reshape(shape, order="F" if self._fortran is True else "C")


def _reconstruct(subtype: Any, shape: Any, typecode: Any) -> Array:
    if subtype is not _NDARRAY:
        raise pickle.UnpicklingError("an array type that is not numpy.ndarray")
    return Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any, axis_order: Any = None) -> Array:
    if axis_order is not None:
        raise pickle.UnpicklingError("an array with its axes in another order")
    array = Array()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


def _scalar(dtype: Any, data: Any = None) -> Any:
    array = Array()
    array.__setstate__((1, (), dtype, False, data))
    return array.value()[()]


def _no_call(*_: Any, **__: Any) -> None:
    raise pickle.UnpicklingError("a bare numpy.ndarray")


class _Global:
    """What a name in the pickle stands for; it can be called and nothing else."""

    __slots__ = ("_function",)

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, _: Any) -> None:
        raise pickle.UnpicklingError("a name that the file tries to change")


_NDARRAY = _Global(_no_call)
_ADMITTED = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Global(_Dtype),
    **{
        (f"{core}.{module}", name): _Global(function)
        for core in ("numpy.core", "numpy._core")
        for module, name, function in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}


_OPCODES = """
PROTO FRAME STOP MARK POP MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET
NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 INT LONG LONG1 LONG4 FLOAT BINFLOAT
BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
EMPTY_LIST APPEND APPENDS LIST EMPTY_DICT SETITEM SETITEMS DICT EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
GLOBAL STACK_GLOBAL REDUCE BUILD
"""


def _load_bytearray(reader: Any) -> None:
    reader.append(reader.read(int.from_bytes(reader.read(8), "little")))


class _Unpickler(pickle._Unpickler):
    """The reader in Python, whose memo is a dict: the one in C allocates what a forged index asks for.

    It knows only the opcodes of plain values and of numpy's arrays.
    """

    dispatch: ClassVar = {
        **{code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in _OPCODES.split())},
        pickle.BYTEARRAY8[0]: _load_bytearray,  # the original makes room for what is claimed before it reads
    }

    def __init__(self, file: IO[bytes], where: str) -> None:
        super().__init__(file)
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        found = _ADMITTED.get((module, name))
        if found is None:
            raise InputError(
                f"{self._where} names {_short(module)}.{_short(name)}, which its pickle could run: it was refused and "
                "nothing was run; take the file from a source you trust"
            )
        return found


def _short(name: str) -> str:
    return str(name).encode("unicode_escape").decode()[:60]


class _Bounded:
    """A stream that does not try to read more than the whole file holds."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._read, self._size = file.read, size
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        if count > self._size:
            raise EOFError
        return self._read(count)


def read(file: IO[bytes], where: str, size: int) -> np.ndarray:
    """The object array whose pickle starts at the stream's position; its entries are plain values and `Array`s.

    size: bytes in the stream at most.
    Raises InputError for a pickle that names anything but numpy's arrays, IntegrityError for a damaged one.
    """
    try:
        found = _Unpickler(cast(Any, _Bounded(file, size)), where).load()
        array = found.value() if isinstance(found, Array) else None
    except InputError:
        raise
    except EOFError as error:
        raise IntegrityError(f"{where} is truncated: restore the file") from error
    except Exception as error:  # a hostile or damaged pickle can raise whatever its content leads to
        if "truncated" in str(error) or "exhausted" in str(error):
            raise IntegrityError(f"{where} is truncated: restore the file") from error
        what = f"{type(error).__name__}: " + " ".join(str(error).split())[:120]
        raise IntegrityError(f"{where} holds a pickle that numpy would not have written ({what})") from error
    if array is None:
        raise InputError(f"{where} holds a pickled {type(found).__name__}, and an array is wanted")
    return array
