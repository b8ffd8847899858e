"""The scan for whoever reads the last tokens alone: fewer outputs, the same values, the same final state."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastlvm import _C
from fastlvm.ops.ssm_scan import cpu

from .cases import Scan

ORDER = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "initial_state", "cu_seqlens")


def _args(case, dtype=torch.float32):
    inputs = case.inputs(dtype, torch.float64 if dtype == torch.float64 else torch.float32)
    arrays = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    return [*(arrays.get(name, False if name == "delta_softplus" else None) for name in ORDER), True]


CASES = [Scan(length=n, state=s, channels=d) for n in (1, 5, 8, 70) for s, d in ((16, 4), (128, 33), (5, 3))]
CASES += [Scan(options=()), Scan(options=("z", "D"), state=128, length=5), Scan(B=2, C="dn", length=9), Scan(batch=0)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_last_outputs_are_those_of_the_whole(case, isa):
    args = _args(case)
    whole, state = cpu.run(*args)
    for outputs in {0, 1, case.length // 2, case.length}:
        out, last = cpu.scan_last(*args, outputs=outputs)
        assert out.shape == (*whole.shape[:2], outputs)
        assert np.allclose(out, whole[..., case.length - outputs :], rtol=1e-6, atol=1e-6)
        assert np.allclose(last, state, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype, isa):
    args = _args(Scan(length=6, state=16), dtype)
    whole, state = cpu.run(*args)
    out, last = cpu.scan_last(*args, outputs=2)
    assert (out.dtype, last.dtype) == (whole.dtype, state.dtype)
    assert np.allclose(out, whole[..., 4:], rtol=1e-3)


def test_nothing_is_written_beyond_a_short_output(isa):
    case = Scan(length=7, state=16, channels=5)
    args = _args(case)
    memory = np.full((case.batch, case.channels, 9), 77, np.float32)
    _C.ssm_scan(*args[:-2], memory[..., 3:5], None)
    assert np.allclose(memory[..., 3:5], cpu.run(*args)[0][..., 5:], rtol=1e-6, atol=1e-6)
    memory[..., 3:5] = 77
    assert (memory == 77).all()


def test_a_channel_last_input_gives_a_channel_last_output(isa):
    args = _args(Scan(length=6, channels=8))
    args[0] = np.ascontiguousarray(args[0].transpose(0, 2, 1)).transpose(0, 2, 1)
    out, _ = cpu.scan_last(*args, outputs=3)
    assert out.strides[1] == out.itemsize


def test_more_outputs_than_tokens_are_refused():
    args = _args(Scan(length=6))
    with pytest.raises(ValueError, match=r"out: got shape \(2, 4, 7\), wants \(B, D, L\) = \(2, 4, 6\)"):
        cpu.scan_last(*args, outputs=7)


def test_packed_sequences_have_all_their_outputs():
    args = _args(Scan(batch=1, length=6, options=()))
    args[-2] = np.array([0, 2, 6])
    with pytest.raises(ValueError, match=r"out: got shape \(1, 4, 5\), wants \(B, D, L\) = \(1, 4, 6\)"):
        cpu.scan_last(*args, outputs=5)
