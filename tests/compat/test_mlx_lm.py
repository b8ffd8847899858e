"""mlx-lm's state-space models on fastlvm: what they were on their own, in prefill, decoding and training."""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings

import pytest

from fastlvm.errors import InputError

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
nn = importlib.import_module("mlx.nn")
utils = importlib.import_module("mlx.utils")

from mlx_lm.generate import generate_step  # noqa: E402
from mlx_lm.models.cache import ArraysCache, make_prompt_cache  # noqa: E402

from fastlvm.compat import mlx_lm  # noqa: E402
from fastlvm.compat.mlx_lm import MODELS, TESTED, _functions, patch_mlx_lm, unpatch_mlx_lm  # noqa: E402

_MAMBA = {
    "model_type": "mamba",
    "vocab_size": 53,
    "hidden_size": 16,
    "intermediate_size": 32,
    "state_size": 8,
    "num_hidden_layers": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": 3,
}
_ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
SMALL = {  # name -> module, arguments
    "mamba": ("mamba", _MAMBA),
    "falcon_mamba": ("mamba", _MAMBA | {"model_type": "falcon_mamba", "use_conv_bias": False, "use_bias": True}),
    "jamba": (
        "jamba",
        _ATTENTION
        | {
            "model_type": "jamba",
            "vocab_size": 53,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 4,
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_offset": 1,
            "expert_layer_period": 2,
            "mamba_d_conv": 4,
            "mamba_d_state": 8,
            "mamba_expand": 2,
            "num_experts": 1,
            "num_experts_per_tok": 1,
            "rms_norm_eps": 1e-6,
        },
    ),
    "mamba2": (
        "mamba2",
        {
            "model_type": "mamba2",
            "num_heads": 4,
            "head_dim": 8,
            "vocab_size": 53,
            "hidden_size": 16,
            "intermediate_size": 32,
            "state_size": 16,
            "num_hidden_layers": 2,
            "layer_norm_epsilon": 1e-5,
            "conv_kernel": 4,
            "n_groups": 2,
            "use_bias": False,
            "use_conv_bias": True,
            "tie_word_embeddings": True,
            "time_step_limit": (0.01, 0.5),
            "time_step_rank": 2,
        },
    ),
    "falcon_h1": (
        "falcon_h1",
        {
            "hidden_size": 16,
            "head_dim": 8,
            "intermediate_size": 24,
            "mamba_d_head": 8,
            "mamba_d_ssm": 32,
            "mamba_d_state": 16,
            "mamba_n_heads": 4,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "vocab_size": 53,
        },
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        _ATTENTION
        | {
            "model_type": "granitemoehybrid",
            "vocab_size": 53,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "attention_bias": False,
            "embedding_multiplier": 1.0,
            "attention_multiplier": 0.5,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "layer_types": ["mamba", "attention"],
            "rms_norm_eps": 1e-6,
            "shared_intermediate_size": 24,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_proj_bias": False,
            "mamba_d_state": 16,
            "mamba_d_conv": 4,
            "mamba_n_groups": 1,
            "mamba_conv_bias": True,
        },
    ),
    "nemotron_h": (
        "nemotron_h",
        _ATTENTION
        | {
            "model_type": "nemotron_h",
            "vocab_size": 53,
            "hidden_size": 16,
            "intermediate_size": 24,
            "attention_bias": False,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "mamba_proj_bias": False,
            "ssm_state_size": 16,
            "conv_kernel": 4,
            "n_groups": 2,
            "mlp_bias": False,
            "layer_norm_epsilon": 1e-5,
            "use_bias": False,
            "use_conv_bias": True,
            "hybrid_override_pattern": ["M", "*", "M"],
        },
    ),
    "plamo2": (
        "plamo2",
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "hidden_size_per_head": 8,
            "mamba_d_state": 16,
            "mamba_num_heads": 4,
            "intermediate_size": 24,
            "vocab_size": 53,
        },
    ),
}
MAMBA_2 = ("mamba2", "falcon_h1", "granitemoehybrid", "nemotron_h", "plamo2")

