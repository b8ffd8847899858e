from __future__ import annotations

import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import fastlvm
from fastlvm.data import Payload, Space, Windows
from fastlvm.errors import InputError, IntegrityError
from fastlvm.predictor import layers
from fastlvm.predictor.export import AGREEMENT
from fastlvm.retrieval import Index

from .sample import CONTEXT, DIM, make_model, make_vectors, torch_predict

RUN = {"d_model": 16, "n_layers": 1, "d_state": 4, "epochs": 1, "warmup_steps": 1, "batch_size": 32}


@pytest.fixture(scope="module")
def run(tmp_path_factory, payload, windows):
    from fastlvm.training import train

    folder = tmp_path_factory.mktemp("run") / "run"
    train("mamba-s", payload, windows, folder, **RUN)
    return folder


@pytest.fixture(scope="module")
def run_index(run, payload):
    return Index.build(payload, space=Space.load(run / "space.safetensors"))


@pytest.fixture(scope="module")
def other_payload(payload, tmp_path_factory):
    return Payload.build(tmp_path_factory.mktemp("other") / "p", make_vectors(9), payload.keys, encoder="test")


def nothing_written(folder):
    return not folder.exists() and not list(folder.parent.glob(f".{folder.name}*"))


@pytest.mark.parametrize("residual", (True, False))
@pytest.mark.parametrize("d_model", (DIM, 48))
@pytest.mark.parametrize("d_state", (1, 8, 13))
def test_export_and_load_keep_the_model(tmp_path, payload, index, contexts, residual, d_model, d_state):
    model = make_model(residual=residual, d_model=d_model, d_state=d_state)
    fastlvm.export(model, tmp_path / "a", index=index)
    predictor = fastlvm.Predictor.load(tmp_path / "a")
    raw, _ = contexts
    wanted = torch_predict(model, index.space.apply(raw))
    assert np.abs(predictor.predict(raw) - wanted).max() <= 1e-5
    assert np.abs(predictor.predict(raw[0]) - wanted[0]).max() <= 1e-5


@pytest.mark.skipif(sys.platform == "win32", reason="modes are those of POSIX")
def test_whoever_may_read_the_config_may_read_the_weights(artifact):
    assert {path.stat().st_mode for path in artifact.rglob("*") if path.is_file()} == {
        (artifact / "config.json").stat().st_mode
    }


def test_a_run_with_its_index(tmp_path, run, run_index, payload, windows, contexts):
    run_index.save(tmp_path / "index")
    for name, index in (("object", run_index), ("folder", tmp_path / "index"), ("text", str(tmp_path / "index"))):
        fastlvm.export(str(run) if name == "text" else run, tmp_path / name, index=index)
    predictor = fastlvm.Predictor.load(tmp_path / "folder")
    model, config, space = fastlvm.training.load_run(run)
    raw, _ = contexts
    assert np.abs(predictor.predict(raw) - torch_predict(model, space.apply(raw))).max() <= 1e-5
    assert predictor.config["windows_id"] == windows.id == config["windows_id"]
    assert predictor.payload_id == payload.id and predictor.index.space.id == space.id == config["space_id"]
    assert predictor.config["golden"]["from"] == "random directions"


def test_a_run_with_its_payload_builds_the_index_in_the_runs_space(tmp_path, run, payload):
    fastlvm.export(run, tmp_path / "a", payload=payload)
    predictor = fastlvm.Predictor.load(tmp_path / "a")
    assert predictor.index.space.id == Space.load(run / "space.safetensors").id
    assert predictor.config["golden"] == {"windows": 8, "from": "payload"}
    with np.load(tmp_path / "a" / "golden.npz") as golden:
        np.testing.assert_array_equal(golden["context"][0], payload.take(np.arange(CONTEXT)))


