"""Models of transformers compute on fastlvm what they compute without it: prefill, decoding and training."""

from __future__ import annotations

import collections
import copy
from typing import ClassVar

import pytest
import torch
from transformers_small import SMALL, VOCABULARY, cache_of, small

from fastlvm.compat import patch_transformers
from fastlvm.compat.transformers import _functions as functions
from fastlvm.compat.transformers import _mixers as mixers

transformers = pytest.importorskip("transformers", minversion="5.16", reason="transformers 5.16 or newer is missing")

MODELS = tuple(SMALL)
SSD = ("mamba2", "bamba", "zamba2", "falcon_h1")
DEVICES = (
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
)
TOLERANCE = 1e-5

pytestmark = [pytest.mark.parametrize("model", MODELS), pytest.mark.filterwarnings("error::UserWarning:fastlvm")]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small are slower on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokens(*shape, seed=1):
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(*lengths):
    """Token ids [B, L] and attention mask [B, L], padding first."""
    longest = max(lengths)
    ids, mask = tokens(len(lengths), longest), torch.ones(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, : longest - length] = mask[row, : longest - length] = 0
    return ids, mask


def off(got, want):
    """Largest difference, relative to the largest value wanted."""
    return ((got - want).abs().max() / want.abs().max()).item()


def both(model, call):
    """call() without fastlvm and with it; the two start from the same cache where `call` makes its own."""
    want = call()
    with patch_transformers(model, strict=True):
        got = call()
    return got, want


@pytest.fixture
def calls(monkeypatch):
    """How often each op of fastlvm ran."""
    counts = collections.Counter()

    def spied(name, op):
        def run(*args, **kwargs):
            counts[name] += 1
            return op(*args, **kwargs)

        return run

    for name in ("causal_conv1d", "causal_conv1d_step", "ssm_scan", "ssm_step", "ssd_scan", "ssd_step"):
        monkeypatch.setattr(functions, name, spied(name, getattr(functions, name)))
    monkeypatch.setattr(mixers, "mamba_step", spied("mamba_step", mixers.mamba_step))
    return counts


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [1, 2, 21])
def test_logits_equal_those_of_the_slow_path(model, length, device):
    net, ids = small(transformers, model).to(device), tokens(2, length).to(device)
    with torch.no_grad():
        got, want = both(model, lambda: net(ids).logits)
    assert off(got, want) <= TOLERANCE


@pytest.mark.parametrize("rows", [2, 9])
def test_prefill_decoding_and_training_run_on_fastlvm(model, rows, calls):
    net, ids = small(transformers, model), tokens(rows, 9)
    op, layers = ("ssd" if model in SSD else "ssm"), len(_mixers(net))
    one_call = op == "ssm" and rows <= 8
    steps = dict.fromkeys(["mamba_step"] if one_call else [f"{op}_step", "causal_conv1d_step"], layers)
    with patch_transformers(model, strict=True):
        with torch.no_grad():
            out = net(ids, use_cache=True)
            assert calls == {"causal_conv1d": layers, f"{op}_scan": layers}
            calls.clear()
            net(ids[:, :1], **cache_of(out), use_cache=True)
            assert calls == steps
        calls.clear()
        net.train()(ids, labels=ids).loss.backward()
        assert calls == {"causal_conv1d": layers, f"{op}_scan": layers}


def _mixers(net):
    return [x for x in net.modules() if hasattr(x, "A_log")]


def test_a_left_padded_batch_has_the_logits_of_the_slow_path(model):
    net = small(transformers, model)
    ids, mask = left_padded(13, 5, 1)
    with torch.no_grad():
        got, want = both(model, lambda: net(ids, attention_mask=mask).logits)
    kept = mask.bool()
    assert off(got[kept], want[kept]) <= TOLERANCE


