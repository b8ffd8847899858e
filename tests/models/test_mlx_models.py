"""The mlx models against torch's of the same weights: predictions, gradients, steps, starts, and files both ways."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models_small import CONTEXT, DIM, NAMES, SIZES, STACKS, awake, build, contexts
from torch.nn import functional as F

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402

from fastlvm import models  # noqa: E402
from fastlvm.errors import InputError, IntegrityError  # noqa: E402
from fastlvm.models import mlx as twins  # noqa: E402
from fastlvm.training import checkpoint  # noqa: E402

BOUND = 1e-5  # absolute, of components of unit vectors in float32

# Settings that change what a model is made of.
VARIANTS = [
    ("mamba-s", {"residual": False}),
    ("mamba-s", {"d_model": DIM}),  # no input layer
    ("mamba-h", {"window": 2, "heads": 4}),
    ("mamba-s", {"layout": "attention+mlp gate mamba2 lstm", "n_layers": 4, "positions": True}),
    ("mamba-s", {"context": 9, "d_conv": 3, "dt_rank": 3}),
    ("amn", {"residual": False}),
    ("mlp", {"residual": False, "norm_eps": 0.1}),
]


@pytest.fixture(autouse=True)
def on_the_cpu():
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def arrays(model):
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def twin(model):
    """The mlx model of a torch model's weights."""
    found = twins.create(model.config)
    twins.load_weights(found, arrays(model), Path("weights"))
    return found.eval()


def pair(name, **overrides):
    model = awake(build(name, **overrides)).eval()
    return model, twin(model)


def close(found, wanted, bound=BOUND):
    np.testing.assert_allclose(np.array(found), wanted.detach().numpy(), rtol=0, atol=bound)


@pytest.mark.parametrize("name", NAMES)
def test_weights_have_the_same_names_and_shapes(name):
    own = {key: array.shape for key, array in twins.weights(twins.create(build(name).config)).items()}
    assert own == {key: array.shape for key, array in arrays(build(name)).items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [1, 2, CONTEXT])
def test_predictions_are_torchs(name, length):
    model, own = pair(name)
    x = contexts(length=length)
    close(own(mx.array(x.numpy())), model(x))


@pytest.mark.parametrize("name, overrides", VARIANTS)
def test_predictions_of_variants_are_torchs(name, overrides):
    model, own = pair(name, **overrides)
    for length in (1, 3, model.config.context):
        x = contexts(length=length)
        close(own(mx.array(x.numpy())), model(x))