small = pytest.mark.parametrize("name", SMALL)


@pytest.fixture(autouse=True)
def unpatched():
    unpatch_mlx_lm()
    yield
    unpatch_mlx_lm()


def _model(name, dtype=mx.float32):
    """A small model of random weights, none of which is 0 or 1 throughout."""
    module, arguments = SMALL[name]
    module = importlib.import_module(f"mlx_lm.models.{module}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs(**arguments))
    moved = utils.tree_map(lambda x: x + 0.1 * mx.random.normal(x.shape), model.parameters())
    model.update(utils.tree_map(lambda x: x.astype(dtype), moved))
    mx.eval(model.parameters())
    return model


def _tokens(batch, length):
    return mx.random.randint(0, 53, (batch, length), key=mx.random.key(1))


def _error(got, want):
    got, want = got.astype(mx.float32), want.astype(mx.float32)
    return float(mx.linalg.norm(got - want)) / float(mx.linalg.norm(want))


def _states(cache):
    """The arrays of the state-space layers' caches."""
    held = [c for part in cache for c in (getattr(part, "caches", None) or [part])]
    return [x for c in held if isinstance(c, ArraysCache) for x in c.cache]


def _through(model, tokens, prompt):
    """Logits of a prompt and of the tokens after it one by one, and the states at the end."""
    cache = make_prompt_cache(model)
    logits = [model(tokens[:, :prompt], cache=cache)]
    logits += [model(tokens[:, t : t + 1], cache=cache) for t in range(prompt, tokens.shape[1])]
    return mx.concatenate(logits, axis=1), _states(cache)


@pytest.fixture
def ran(monkeypatch):
    """Names of the ops that were called."""
    names = []
    for name in ("causal_conv1d", "ssm_scan", "ssd_scan"):
        original = getattr(_functions, name)

        def call(*args, name=name, original=original, **kwargs):
            names.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(_functions, name, call)
    return names


def test_every_model_is_tested():
    assert {module for module, _ in SMALL.values()} == set(MODELS)


@small
@pytest.mark.parametrize("length", [1, 33])
def test_logits_are_those_of_mlx_lm(name, length, ran):
    model, tokens = _model(name), _tokens(2, length)
    want = model(tokens, cache=None)
    mx.eval(want)
    assert ran == []
    with patch_mlx_lm(SMALL[name][0], strict=True):
        got = model(tokens, cache=None)
        mx.eval(got)
    assert {"causal_conv1d", "ssd_scan" if name in MAMBA_2 else "ssm_scan"} == set(ran)
    assert _error(got, want) <= 1e-5


@small
@pytest.mark.parametrize("prompt", [1, 9])
def test_a_cache_goes_on_where_the_prompt_ended(name, prompt):
    model, tokens = _model(name), _tokens(2, 13)
    want, want_states = _through(model, tokens, prompt)
    mx.eval(want, want_states)
    with patch_mlx_lm(SMALL[name][0], strict=True):
        got, states = _through(model, tokens, prompt)
    assert _error(got, want) <= 1e-5
    assert len(states) == len(want_states) > 0
    for x, y in zip(states, want_states, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert _error(x, y) <= 1e-5


@small
def test_a_cache_of_mlx_lm_is_taken_over_and_given_back(name):
    model, tokens = _model(name), _tokens(1, 12)
    want, _ = _through(model, tokens, 4)
    cache = make_prompt_cache(model)
    parts = [model(tokens[:, :4], cache=cache)]
    with patch_mlx_lm(SMALL[name][0], strict=True):
        parts += [model(tokens[:, t : t + 1], cache=cache) for t in range(4, 8)]
    parts += [model(tokens[:, t : t + 1], cache=cache) for t in range(8, 12)]
    assert _error(mx.concatenate(parts, axis=1), want) <= 1e-5


@small
def test_greedy_tokens_are_the_same(name):
    model, prompt = _model(name), _tokens(1, 11)[0]

    def generated():
        steps = generate_step(prompt, model, max_tokens=16, prefill_step_size=4)
        return [int(token) for token, _ in steps]

    want = generated()
    with patch_mlx_lm(SMALL[name][0], strict=True):
        assert generated() == want
    assert len(want) == 16


@small
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradients_are_those_of_mlx_lm(name, compiled):
    model, tokens = _model(name), _tokens(2, 20)

    def loss(parameters, tokens):
        model.update(parameters)
        return nn.losses.cross_entropy(model(tokens[:, :-1], cache=None), tokens[:, 1:], reduction="mean")

    parameters = model.trainable_parameters()
    value, grads = mx.value_and_grad(loss)(parameters, tokens)
    mx.eval(value, grads)
    with patch_mlx_lm(SMALL[name][0], strict=True):
        function = mx.value_and_grad(loss)
        got, got_grads = (mx.compile(function) if compiled else function)(parameters, tokens)
        mx.eval(got, got_grads)
    assert abs(got.item() - value.item()) <= 1e-5 * abs(value.item())
    flat = dict(utils.tree_flatten(got_grads))
    largest = max(float(mx.linalg.norm(want)) for _, want in utils.tree_flatten(grads))
    for key, want in utils.tree_flatten(grads):
        norm = float(mx.linalg.norm(want))
        assert float(mx.linalg.norm(flat[key] - want)) <= 1e-4 * norm + 1e-6 * largest, key


@pytest.mark.parametrize("name", MAMBA_2[:1])
def test_left_padding_and_lengths(name):
    """Where a row has tokens its logits are those of mlx-lm, and what follows goes on from the same states."""
    model, tokens = _model(name), _tokens(3, 9)

    def run(arrange):
        cache = [arrange() for _ in model.layers]
        first = model(tokens[:, :7], cache=cache)
        for c in cache:
            c.finalize()
        return first, model(tokens[:, 7:8], cache=cache), _states(cache)

    def padded():
        return ArraysCache(2, left_padding=[0, 2, 5])

    def ragged():
        cache = ArraysCache(2)
        cache.prepare(lengths=[7, 4, 1])
        return cache

    real = {padded: mx.arange(7) >= mx.array([[0], [2], [5]]), ragged: mx.arange(7) < mx.array([[7], [4], [1]])}
    for arrange, there in real.items():
        want, want_next, want_states = run(arrange)
        mx.eval(want, want_next, want_states)
        with patch_mlx_lm(SMALL[name][0], strict=True):
            got, got_next, states = run(arrange)
        assert _error(got * there[..., None], want * there[..., None]) <= 1e-5
        assert _error(got_next, want_next) <= 1e-5
        assert all(_error(x, y) <= 1e-5 for x, y in zip(states, want_states, strict=True))


@small
def test_bfloat16(name):
    model, tokens = _model(name, mx.bfloat16), _tokens(1, 12)
    exact, _ = _through(_model(name), tokens, 8)
    alone, _ = _through(model, tokens, 8)
    with patch_mlx_lm(SMALL[name][0], strict=True):
        got, _ = _through(model, tokens, 8)
    assert got.dtype == alone.dtype
    assert _error(got, exact) <= 1.5 * _error(alone, exact) + 1e-3


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_on_the_gpu_the_model_still_runs(name, monkeypatch, ran):
    """Mamba in plain mlx without the loop, Mamba-2 as it was."""
    model, tokens = _model(name), _tokens(2, 9)
    want = model(tokens, cache=None)
    monkeypatch.setattr("fastlvm.ops._arrays.device", lambda x: "gpu")
    with patch_mlx_lm(SMALL[name][0], strict=True):
        assert _error(model(tokens, cache=None), want) <= 1e-5
    assert bool(ran) == (name == "mamba")


def test_all_models_are_patched_without_a_warning_and_put_back():
    def now():
        places = {}
        for model in MODELS:
            module = importlib.import_module(f"mlx_lm.models.{model}")
            places |= {(model, name): getattr(owner, name) for owner, name in mlx_lm._places(model, module)}
        return places

    before = now()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = patch_mlx_lm()
    assert done.patched == MODELS and done.refused == {}
    assert all(now()[place] is not function for place, function in before.items())
    once = now()
    assert patch_mlx_lm().patched == MODELS and now() == once
    unpatch_mlx_lm("mamba")
    assert [place for place, function in now().items() if function is before[place]] == [("mamba", "_process_sequence")]
    unpatch_mlx_lm()
    unpatch_mlx_lm()
    assert now() == before


def test_leaving_the_context_takes_back_what_it_changed_and_no_more():
    block = importlib.import_module("mlx_lm.models.mamba").MambaBlock
    mixer = importlib.import_module("mlx_lm.models.jamba").JambaMambaMixer
    before = mixer._process_sequence
    patch_mlx_lm("mamba")
    ours = block._process_sequence
    with pytest.raises(ZeroDivisionError), patch_mlx_lm(["mamba", "jamba"]) as patch:
        assert patch.patched == ("mamba", "jamba")
        assert mixer._process_sequence is not before
        raise ZeroDivisionError
    assert mixer._process_sequence is before
    assert block._process_sequence is ours


@pytest.mark.parametrize("act", [patch_mlx_lm, unpatch_mlx_lm])
def test_an_unknown_name_is_refused_with_those_known(act):
    with pytest.raises(InputError, match="models: got 'mamba3', wants names out of mamba, jamba"):
        act(["mamba", "mamba3"])


@pytest.mark.parametrize(
    ("model", "part"), [("mamba", "MambaBlock"), ("mamba2", "Mamba2Block"), ("mamba2", "ssm_attn")]
)
def test_changed_internals_are_refused_with_a_sentence(model, part, monkeypatch):
    monkeypatch.setitem(mlx_lm._KNOWN["ssm" if part == "ssm_attn" else model], part, "another")
    version = importlib.metadata.version("mlx-lm").replace(".", r"\.")
    with pytest.warns(UserWarning, match=rf"^{model} of mlx-lm {version} is not patched: {part} of .* is not the one"):
        done = patch_mlx_lm(["jamba", model])
    assert done.patched == ("jamba",) and list(done.refused) == [model]
    assert f"use mlx-lm {TESTED[-1]}" in done.refused[model]
    unpatch_mlx_lm()
    with pytest.raises(InputError, match=f"{model} of mlx-lm .* is not patched"):
        patch_mlx_lm(["jamba", model], strict=True)
    assert patch_mlx_lm("jamba")._changed == ("jamba",)  # strict had patched none


def test_a_fingerprint_is_of_the_whole_class(monkeypatch):
    """A method that is not replaced counts, too: what is put in calls it."""
    read = mlx_lm._source.inspect.getsource

    def other(module):
        return read(module).replace("deltaBC = self.x_proj(x)", "deltaBC = self.x_proj(2 * x)")

    monkeypatch.setattr(mlx_lm._source.inspect, "getsource", other)
    with pytest.warns(UserWarning, match="MambaBlock of mlx_lm.models.mamba is not the one fastlvm replaces"):
        assert patch_mlx_lm("mamba").patched == ()


def test_without_mlx_lm_the_message_says_how_to_install_it(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(InputError, match="mlx-lm is not installed; pip install"):
        patch_mlx_lm()


def test_a_model_the_version_lacks_is_refused_by_name_and_skipped_otherwise(monkeypatch):
    module = mlx_lm._module
    monkeypatch.setattr(mlx_lm, "_module", lambda model: None if model == "plamo2" else module(model))
    assert "plamo2" not in patch_mlx_lm().patched
    unpatch_mlx_lm()
    with pytest.warns(UserWarning, match="this version has no such model"):
        assert "plamo2" in patch_mlx_lm(["plamo2", "mamba"]).refused
