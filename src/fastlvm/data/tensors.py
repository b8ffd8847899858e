"""Reading safetensors files: the tensors as views of the mapped file, and the texts beside them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from fastlvm.errors import InputError, brief

DTYPES = {"F32": np.float32, "BF16": np.uint16, "I8": np.int8}
"""The types that are read; of BF16 the bits, for which numpy has no type."""


def read(path: Path, dtypes: tuple[str, ...] = tuple(DTYPES)) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Every tensor, and the metadata. Raises InputError, without the file's name, for another file or other dtypes."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as checked:  # offsets, sizes and shapes of the whole header
            names, metadata = set(checked.keys()), checked.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"no readable safetensors file ({brief(error)})") from error
    mapped = np.memmap(path, np.uint8, mode="r")
    start = 8 + int(mapped[:8].view("<u8")[0])
    header = json.loads(mapped[8:start].tobytes())
    tensors = {}
    for name in names:
        entry = header[name]
        if entry["dtype"] not in dtypes:
            raise InputError(f"tensor {brief(name)} is {entry['dtype']}, and {' or '.join(dtypes)} is wanted")
        begin, end = (start + offset for offset in entry["data_offsets"])
        try:
            values = mapped[begin:end].view(np.ndarray).view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
        except ValueError as error:  # more axes than numpy has, or named twice and checked by the other entry
            raise InputError(f"tensor {brief(name)} cannot be read ({brief(error)})") from error
        tensors[name] = np.require(values, requirements="A")
    return tensors, metadata
