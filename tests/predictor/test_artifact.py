from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fastlvm
from fastlvm.errors import InputError, IntegrityError
from fastlvm.predictor import artifact as folder_format
from fastlvm.retrieval import Index

from .sample import DIM, edit_config, reseal

FILES = ("config.json", "model.safetensors", "golden.npz", "index/index.json", "index/index.faiss", "index/keys.npy")


def refused(folder, error=IntegrityError, says="."):
    with pytest.raises(error, match=says) as caught:
        fastlvm.Predictor.load(folder)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_config_says_what_it_is(artifact, payload, space, windows, model):
    config = json.loads((artifact / "config.json").read_text())
    assert (config["format"], config["version"], config["precision"]) == ("fastlvm-artifact", 1, "fp32")
    assert config["tool"] == f"fastlvm {fastlvm.__version__}"
    assert (config["payload_id"], config["space_id"]) == (payload.id, space.id)
    assert config["windows_id"] == windows.id
    assert config["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert [layer["type"] for layer in config["layers"]] == [
        "rms_norm",
        "linear",
        "mamba_block",
        "mamba_block",
        "last",
        "rms_norm",
        "linear",
        "recency_mixture",
        "l2_norm",
    ]
    assert config["golden"] == {"windows": 8, "from": "windows"}


def test_golden_windows_are_real_ones(artifact, payload, windows):
    with np.load(artifact / "golden.npz") as golden:
        contexts = payload.take(windows.rows("test")[:, :-1])
        for context in golden["context"]:
            assert (contexts == context).all(axis=(1, 2)).any()


def test_nothing_there(tmp_path):
    refused(tmp_path / "no", InputError, "holds no artifact")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", InputError, "holds no artifact")


@pytest.mark.parametrize("name", FILES[1:])
def test_a_missing_file(copy, name):
    (copy / name).unlink()
    refused(copy, says="missing")


def test_a_missing_index_or_config(copy):
    shutil.rmtree(copy / "index")
    refused(copy, says="missing")
    (copy / "config.json").unlink()
    refused(copy, InputError, "holds no artifact")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", (0, 0.5, 0.99))
