"""What `patch_transformers` replaces, what it refuses, and that it puts everything back."""

from __future__ import annotations

import importlib
import importlib.metadata
import textwrap
import warnings

import pytest
import torch
from transformers_small import SMALL, cache_of, small

from fastlvm.compat.transformers import MODELS, TESTED, _source, patch_transformers, unpatch_transformers
from fastlvm.compat.transformers import _functions as functions
from fastlvm.errors import InputError

try:
    import transformers
except ModuleNotFoundError:
    transformers = None

OLDEST = (5, 16)
NEEDS = "transformers 5.16 or newer is missing"
needs_transformers = pytest.mark.skipif(
    transformers is None or tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST, reason=NEEDS
)


def functions_of(model):
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    found = {name: getattr(module, name) for name in _source.KNOWN if hasattr(module, name)}
    mixers = (getattr(module, name, None) for name in _source.FORWARDS)
    return found | {mixer.__name__: mixer.forward for mixer in mixers if mixer is not None}


@pytest.fixture(autouse=True)
def unpatched():
    yield
    unpatch_transformers()


def test_every_model_has_a_small_one_to_test_with():
    assert set(MODELS) == set(SMALL)


def test_without_transformers_the_message_says_how_to_install_it(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(InputError, match="transformers is not installed; pip install"):
        patch_transformers()


@pytest.mark.parametrize("act", [patch_transformers, unpatch_transformers])
@pytest.mark.parametrize("names", ["mamba3", ["mamba", "mamba3"]])
def test_an_unknown_name_is_refused_with_those_known(act, names):
    if act is patch_transformers and transformers is None:
        pytest.skip(NEEDS)
    with pytest.raises(InputError, match="models: got 'mamba3', wants names out of mamba, falcon_mamba"):
        act(names)


@needs_transformers
def test_all_models_are_patched_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = patch_transformers()
    assert done.patched == MODELS and done.refused == {}


@needs_transformers
@pytest.mark.parametrize("model", MODELS)
def test_unpatching_restores_the_very_functions(model):
    before = functions_of(model)
    patch_transformers(model)
    assert all(now is not before[name] or name == "mamba_inner_fn" for name, now in functions_of(model).items())
    unpatch_transformers(model)
    assert functions_of(model) == before


@needs_transformers
def test_patching_twice_replaces_nothing_twice():
    before = functions_of("mamba")
    patch_transformers("mamba")
    once = functions_of("mamba")
    assert patch_transformers("mamba").patched == ("mamba",)
    assert functions_of("mamba") == once
    unpatch_transformers()
    unpatch_transformers()
    assert functions_of("mamba") == before


@needs_transformers
def test_leaving_the_context_takes_back_what_it_changed_and_no_more():
    mamba, jamba = functions_of("mamba"), functions_of("jamba")
    patch_transformers("mamba")
    with pytest.raises(ZeroDivisionError), patch_transformers(["mamba", "jamba"]) as patch:
        assert patch.patched == ("mamba", "jamba")
        assert functions_of("jamba") != jamba
        raise ZeroDivisionError
    assert functions_of("jamba") == jamba
    assert functions_of("mamba") != mamba


@needs_transformers
def test_changed_internals_are_refused_with_a_sentence_naming_model_and_version(monkeypatch):
    monkeypatch.setitem(_source.KNOWN, "mamba2_chunk_scan", {"another"})
    before = functions_of("bamba")
    version = transformers.__version__.replace(".", r"\.")
    with pytest.warns(UserWarning, match=f"^bamba of transformers {version} is not patched: mamba2_chunk_scan of "):
        done = patch_transformers(["mamba", "bamba"])
    assert done.patched == ("mamba",) and list(done.refused) == ["bamba"]
    assert f"use transformers {TESTED[0]} to {TESTED[-1]}" in done.refused["bamba"]
    assert functions_of("bamba") == before


@needs_transformers
def test_a_forward_of_another_make_is_left_alone(monkeypatch):
    monkeypatch.setitem(_source.FORWARDS, "MambaMixer", {"another"})
    before = functions_of("mamba")
    assert patch_transformers("mamba", strict=True).patched == ("mamba",)
    after = functions_of("mamba")
    assert after["MambaMixer"] is before["MambaMixer"]
    assert after["mamba_selective_scan"] is not before["mamba_selective_scan"]


@needs_transformers
def test_strict_raises_and_patches_none(monkeypatch):
    monkeypatch.setitem(_source.KNOWN, "mamba2_chunk_scan", {"another"})
    before = functions_of("mamba")
    with pytest.raises(InputError, match=r"bamba of transformers .* is not patched"):
        patch_transformers(["mamba", "bamba"], strict=True)
    assert functions_of("mamba") == before


@needs_transformers
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda module, read: None, "the source of .* cannot be read"),
        (lambda module, read: _source.Source({}, {}, {}), "has no function causal_conv1d_fn"),
        (
            lambda module, read: _source.Source(read(module).functions, {}, {}),
            "MambaMixer.forward does not call",
        ),
    ],
    ids=["no source", "no function", "no call"],
)
def test_a_module_of_another_make_is_refused(monkeypatch, change, reason):
    read = _source.read
    monkeypatch.setattr(_source, "read", lambda module: change(module, read))
    with pytest.raises(InputError, match=reason):
        patch_transformers("mamba", strict=True)


