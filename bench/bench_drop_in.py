"""Models of transformers with and without fastlvm, and mambapy: prefill, decoding, training and its peak memory.

On 1 and 2 threads, in float32 and bfloat16. Logits and losses are compared before anything is timed.
"""

from __future__ import annotations

import pytest
import torch

import contenders
import memory
from drop_in_cases import CONTENDERS, DTYPES, LEFT_OUT, LLAMA, PASSES, PATCHED, SLOW, STEP, call_of, patch, unpatch
from paired import Contender, measure

SLOW_CALL, ONCE = 5.0, 40.0  # seconds of a call that is made once less, and of one that is made once in all
SAME_WEIGHTS = (PATCHED, SLOW, LLAMA)
# Of logits and losses from transformers' with fastlvm; bfloat16 is rounded in other places.
APART = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


@pytest.fixture(autouse=True)
def unpatched():
    yield
    unpatch()


@pytest.mark.parametrize("count", (2, 1))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("timed", PASSES, ids=lambda timed: timed.name)
@pytest.mark.benchmark(group="drop-in")
def test_drop_in(timed, dtype, count, benchmark, threads, plan, drop_in):
    if count not in threads:
        pytest.skip(f"wants {count} threads")
    made = []
    for name in CONTENDERS[timed]:
        if timed == STEP and name == SLOW and count < threads[-1]:
            drop_in.refuse(timed, dtype, name, "timed on more threads alone", count)
            continue
        try:
            call = call_of(timed, name, DTYPES[dtype])
        except ImportError as error:
            drop_in.refuse(timed, dtype, name, f"cannot be imported: {error}", count)
            continue
        one = Contender(
            name,
            call,
            count,
            contenders.BEST,
            decisive=timed.target is not None and name in (PATCHED, SLOW),
            prepare=patch if name == PATCHED else unpatch,
        )
        try:
            found = one.trial().float()
        except RuntimeError as error:
            if name in (PATCHED, SLOW):
                raise
            drop_in.refuse(timed, dtype, name, f"fails: {str(error).splitlines()[0]}", count)
            continue
        made.append((one, found))
        if name in SAME_WEIGHTS:
            apart = contenders.relative(found, made[0][1])
            assert apart <= APART[DTYPES[dtype]], f"{timed.title}: {name} is {apart:.1e} apart"
        if one.expected < SLOW_CALL:
            one.trial()  # the first call of a model grows torch's caches
    lead, *others = (one for one, _ in made)
    once = [one for one in others if one.expected > ONCE]
    measure(benchmark, lead, [one for one in others if one not in once], plan)
    for one in once:
        one.seconds.append(one.expected)
    drop_in.add(timed, dtype, [one for one, _ in made])
    for (of, name), reason in LEFT_OUT.items():
        if of == timed:
            drop_in.refuse(timed, dtype, name, reason, count)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.benchmark(group="drop-in")
def test_memory_of_a_training_step(dtype, benchmark, threads, drop_in):
    peaks = {name: memory.of_training(name, dtype, threads[-1]) for name in CONTENDERS[STEP]}
    drop_in.memory(dtype, peaks)
    benchmark.extra_info.update(peaks)
    benchmark.pedantic(lambda: None, rounds=1)  # what is measured is in other processes