@pytest.mark.parametrize("lengths", [(7,), (11, 4)], ids=["one row", "left-padded"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_gives_the_tokens_of_the_slow_path(model, lengths, beams):
    net = small(transformers, model)
    ids, mask = left_padded(*lengths)
    options = {"max_new_tokens": 10, "do_sample": False, "num_beams": beams}
    got, want = both(model, lambda: net.generate(ids, attention_mask=mask, **options))
    assert got.shape == (len(lengths), max(lengths) + 10)
    assert torch.equal(got, want)


@pytest.mark.parametrize("device", DEVICES)
def test_a_cache_goes_on_as_it_does_in_the_slow_path(model, device):
    net, ids = small(transformers, model).to(device), tokens(2, 16).to(device)

    def run():
        outs, known = [], {}
        for piece in ids.split([7, 1, 1, 5, 1, 1], dim=1):
            out = net(piece, **known, use_cache=True)
            known = cache_of(out)
            outs.append(out.logits)
        return torch.cat(outs, dim=1)

    with torch.no_grad():
        got, want = both(model, run)
    assert off(got, want) <= TOLERANCE


def test_a_cache_is_passed_between_the_slow_path_and_fastlvm(model):
    net, ids = small(transformers, model), tokens(2, 9)

    def step(piece, known):
        out = net(piece, **known, use_cache=True)
        return out.logits, cache_of(out)

    def run(patched):
        outs, known = [], {}
        for piece, on_fastlvm in zip(ids.split([6, 1, 1, 1], dim=1), patched, strict=True):
            with patch_transformers(model if on_fastlvm else (), strict=True):
                logits, known = step(piece, known)
            outs.append(logits)
        return torch.cat(outs, dim=1)

    with torch.no_grad():
        want = run([False] * 4)
        assert off(run([False, True, True, False]), want) <= TOLERANCE
        assert off(run([True, False, False, True]), want) <= TOLERANCE


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
def test_loss_curves_coincide(model, padded):
    start = small(transformers, model)
    ids, mask = left_padded(12, 7) if padded else left_padded(12, 12)

    def train():
        net = copy.deepcopy(start).train()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        losses = []
        for _ in range(6):
            loss = net(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    got, want = both(model, train)
    assert want[-1] < want[0]
    assert off(got, want) <= TOLERANCE


def test_gradients_equal_those_of_the_slow_path(model):
    net, ids = small(transformers, model).train(), tokens(2, 19)

    def gradients():
        net.zero_grad()
        net(ids, labels=ids).loss.backward()
        return {name: x.grad.clone() for name, x in net.named_parameters() if x.grad is not None}

    got, want = both(model, gradients)
    assert got.keys() == want.keys() and any(name.endswith("A_log") for name in got)
    largest = max(x.abs().max() for x in want.values())
    for name in want:
        assert (got[name] - want[name]).abs().max() <= 1e-4 * want[name].abs().max() + 1e-6 * largest, name


def test_a_token_with_gradients_is_left_to_transformers(model, calls):
    net, ids = small(transformers, model), tokens(2, 6)

    def run():
        known = cache_of(net(ids[:, :5], use_cache=True))
        calls.clear()
        return net(ids[:, 5:], **known, use_cache=True).logits

    got, want = both(model, run)
    assert not calls and got.requires_grad
    assert off(got.detach(), want.detach()) <= TOLERANCE


def in_a_hook(net, seen):
    return _mixers(net)[0].x_proj.register_forward_hook(lambda *call: seen.append(call) or 2 * call[2])


def in_a_hook_of_all(net, seen):
    doubled = _mixers(net)[0].x_proj
    return torch.nn.modules.module.register_module_forward_hook(
        lambda part, given, out: 2 * out if part is doubled and not seen.append(out) else None
    )


def in_a_forward_of_its_own(net, seen):
    doubled = _mixers(net)[0].x_proj
    forward = doubled.forward
    doubled.forward = lambda x: 2 * forward(x) if not seen.append(x) else None


class Doubled(torch.nn.Linear):
    def forward(self, x):
        self.seen.append(x)
        return 2 * super().forward(x)


def in_another_class(net, seen):
    _mixers(net)[0].x_proj.__class__, _mixers(net)[0].x_proj.seen = Doubled, seen


class Halves(torch.Tensor):
    seen: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        out = super().__torch_function__(function, types, args, kwargs)
        return 2 * out.as_subclass(torch.Tensor) if function is torch.nn.functional.linear else out


def in_a_class_of_tensors(net, seen):
    part = _mixers(net)[0].x_proj
    Halves.seen = seen
    part.weight = torch.nn.Parameter(part.weight.detach().as_subclass(Halves), requires_grad=False)


CHANGES = [in_a_hook, in_a_hook_of_all, in_a_forward_of_its_own, in_another_class, in_a_class_of_tensors]


@pytest.mark.parametrize("change", CHANGES)
def test_what_somebody_has_changed_in_a_mixer_is_kept(model, change):
    """A token in one call reads the weights, and must not where a projection is more than its weight."""
    if model in SSD:
        pytest.skip("has no x_proj, nor a token in one call")
    net, ids, seen = small(transformers, model), tokens(2, 6), []
    handle = change(net, seen)

    def run():
        known = cache_of(net(ids[:, :5], use_cache=True))
        seen.clear()
        return net(ids[:, 5:], **known, use_cache=True).logits

    try:
        with torch.no_grad():
            got, want = both(model, run)
    finally:
        if handle is not None:
            handle.remove()
    assert seen
    assert off(got, want) <= TOLERANCE


def test_autocast_decodes_as_it_does_in_the_slow_path(model):
    net, ids = small(transformers, model), tokens(2, 6)

    def run():
        known = cache_of(net(ids[:, :5], use_cache=True))
        with torch.autocast("cpu", torch.bfloat16):
            return net(ids[:, 5:], **known, use_cache=True).logits

    with torch.no_grad():
        got, want = both(model, run)
    assert got.dtype == want.dtype
    assert off(got.float(), want.float()) <= 0.05


def test_bfloat16_is_as_close_to_float32_as_the_slow_path_is(model):
    net, ids = small(transformers, model), tokens(2, 15)
    with torch.no_grad():
        exact = net(ids).logits
        net = net.bfloat16()
        got, want = both(model, lambda: net(ids).logits.float())
        assert off(got, exact) <= max(1.5 * off(want, exact), 0.02)
        tokens_, _ = both(model, lambda: net.generate(ids, max_new_tokens=4, do_sample=False))
    assert tokens_.shape == (2, 19)