@needs_transformers
def test_a_model_the_version_lacks_is_refused_by_name_and_skipped_otherwise(monkeypatch):
    from fastlvm.compat import transformers as patcher

    monkeypatch.setitem(patcher._MIXERS, "mamba9", ("Mamba9Mixer", ()))
    monkeypatch.setattr(patcher, "MODELS", ("mamba", "mamba9"))
    assert patch_transformers(strict=True).refused == {}
    with pytest.raises(InputError, match="this version has no such model"):
        patch_transformers("mamba9", strict=True)


def fingerprint(text):
    lines = textwrap.dedent(text).splitlines(keepends=True)
    return _source.fingerprint(lines, _source.ast.parse("".join(lines)).body[0])


FUNCTION = """
    @decorated("by this")
    def causal(x, weight):
        if weight is None:
            return x
        return x * weight + 1
    """


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("return x\n", "return x  # as it is\n\n", True),
        ("x, weight", "\n        x,\n        weight\n    ", True),
        ("by this", "by that", True),
        ("+ 1", "+ 2", False),
        ("        return x * weight", "            return x * weight", False),
    ],
)
def test_a_fingerprint_changes_with_the_code_alone(old, new, same):
    assert (fingerprint(FUNCTION.replace(old, new)) == fingerprint(FUNCTION)) is same


def relative_difference(model, call, **options):
    net = small(transformers, model, **options)
    ids = torch.arange(3, 17).view(2, 7)
    with torch.no_grad():
        want = call(net, ids)
        with patch_transformers(model, strict=True):
            got = call(net, ids)
    return ((got - want).abs().max() / want.abs().max()).item()


def prompt_and_token(net, ids):
    """Logits of a prompt and of a token after it."""
    out = net(ids, use_cache=True)
    return torch.cat([out.logits, net(ids[:, :1], **cache_of(out), use_cache=True).logits], dim=1)


@needs_transformers
@pytest.mark.parametrize("limit", [(0.0, 0.01), (0.02, 0.05), (0.0, float("inf"))])
def test_limits_of_the_step_size_are_kept(limit):
    assert relative_difference("mamba2", prompt_and_token, time_step_limit=limit) <= 1e-5


@needs_transformers
@pytest.mark.parametrize("model", ["mamba", "mamba2"])
def test_another_activation_is_kept(model):
    assert relative_difference(model, prompt_and_token, hidden_act="gelu") <= 1e-5


@needs_transformers
@pytest.mark.parametrize("model", ["mamba", "mamba2"])
def test_float64_keeps_the_results_of_transformers(model):
    assert relative_difference(model, lambda net, ids: prompt_and_token(net.double(), ids)) <= 1e-6


@needs_transformers
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_of_every_width_keep_their_cache(width, bias):
    options = {"conv_kernel": width, "use_conv_bias": bias}
    assert relative_difference("mamba", prompt_and_token, **options) <= 1e-5


@pytest.mark.slow
@needs_transformers
@pytest.mark.parametrize("model", ["mamba", "mamba2"])
def test_a_patched_model_compiles_without_a_graph_break(model):
    net, ids = small(transformers, model), torch.arange(3, 17).view(2, 7)
    with patch_transformers(model, strict=True), torch.no_grad():
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(prompt_and_token(compiled, ids), prompt_and_token(net, ids))


@pytest.mark.parametrize(
    ("name", "arrays", "rest"),
    [("causal_conv1d_fn", 2, ()), ("mamba_selective_scan", 5, ()), ("mamba2_chunk_scan", 5, (2,))],
)
@pytest.mark.parametrize("packed", ["seq_idx", "cu_seqlens"])
def test_packed_sequences_are_left_to_transformers(name, arrays, rest, packed):
    run = functions.REPLACEMENTS[name](lambda *args, **kwargs: kwargs[packed])
    offsets = torch.tensor([0, 4, 6])
    args = (*[torch.zeros(1, 4, 6)] * arrays, *rest)
    assert run(*args, **{packed: offsets}) is offsets


@needs_transformers
def test_a_step_with_a_dt_for_every_channel_is_left_to_transformers():
    H, P, N = 2, 3, 4
    torch.manual_seed(0)
    x, dt, A, B = torch.randn(1, H, P), torch.randn(1, H, P), -torch.rand(H, P, N), torch.randn(1, 1, N)
    states = torch.zeros(2, 1, H, P, N)
    run = functions_of("mamba2")["mamba2_selective_state_update"]
    want = run(states[0], x, dt, A, B, B, dt_softplus=True)
    got = functions.REPLACEMENTS["mamba2_selective_state_update"](run)(states[1], x, dt, A, B, B, dt_softplus=True)
    assert torch.equal(got, want) and torch.equal(states[0], states[1])


@needs_transformers
def test_gradients_reach_the_first_part_of_a_prompt_through_the_cache():
    net, ids = small(transformers, "mamba2"), torch.arange(3, 17).view(2, 7)

    def gradients():
        embedded = net.get_input_embeddings()(ids).detach().requires_grad_()
        out = net(inputs_embeds=embedded[:, :4], use_cache=True)
        net(inputs_embeds=embedded[:, 4:], **cache_of(out), use_cache=True).logits.sum().backward()
        return embedded.grad

    with patch_transformers("mamba2", strict=True):
        got = gradients()
    assert got[:, :4].abs().max() > 0
    torch.testing.assert_close(got, gradients(), rtol=1e-4, atol=1e-5)