def test_a_module_in_training_mode_is_left_in_it(tmp_path, index):
    model = make_model().train()
    fastlvm.export(model, tmp_path / "a", index=index)
    assert model.training and all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_a_module_of_another_dtype_is_packed_in_float32(tmp_path, index, contexts, dtype):
    model = make_model().to(dtype)
    fastlvm.export(model, tmp_path / "a", index=index)
    assert model.head.weight.dtype == dtype
    found = fastlvm.Predictor.load(tmp_path / "a").predict(contexts[0])
    assert np.abs(found - torch_predict(model.float(), index.space.apply(contexts[0]))).max() <= 1e-5


def test_the_global_random_state_is_left_alone(tmp_path, index):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    fastlvm.export(make_model(), tmp_path / "a", index=index)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_payload_shorter_than_a_context(tmp_path):
    keys = np.stack([np.zeros(3), np.arange(3)], axis=1).astype(np.int32)
    payload = Payload.build(tmp_path / "p", make_vectors()[:3], keys, encoder="test")
    fastlvm.export(make_model(), tmp_path / "a", payload=payload)
    found = fastlvm.Predictor.load(tmp_path / "a").search(np.ones((5, DIM), np.float32), 3)
    assert sorted(found.ids) == [0, 1, 2]


def refused(error, says, folder, *args, **options):
    with pytest.raises(error, match=says) as caught:
        fastlvm.export(*args[:1], folder, *args[1:], **options)
    assert type(caught.value) is error and "\n" not in str(caught.value)
    assert nothing_written(folder)


def test_a_foreign_index_is_refused(tmp_path, run, run_index, payload, other_payload, index):
    space = run_index.space
    remedy = "fastlvm index build PAYLOAD --space RUN --out INDEX"
    other = Index.build(other_payload, space=space)
    refused(IntegrityError, f"index is of payload {other_payload.id}.*{remedy}", tmp_path / "a", run, index=other)
    for wrong in (Index.build(payload), Index.build(payload, space=Space.fit(payload.take(np.arange(99))))):
        refused(IntegrityError, f"index is of space.*{remedy}", tmp_path / "a", run, index=wrong)
    refused(IntegrityError, "index is of payload", tmp_path / "a", make_model(), index=index, payload=other_payload)
    assert not (tmp_path / "a").exists()
    fastlvm.export(run, tmp_path / "a", index=run_index)


def test_a_foreign_payload_and_foreign_windows_are_refused(tmp_path, run, run_index, payload, other_payload, windows):
    refused(IntegrityError, "payload has id", tmp_path / "a", run, payload=other_payload)
    others = Windows.build(payload, context=CONTEXT, split=(0.6, 0.2, 0.2), seed=5)
    refused(IntegrityError, "windows has id", tmp_path / "a", run, index=run_index, windows=others)
    foreign = Windows.build(other_payload, context=CONTEXT)
    refused(IntegrityError, "payload has id", tmp_path / "a", run, index=run_index, windows=foreign)
    refused(IntegrityError, ".", tmp_path / "a", make_model(), payload=payload, windows=foreign)


def test_windows_are_verified_against_the_payload(tmp_path, payload, index, monkeypatch):
    windows = Windows.build(payload, context=CONTEXT)
    called = []
    verify = Windows.verify
    monkeypatch.setattr(Windows, "verify", lambda self, *args, **kw: called.append(1) or verify(self, *args, **kw))
    fastlvm.export(make_model(), tmp_path / "a", index=index, payload=payload, windows=windows)
    assert called


def test_wrong_arguments(tmp_path, index, artifact, run):
    folder = tmp_path / "a"
    refused(InputError, "precision is 'int4', and this version packs fp32, bf16, int8", folder, run, "int4", index)
    refused(InputError, "index and payload are both missing", folder, make_model())
    refused(InputError, "model_or_run is a int", folder, 7, index=index)
    refused(InputError, "model_or_run is a Linear", folder, torch.nn.Linear(2, 2), index=index)
    refused(InputError, "no run folder", folder, tmp_path / "none", index=index)
    refused(InputError, "holds no index", folder, make_model(), index=tmp_path)
    refused(InputError, "index is a int", folder, make_model(), index=3)
    refused(InputError, "index has dimension 32", folder, make_model(vector_dim=16), index=index)
    with pytest.raises(InputError, match="already holds something"):
        fastlvm.export(make_model(), artifact, index=index)
    fastlvm.Predictor.load(artifact)


