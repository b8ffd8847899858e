"""Small kernels that ask the emulation a question."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from .emulator import Recorder


def run(*sources, which=0, threads=64, groups=1, x=None, size=64, dtype=mx.float32, ulps=0):
    """sources[which], of all that are compiled, on input x [64] (0, 1, 2 …): output y [size], and what was counted.

    A threadgroup has an array `cells` [64] in common.
    """
    recorder = Recorder(ulps=ulps)
    lines = ["const int me = thread_index_in_threadgroup, lane = thread_index_in_simdgroup, chosen = which[0];"]
    lines += ["SHARED(float, cells, 64);"]
    lines += [f"if (chosen == {i}) {{\n{source}\n}}" for i, source in enumerate(sources)]
    header = "#define BARRIER(kind) metal::threadgroup_barrier(metal::mem_flags::mem_##kind)\n"
    kernel = recorder.metal_kernel(
        "probe", ["x", "which"], ["y"], "\n".join(lines), header=header, ensure_row_contiguous=False
    )
    (y,) = kernel(
        inputs=[mx.arange(64, dtype=mx.float32) if x is None else x, mx.array([which], dtype=mx.int32)],
        template=[("K", 1)],
        grid=(threads * groups, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(size,)],
        output_dtypes=[dtype],
    )
    return np.array(y.astype(mx.float32)), recorder.launches[-1]


def index_outside() -> None:
    """Ends the process."""
    run("float a[4]; for (int i = 0; i < 5; ++i) a[i + me] = x[i]; y[me] = a[0];")
