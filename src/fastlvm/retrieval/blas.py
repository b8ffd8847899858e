"""`from fastlvm.retrieval.blas import faiss`: FAISS, loaded with matrix products made for this processor.

FAISS's wheels bring an OpenBLAS that does not know every new processor of Intel's and takes its slowest kernels there,
those of SSE3: k-means and batches of queries take five times as long. Which kernels it takes can be named in the
environment while it is loaded, and at no other time.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from fastlvm import _C

_CORE = "OPENBLAS_CORETYPE"


def __getattr__(name: str) -> Any:
    if name != "faiss":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if "faiss" in sys.modules:
        return sys.modules["faiss"]
    named = _CORE not in os.environ and "avx512" in _C.isas()
    if named:
        os.environ[_CORE] = "SkylakeX"
    try:
        import faiss
    finally:
        if named:
            del os.environ[_CORE]
    return faiss