def test_a_model_with_weights_its_layers_do_not_name(tmp_path, index):
    model = make_model()
    model.extra = torch.nn.Parameter(torch.zeros(2))
    refused(InputError, "extra belongs to none", tmp_path / "a", model, index=index)
    model = make_model()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    refused(InputError, "the model cannot be packed: tensor head.weight holds NaN", tmp_path / "a", model, index=index)


def test_a_forward_that_differs_from_the_model_is_refused(tmp_path, index, monkeypatch):
    def native(layer, weights):
        return "recency_mixture", {"logits": -weights[f"{layer.prefix}.logits"]}

    monkeypatch.setattr(layers.RecencyMixture, "native", native)
    refused(
        IntegrityError, "predicts at a cosine of 0.* nothing was written", tmp_path / "a", make_model(), index=index
    )


@pytest.mark.parametrize("precision", ("fp32", "bf16", "int8"))
def test_every_precision_predicts_as_the_model_does(tmp_path, index, contexts, precision):
    model = make_model()
    fastlvm.export(model, tmp_path / "a", precision, index)
    loaded = fastlvm.Predictor.load(tmp_path / "a")
    wanted = torch_predict(model, index.space.apply(contexts[0]))
    cosine = (loaded.predict(contexts[0]) * wanted).sum(axis=-1)
    mean, least = AGREEMENT[precision]
    assert loaded.config["precision"] == precision
    assert cosine.mean() >= mean and cosine.min() >= least


def test_where_int8_falls_short_the_output_projections_are_bfloat16(tmp_path, index, monkeypatch):
    exporting = sys.modules["fastlvm.predictor.export"]  # the package has a function of that name

    agrees = exporting._agrees
    monkeypatch.setattr(exporting, "_agrees", lambda *args: False)
    refused(IntegrityError, "predicts at a cosine", tmp_path / "a", make_model(), "int8", index)
    answers = iter([False])
    monkeypatch.setattr(exporting, "_agrees", lambda *args: next(answers, None) is None and agrees(*args))
    fastlvm.export(make_model(), tmp_path / "a", "int8", index)
    config = fastlvm.Predictor.load(tmp_path / "a").config
    assert config["in_bf16"] == ["blocks.0.out_proj.weight", "blocks.1.out_proj.weight"]


KILLED = """
import sys, time
from safetensors.numpy import load_file
import fastlvm
from fastlvm.predictor import artifact

source, folder, stage = sys.argv[1:]
good = artifact.read(source)
plan, weights = good.forward.plan, load_file(source + "/model.safetensors")

def slowly(target, name):
    def run(*args, **options):
        print("here", flush=True)
        time.sleep(60)
    setattr(target, name, run)

stages = {
    "index": (fastlvm.Index, "save_copy"),
    "config": (artifact, "write_json"),
    "check": (fastlvm.Predictor, "load"),
}
slowly(*stages[stage])
artifact.write(folder, plan, weights, good.golden, good.index, good.config, lambda path: fastlvm.Predictor.load(path))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_at_any_stage_leaves_no_half_artifact(tmp_path, artifact, index):
    """Of what export does everything that writes runs in the process that is killed."""
    folder = tmp_path / "a"
    for stage in ("index", "config", "check"):
        command = [sys.executable, "-c", KILLED, str(artifact), str(folder), stage]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "here\n"
        assert list(tmp_path.glob(".a.tmp-*"))
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        process.stdout.close()
        assert not folder.exists()
        with pytest.raises(InputError, match="holds no artifact"):
            fastlvm.Predictor.load(folder)
    fastlvm.export(make_model(), folder, index=index)
    fastlvm.Predictor.load(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
