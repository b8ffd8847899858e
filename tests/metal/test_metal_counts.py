"""What the Metal kernels load, store and exponentiate, beside the least they could."""

from __future__ import annotations

import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed")

from . import counts

MOST = 1.2  # times the least
SIZES = {
    "short scan": (counts.scan_rows, (8, 64, 5, 16)),
    "long scan": (counts.scan_rows, (1, 64, 300, 16)),
    "short convolution": (counts.conv_rows, (8, 64, 5)),
    "long convolution": (counts.conv_rows, (1, 64, 320)),
    "steps": (counts.step_rows, (8, 64, 16)),
}


@pytest.mark.parametrize("name", SIZES)
def test_streams_are_read_and_written_once_and_nothing_is_computed_twice(name, recorder):
    rows, sizes = SIZES[name]
    for row in rows(recorder, *sizes):
        assert 1 <= row.streamed <= MOST, row.kernel
        assert 0.9 <= row.results <= MOST, row.kernel  # no state is kept before the first chunk
        assert 0.99 <= row.exponentials <= MOST, row.kernel


def test_a_sample_of_threadgroups_counts_for_all(recorder):
    whole = counts.scan_rows(recorder, 4, 1024, 5, 16)
    recorder.most_columns = 1
    sample = counts.scan_rows(recorder, 4, 1024, 5, 16)
    assert sample[0].launch.grid[0] > sample[0].launch.threadgroup[0]
    for a, b in zip(whole, sample, strict=True):
        assert a.launch.loads == b.launch.loads
        assert a.launch.stores == b.launch.stores
        assert a.launch.exps == b.launch.exps