@pytest.mark.parametrize("name, overrides", [(name, {}) for name in NAMES] + VARIANTS)
def test_gradients_of_every_weight_and_of_the_context_are_torchs(name, overrides):
    model, own = pair(name, **overrides)
    x, toward = contexts().requires_grad_(), contexts(seed=5)[:, 0]
    (model(x) * toward).sum().backward()

    def loss(weights, context):
        own.update(tree_unflatten(list(weights.items())))
        return (own(context) * mx.array(toward.numpy())).sum()

    flat = tree_flatten(own.trainable_parameters(), destination={})
    by_name, by_context = mx.grad(loss, argnums=(0, 1))(flat, mx.array(x.detach().numpy()))
    close(by_context, x.grad)
    learned = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert set(by_name) == set(learned)
    for key, wanted in learned.items():
        close(by_name[key], wanted, BOUND * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_the_predictions_of_as_many_vectors(name):
    model, own = pair(name)
    x = contexts()
    state = own.start(len(x))
    for t in range(CONTEXT):
        close(own.step(mx.array(x[:, t].numpy()), state), model(x[:, : t + 1]))


@pytest.mark.parametrize("name", [name for name in STACKS if name != "transformer"])
def test_steps_go_on_beyond_the_context_as_torchs_do(name):
    model, own = pair(name, window=3)
    x = contexts(length=9)
    states = model.start(len(x)), own.start(len(x))
    for t in range(9):
        close(own.step(mx.array(x[:, t].numpy()), states[1]), model.step(x[:, t], states[0]))


def test_steps_end_with_the_positions():
    own = pair("transformer")[1]
    state = own.start(1)
    for _ in range(CONTEXT):
        own.step(mx.ones((1, DIM)), state)
    with pytest.raises(InputError, match=f"transformer has {CONTEXT} positions"):
        own.step(mx.ones((1, DIM)), state)


@pytest.mark.parametrize("name", NAMES)
def test_an_untrained_one_is_the_recency_mixture(name):
    own = twins.create(name, **{**SIZES, "decay": 0.4}).eval()
    x = contexts(length=3)
    ages = torch.tensor([2.0, 1.0, 0.0])
    weights = (1.0 if name == "amn" else 0.4) ** ages
    close(own(mx.array(x.numpy())), F.normalize((x * (weights / weights.sum())[:, None]).sum(1), dim=-1))


WIDE = {"vector_dim": 48, "d_model": 64, "d_state": 16, "head_dim": 2, "heads": 2, "d_ff": 80, "hidden": 40}


@pytest.mark.parametrize("name", NAMES)
def test_weights_start_where_torchs_do(name):
    """Constants are the same; what is drawn has the same mean, spread and extremes."""
    mx.random.seed(0)
    given = {**WIDE, "n_layers": 4, "residual": name == "mixture"}
    own, theirs = twins.weights(twins.create(name, **given)), arrays(build(name, **given))
    for key, wanted in theirs.items():
        if key == "mixture.logits" or len(np.unique(wanted)) <= wanted.size // 2:  # ones, zeros, S4D's states
            np.testing.assert_allclose(own[key], wanted, rtol=1e-6, err_msg=key)
        elif wanted.size >= 64:
            spread = wanted.std()
            tolerance = 6 / np.sqrt(wanted.size)  # standard errors
            assert abs(own[key].mean() - wanted.mean()) <= tolerance * spread + 1e-7, key
            assert own[key].std() == pytest.approx(spread, rel=tolerance), key
            assert np.abs(own[key]).max() <= 2 * np.abs(wanted).max(), key


def test_the_mean_of_amn_does_not_learn():
    own = twins.create("amn", **SIZES)
    assert "mixture.logits" not in tree_flatten(own.trainable_parameters(), destination={})
    assert "mixture.logits" in twins.weights(own)
    assert "mixture.logits" in tree_flatten(twins.create("mlp", **SIZES).trainable_parameters(), destination={})


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mixture"])
def test_dropout_is_for_training_alone(name):
    _, own = pair(name, dropout=0.5)
    x = mx.array(contexts().numpy())
    assert mx.array_equal(own(x), own(x))
    own.train()
    assert float(mx.abs(own(x) - own(x)).max()) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_either_framework_loads_in_the_other(name, tmp_path):
    model, own = pair(name)
    x = contexts()
    twins.save(own, tmp_path / "mlx.safetensors")
    tensors, meta = checkpoint.load(tmp_path / "mlx.safetensors")
    again = models.create(models.ModelConfig.from_dict(meta["model"])).eval()
    checkpoint.load_weights(again, tensors, tmp_path)
    assert torch.equal(again(x), model(x))
    checkpoint.save(tmp_path / "best.safetensors", model.state_dict(), meta)
    assert (tmp_path / "best.safetensors").read_bytes() == (tmp_path / "mlx.safetensors").read_bytes()
    for path in (tmp_path, tmp_path / "mlx.safetensors"):  # a run's folder, and a file
        loaded = twins.load(path)
        assert loaded.config == model.config and not loaded.training
        assert mx.array_equal(loaded(mx.array(x.numpy())), own(mx.array(x.numpy())))


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_weights_of_another_precision_become_float32_as_in_torch(dtype):
    model = awake(build("mamba-s")).eval()
    stored = {name: array.astype(dtype) for name, array in arrays(model).items()}
    own = twins.create(model.config).eval()
    twins.load_weights(own, stored, Path("weights"))
    checkpoint.load_weights(model, {name: torch.from_numpy(array) for name, array in stored.items()}, Path("weights"))
    found = twins.weights(own)
    for name, wanted in arrays(model).items():
        assert found[name].dtype == np.float32, name
        np.testing.assert_array_equal(found[name], wanted, err_msg=name)
    x = contexts()
    close(own(mx.array(x.numpy())), model(x))


def test_a_payload_tower_is_no_part_of_the_model(tmp_path):
    model = awake(build("mlp")).eval()
    tensors = {**model.state_dict(), "tower.up.weight": torch.ones(3, 3)}
    checkpoint.save(tmp_path / "best.safetensors", tensors, {"model": model.config.to_dict()})
    x = contexts()
    close(twins.load(tmp_path)(mx.array(x.numpy())), model(x))


def test_files_that_are_none_are_refused(tmp_path):
    model = build("mlp")
    file, meta = tmp_path / "best.safetensors", {"model": model.config.to_dict()}
    with pytest.raises(InputError, match="does not exist"):
        twins.load(tmp_path)
    checkpoint.save(file, model.state_dict(), {})
    with pytest.raises(IntegrityError, match="does not say which model"):
        twins.load(tmp_path)
    for tensors in (
        {name: tensor for name, tensor in model.state_dict().items() if name != "head.bias"},
        {**model.state_dict(), "head.bias": torch.zeros(3)},
        {**model.state_dict(), "more": torch.zeros(3)},
    ):
        checkpoint.save(file, tensors, meta)
        with pytest.raises(IntegrityError, match="does not hold this model's weights"):
            twins.load(file)
    checkpoint.save(file, model.state_dict(), meta)
    whole = file.read_bytes()
    for damaged, message in (
        (whole[:-4], "is no readable checkpoint"),
        (whole[:-4] + b"abcd", "its numbers have changed"),
        (b"nothing", "is no readable checkpoint"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(IntegrityError, match=message):
            twins.load(file)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(5, DIM), (2, 0, DIM), (2, CONTEXT + 1, DIM), (2, 5, DIM - 1)])
def test_wrong_contexts_are_refused(name, shape):
    with pytest.raises(InputError, match="the model takes"):
        twins.create(name, **SIZES)(mx.zeros(shape))


def test_whole_numbers_are_no_context():
    with pytest.raises(InputError, match="dtype"):
        twins.create("mlp", **SIZES)(mx.zeros((2, CONTEXT, DIM), mx.int32))


def test_unknown_names_and_a_mixture_without_its_mixture_are_refused():
    with pytest.raises(InputError, match="'mamba-q' is not known"):
        twins.create("mamba-q")
    with pytest.raises(InputError, match="residual is False"):
        twins.create("mixture", residual=False)


def _fresh(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_models_do_not_import_mlx_and_mlx_models_need_no_torch():
    assert _fresh("import fastlvm.models, sys; print([m for m in ('mlx', 'torch') if m in sys.modules])") == "[]"
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import mlx.core as mx; mx.set_default_device(mx.cpu)\n"
        "from fastlvm.models import mlx, names\n"
        f"sizes = {SIZES!r}\n"
        f"found = [mlx.create(name, **sizes)(mx.ones((2, {CONTEXT}, {DIM}))).shape for name in names()]\n"
        "print(len(found), set(found))"
    )
    assert _fresh(code) == f"{len(NAMES)} {{(2, {DIM})}}"