def test_a_truncated_file(copy, name, keep):
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: int(len(data) * keep)])
    refused(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_anywhere(copy, name):
    data = (copy / name).read_bytes()
    for at in np.random.default_rng(0).integers(0, len(data), 12):
        flipped = bytearray(data)
        flipped[at] ^= 0x40
        (copy / name).write_bytes(flipped)
        with pytest.raises(InputError):
            fastlvm.Predictor.load(copy)


def tensor_offset(file, name):
    """Where a tensor's bytes begin in a safetensors file."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return 8 + size + json.loads(data[8 : 8 + size])[name]["data_offsets"][0]


@pytest.mark.parametrize("name", ("embed.weight", "blocks.0.dt_proj.bias", "blocks.1.out_proj.weight", "head.bias"))
def test_golden_refuses_a_changed_weight_even_under_fresh_hashes(copy, name):
    file = copy / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[tensor_offset(file, name) + 3] ^= 0x80  # the sign of the first number
    file.write_bytes(data)
    refused(copy, says="SHA-256")
    reseal(copy)
    refused(copy, says="golden windows off by")


def test_golden_refuses_another_space_and_wrong_golden_files(copy, payload, predictor):
    with np.load(copy / "golden.npz") as golden:
        context, prediction = golden["context"], golden["prediction"]
    bad = prediction.copy()
    bad[2, 5] += 1.5e-5
    nan = np.full_like(prediction, np.nan)
    for arrays, says in (
        ({"context": context, "prediction": bad}, "golden windows off by"),
        ({"context": context, "prediction": nan}, "golden windows off by"),
        ({"context": context, "prediction": prediction[:, :-1]}, "windows of this model"),
        ({"context": context, "prediction": prediction[0]}, r"float32 \[32\], and float32 .* \[n, 32\] are wanted"),
        ({"context": context[:0], "prediction": prediction[:0]}, "windows of this model"),
        ({"context": context, "prediction": prediction.astype(np.float64)}, "windows of this model"),
        ({"context": context}, "has no array"),
        ({"context": np.array([{}], object), "prediction": prediction}, "holds Python objects"),
    ):
        np.savez(copy / "golden.npz", **arrays)
        reseal(copy)
        refused(copy, says=says)
    (copy / "golden.npz").write_bytes(b"PK not a zip")
    reseal(copy)
    refused(copy, says="damaged")


def test_wrong_weights_under_fresh_hashes(copy):
    file = copy / "model.safetensors"
    good = load_file(file)
    name = "blocks.1.D"
    for weights, says in (
        ({key: value for key, value in good.items() if key != name}, "D is missing"),
        (good | {"extra": np.zeros(3, np.float32)}, "extra belongs to none"),
        (good | {name: np.zeros(3, np.float32)}, r"shape \[3\]"),
        (good | {name: good[name].astype(np.float16)}, "F16"),
        (good | {name: np.full_like(good[name], np.inf)}, "infinite"),
        (good | {name: np.full_like(good[name], 3e38)}, "golden windows off by"),
        (good | {"blocks.0.A_log": -good["blocks.0.A_log"]}, "golden windows off by"),
        (good | {"blocks.0.A_log": good["blocks.0.A_log"] + np.float32(1e38)}, "golden windows off by"),
        (good | {"mixture.logits": good["mixture.logits"][::-1]}, "golden windows off by"),
    ):
        save_file({key: np.ascontiguousarray(value) for key, value in weights.items()}, file)
        reseal(copy)
        refused(copy, says=says)
    for data in (b"", b"\xff" * 64, (10**12).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"):
        file.write_bytes(data)
        reseal(copy)
        refused(copy, says="no readable safetensors")


def layers_with(copy, number, **values):
    layers = json.loads((copy / "config.json").read_text())["layers"]
    layers[number] |= values
    return layers


@pytest.mark.parametrize(
    "changes, error, says",
    (
        ({"format": "other"}, InputError, "not an artifact"),
        ({"version": 2}, InputError, "version 2, and this fastlvm reads version 1"),
        ({"precision": "int4"}, InputError, "precision 'int4', and this version runs fp32, bf16, int8"),
        ({"precision": ["fp32"]}, InputError, "precision"),
        ({"context": 4}, InputError, "layer 7"),
        ({"context": 5.0}, IntegrityError, "lacks"),
        ({"dim": "32"}, IntegrityError, "lacks"),
        ({"payload_id": None}, IntegrityError, "lacks"),
        ({"payload_id": "0" * 16}, IntegrityError, "payload_id"),
        ({"space_id": "0" * 16}, IntegrityError, "space_id"),
        ({"index_id": "0" * 16}, IntegrityError, "index_id"),
        ({"layers": []}, InputError, "at least one layer"),
        ({"layers": {}}, InputError, "at least one layer"),
    ),
)
def test_a_changed_config_under_a_fresh_checksum(copy, changes, error, says):
    edit_config(copy, **changes)
    refused(copy, error, says)


def test_an_unknown_layer_names_what_this_version_knows(copy):
    edit_config(copy, layers=layers_with(copy, 2, type="local_attention"))
    refused(copy, InputError, "layer 2 has type 'local_attention', and this version knows linear, .*l2_norm")
    edit_config(copy, layers=layers_with(copy, 2, type="mamba_block", d_conv=0))
    refused(copy, InputError, "layer 2 .* has d_conv = 0, and a whole number .* is wanted.*export the artifact again")


def test_another_architecture_over_the_same_weights(copy):
    edit_config(copy, layers=layers_with(copy, 2, d_state=12))
    refused(copy, says=r"x_proj.weight has shape \[29, 96\], and \[27, 96\] is wanted")


def test_config_without_hashes_or_with_odd_json(copy):
    config = copy / "config.json"
    for text in ("[]", "null", "{", '{"format": NaN}', "[" * 100_000, "\x00", '{"format": "fastlvm-artifact"}'):
        config.write_text(text)
        with pytest.raises(InputError):
            fastlvm.Predictor.load(copy)


def test_a_path_in_the_hashes_leads_nowhere(copy):
    config = json.loads((copy / "config.json").read_text())
    edit_config(copy, sha256={})
    refused(copy, says="lacks")
    hashes = config["sha256"] | {"index/index.faiss": "0" * 64}
    edit_config(copy, sha256=hashes)
    refused(copy, says="lacks")


def test_a_foreign_index_in_the_folder(copy, payload, tmp_path):
    shutil.rmtree(copy / "index")
    Index.build(payload).save(copy / "index")
    reseal(copy)
    refused(copy, says="space_id")


def test_zero_golden_windows_are_laid_to_the_file(copy):
    with np.load(copy / "golden.npz") as golden:
        context, prediction = golden["context"].copy(), golden["prediction"]
    for value, says in ((0, "all zeros"), (np.nan, "not finite")):
        context[0, 0] = value
        np.savez(copy / "golden.npz", context=context, prediction=prediction)
        reseal(copy)
        refused(copy, says=rf"golden\.npz.*context\[0, 0\].*{says}.*export the artifact again")


def test_a_config_without_layers(copy):
    config = json.loads((copy / "config.json").read_text())
    config.pop("layers")
    (copy / "config.json").write_text(json.dumps(config))
    reseal(copy)
    refused(copy, InputError, r"config\.json.*layers")


@pytest.mark.parametrize(
    "change",
    ({"type": "x" * 3000}, {"x" * 3000: 1}, {"d_conv": ["x" * 3000] * 30}, {"prefix": "a\nb"}, {"prefix": "x" * 3000}),
)
def test_odd_values_are_told_in_one_short_line(copy, change):
    edit_config(copy, layers=layers_with(copy, 1, **change))
    refused(copy, InputError, r"config\.json: layer 1 ")
    with pytest.raises(InputError) as caught:
        fastlvm.Predictor.load(copy)
    assert len(str(caught.value)) < 800 and str(caught.value).isprintable()


def test_odd_names_and_shapes_of_tensors_are_told_in_one_short_line(copy):
    file = copy / "model.safetensors"
    good = load_file(file)
    for extra in (
        {"a\nb": np.zeros(3, np.float32)},
        {"x" * 3000: np.zeros(3, np.float32)},
        {"head.bias": np.zeros([1] * 64)},
    ):
        save_file(good | extra, file)
        reseal(copy)
        with pytest.raises(IntegrityError, match=r"model\.safetensors: tensor ") as caught:
            fastlvm.Predictor.load(copy)
        assert len(str(caught.value)) < 600 and str(caught.value).isprintable()


def test_the_reader_writes_nothing(copy):
    before = sorted((path, path.stat().st_mtime_ns) for path in copy.rglob("*"))
    fastlvm.Predictor.load(copy).search(np.ones((5, DIM), np.float32), 3)
    assert sorted((path, path.stat().st_mtime_ns) for path in copy.rglob("*")) == before


def test_golden_tolerance_is_stated():
    assert folder_format.TOLERANCE == {"fp32": 1e-5, "bf16": 2e-3, "int8": 4e-3}
