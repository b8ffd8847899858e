"""from_pretrained and save_pretrained: what is read, written and refused, on disk, on the hub and from transformers."""

from __future__ import annotations

import json
import math
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers_small import SMALL, small

from fastlvm.compat.mamba_ssm import MambaConfig, MambaLMHeadModel, load_config_hf, load_state_dict_hf
from fastlvm.errors import InputError, IntegrityError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"
SIZES = {"d_model": 16, "n_layer": 2, "vocab_size": 30}
MAMBA2 = {"layer": "Mamba2", "headdim": 8, "d_state": 8, "dt_limit": (0.0, math.inf)}


def _model(**options):
    torch.manual_seed(0)
    return MambaLMHeadModel(MambaConfig(**SIZES, **options))


def _tokens():
    return torch.arange(14).view(2, 7)


@pytest.fixture
def folder(tmp_path):
    _model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _rewrite(folder, **changes):
    """Change tensors of a folder, or leave out those that are None."""
    weights = {**load_file(folder / WEIGHTS), **changes}
    save_file({name: x.contiguous() for name, x in weights.items() if x is not None}, folder / WEIGHTS)


def _configure(folder, **changes):
    content = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(content))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ssm_cfg", [{}, MAMBA2], ids=["Mamba", "Mamba2"])
@torch.no_grad()
def test_what_is_saved_is_loaded(tied, ssm_cfg, tmp_path):
    model = _model(tie_embeddings=tied, ssm_cfg=ssm_cfg)
    model.save_pretrained(tmp_path / "a" / "b")
    assert sorted(x.name for x in (tmp_path / "a" / "b").iterdir()) == [CONFIG, WEIGHTS]
    assert (HEAD in load_file(tmp_path / "a" / "b" / WEIGHTS)) != tied
    other = MambaLMHeadModel.from_pretrained(str(tmp_path / "a" / "b"))
    assert vars(other.config) | {"ssm_cfg": {}} == vars(model.config) | {"ssm_cfg": {}}
    assert torch.equal(other(_tokens()).logits, model(_tokens()).logits)
    assert (other.lm_head.weight is other.backbone.embedding.weight) == tied
    again = _model(tie_embeddings=tied, ssm_cfg=ssm_cfg)
    again.load_state_dict(load_state_dict_hf(tmp_path / "a" / "b"))
    assert torch.equal(again(_tokens()).logits, model(_tokens()).logits)


def test_the_config_on_disk_has_the_originals_names(folder):
    assert json.loads((folder / CONFIG).read_text()) == load_config_hf(folder) == {
        **SIZES,
        "d_intermediate": 0,
        "ssm_cfg": {},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
        "tie_embeddings": True,
    }  # fmt: skip


def test_a_config_of_the_first_originals(folder):
    """They had no d_intermediate, attention and tie_embeddings yet."""
    old = {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}
    (folder / CONFIG).write_text(json.dumps({**SIZES, "ssm_cfg": {}, **old}))
    assert torch.equal(MambaLMHeadModel.from_pretrained(folder)(_tokens()).logits, _model()(_tokens()).logits)


def test_the_model_has_the_dtype_that_is_asked_for(folder):
    half = MambaLMHeadModel.from_pretrained(folder, dtype=torch.bfloat16, device="cpu")
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(half.backbone.layers[0].mixer.A_log, _model().backbone.layers[0].mixer.A_log)
    weights = load_state_dict_hf(folder, device="cuda", dtype=torch.bfloat16)  # copied from main memory, rounded there
    assert (weights[EMBEDDING].dtype, weights[EMBEDDING].device.type) == (torch.float32, "cpu")
    half.save_pretrained(folder)
    assert load_file(folder / WEIGHTS)[EMBEDDING].dtype == torch.bfloat16
    assert MambaLMHeadModel.from_pretrained(folder).lm_head.weight.dtype == torch.float32


def test_a_save_that_fails_leaves_what_was_there(folder, monkeypatch):
    import safetensors.torch

    before = {file: file.read_bytes() for file in folder.iterdir()}
    model = _model(tie_embeddings=False)

    def fail(*args):
        raise MemoryError("no room")

    monkeypatch.setattr(safetensors.torch, "save", fail)
    with pytest.raises(MemoryError):
        model.save_pretrained(folder)
    model.config.ssm_cfg = {"dtype": torch.float32}  # no JSON
    monkeypatch.undo()
    with pytest.raises(TypeError):
        model.save_pretrained(folder)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_a_file_is_no_place_to_save(tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(InputError, match="is a file, and a folder is wanted"):
        _model().save_pretrained(tmp_path / "model")


def _split(folder, names=("one.safetensors", "two.safetensors")):
    """The weights of a folder in two files and an index."""
    weights = load_file(folder / WEIGHTS)
    halves = [dict(list(weights.items())[i::2]) for i in (0, 1)]
    for name, half in zip(("one.safetensors", "two.safetensors"), halves, strict=True):
        save_file(half, folder / name)
    places = {tensor: name for name, half in zip(names, halves, strict=True) for tensor in half}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / WEIGHTS).unlink()


def test_weights_in_several_files(folder):
    _split(folder)
    assert torch.equal(MambaLMHeadModel.from_pretrained(folder)(_tokens()).logits, _model()(_tokens()).logits)


@pytest.mark.parametrize("name", ["three.safetensors", "../model/two.safetensors", "two.bin", ""])
def test_an_index_names_files_beside_it_only(name, folder):
    _split(folder, ("one.safetensors", name))
    (folder / "two.bin").write_bytes((folder / "two.safetensors").read_bytes())
    with pytest.raises(IntegrityError, match=f"index.json names '{name}', which is not there"):
        MambaLMHeadModel.from_pretrained(folder)


@pytest.mark.parametrize("content", [[], {}, {"weight_map": {}}, {"weight_map": {"a": 3}}], ids=str)
def test_an_index_that_names_none(content, folder):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match="names no files"):
        MambaLMHeadModel.from_pretrained(folder)


class Explosive:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def _only_a_pickle(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Explosive(), file)


def _cut(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])


X = "backbone.layers.1.mixer.x_proj.weight"
DAMAGES = {
    "no config": (lambda f: (f / CONFIG).unlink(), "holds no config.json"),
    "no JSON": (lambda f: (f / CONFIG).write_text("{"), "config.json is not valid JSON"),
    "no object": (lambda f: (f / CONFIG).write_text("[]"), "config.json holds no object"),
    "unknown entry": (lambda f: _configure(f, num_experts=8), "has 'num_experts', which is no option of MambaConfig"),
    "wrong entry": (lambda f: _configure(f, d_model="16"), "d_model is '16', and a whole number from 1 on is wanted"),
    "wrong flag": (lambda f: _configure(f, rms_norm=1), "rms_norm is 1, and true or false is wanted"),
    "attention": (lambda f: _configure(f, attn_layer_idx=[0]), "fastlvm has no attention layers"),
    "Mamba-3": (lambda f: _configure(f, ssm_cfg={"layer": "Mamba3"}), "layer of ssm_cfg is 'Mamba3'"),
    "unknown argument": (lambda f: _configure(f, ssm_cfg={"ngroups": 2}), "ssm_cfg has 'ngroups'; Mamba takes"),
    "another model": (
        lambda f: (f / CONFIG).write_text('{"model_type": "jamba"}'),
        "is of a model 'jamba'; wants mamba or mamba2; take transformers' AutoModelForCausalLM",
    ),
    "half a config": (
        lambda f: (f / CONFIG).write_text('{"model_type": "mamba", "hidden_size": 16}'),
        "lacks num_hidden_layers",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "holds no model.safetensors"),
    "a pickle": (
        _only_a_pickle,
        "a pytorch_model.bin is a pickle, .* and fastlvm loads none: .*mamba-130m-hf.*convert",
    ),
    "cut": (_cut, "model.safetensors is no readable safetensors file"),
    "a missing tensor": (lambda f: _rewrite(f, **{X: None}), f"lacks {X}: check that config.json and the weights"),
    "missing tensors": (lambda f: _configure(f, n_layer=3), r"lacks backbone.layers.2\S+ and 9 more tensors"),
    "an unknown tensor": (lambda f: _rewrite(f, more=torch.ones(1)), "holds more, which the model has not"),
    "a shape": (
        lambda f: _rewrite(f, **{X: torch.ones(4, 32)}),
        rf"holds {X} as float32 \(4, 32\), and the model has float32 \(33, 32\)",
    ),
    "whole numbers": (lambda f: _rewrite(f, **{X: torch.ones(33, 32, dtype=torch.int8)}), rf"{X} as int8 \(33, 32\)"),
    "another head": (
        lambda f: _rewrite(f, **{HEAD: torch.ones(32, 16)}),
        "head that is not the embedding: set tie_embeddings to false",
    ),
    "no head": (lambda f: _configure(f, tie_embeddings=False), f"lacks {HEAD}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_is_told_in_one_sentence(damage, folder):
    spoil, message = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(InputError, match=message) as caught:
        MambaLMHeadModel.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert folder.name in str(caught.value) or "create_block" in str(caught.value)
    assert isinstance(caught.value, NotImplementedError) == (damage in ("attention", "Mamba-3", "another model"))


@pytest.mark.parametrize("name", ["no such folder", "./no/such", "/no/such", "a/b/c", "model.safetensors"])
def test_a_name_that_is_no_folder_and_no_repository(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match="is neither a folder nor a name such as state-spaces/mamba-130m-hf"):
        MambaLMHeadModel.from_pretrained(name)


def test_a_repository_without_huggingface_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"a/b is no folder here, and huggingface_hub, .* is not installed"):
        MambaLMHeadModel.from_pretrained("a/b")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The cache of huggingface_hub, empty and without a connection."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _cache(hub, folder, *files):
    """The repository a/b with files of a folder."""
    snapshot = hub / "models--a--b" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (hub / "models--a--b" / "refs").mkdir()
    (hub / "models--a--b" / "refs" / "main").write_text("0" * 40)
    for file in files:
        (snapshot / file).write_bytes((folder / file).read_bytes())


@pytest.mark.parametrize("split", [False, True])
def test_a_repository_in_the_cache(split, folder, hub):
    if split:
        _split(folder)
    _cache(hub, folder, *[file.name for file in folder.iterdir()])
    model = MambaLMHeadModel.from_pretrained("a/b")
    assert torch.equal(model(_tokens()).logits, _model()(_tokens()).logits)


def test_a_repository_that_cannot_be_had(folder, hub):
    with pytest.raises(InputError, match=r"its config.json is neither in the cache of huggingface_hub nor can the"):
        MambaLMHeadModel.from_pretrained("a/b")
    _cache(hub, folder, CONFIG)
    with pytest.raises(InputError, match=r"its model.safetensors or model.safetensors.index.json is neither"):
        MambaLMHeadModel.from_pretrained("a/b")


def test_what_the_hub_answers(monkeypatch, folder):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def answer(repository, file):
        asked.append(f"{repository}/{file}")
        if file == CONFIG:
            return str(folder / CONFIG)
        raise hub.utils.EntryNotFoundError("404")

    monkeypatch.setattr(hub, "hf_hub_download", answer)
    with pytest.raises(InputError, match=r"a/b holds no model.safetensors; a pytorch_model.bin is a pickle"):
        MambaLMHeadModel.from_pretrained("a/b")
    assert asked == ["a/b/config.json", "a/b/model.safetensors", "a/b/model.safetensors.index.json"]

    def refuse(repository, file):
        raise OSError("a long\nstory")

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    with pytest.raises(InputError, match=r"config.json of a/b cannot be fetched: a long story$"):
        MambaLMHeadModel.from_pretrained("a/b")


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": False, "use_bias": True}], ids=str)
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@torch.no_grad()
def test_models_that_transformers_saved(kind, options, transformers, tmp_path):
    """Logits as transformers computes them, and the tokens that it generates."""
    theirs = small(transformers, kind, **options)
    theirs.save_pretrained(tmp_path)
    _configure(tmp_path, d_model=32, n_layer=2, ssm_cfg={}, rms_norm=True)  # left over in those on the hub
    ours = MambaLMHeadModel.from_pretrained(tmp_path)
    tokens = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    wanted = theirs(tokens).logits
    assert (ours(tokens).logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    generated = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False)
    assert torch.equal(ours.generate(tokens, 21), generated)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@torch.no_grad()
def test_our_weights_in_models_of_transformers(kind, transformers):
    sizes = SMALL[kind][2]
    mixer = {"d_state": sizes["state_size"]}
    mixer |= {"layer": "Mamba2", "headdim": 8, "ngroups": 2} if kind == "mamba2" else {"dt_rank": 4}
    torch.manual_seed(0)
    ours = MambaLMHeadModel(MambaConfig(32, 0, 2, 61, mixer, pad_vocab_size_multiple=1, tie_embeddings=False))
    theirs = small(transformers, kind, tie_word_embeddings=False)
    weights = ours.state_dict()
    weights["backbone.embeddings.weight"] = weights.pop(EMBEDDING)
    theirs.load_state_dict(weights, strict=True)
    tokens = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    wanted = theirs(tokens).logits
    assert (ours(tokens).logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_options_of_transformers_that_mamba_ssm_has_not(transformers, tmp_path):
    small(transformers, "mamba", layer_norm_epsilon=1e-6).config.save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="has layer_norm_epsilon 1e-06; mamba_ssm has 1e-05"):
        load_config_hf(tmp_path)


@pytest.mark.parametrize("infinity", ["Infinity", '{"__float__": "Infinity"}'])
def test_limits_of_step_sizes_that_json_has_no_word_for(infinity, transformers, tmp_path):
    small(transformers, "mamba2").config.save_pretrained(tmp_path)
    file = Path(tmp_path / CONFIG)
    content = json.loads(file.read_text()) | {"time_step_limit": "HERE"}
    file.write_text(json.dumps(content).replace('"HERE"', f"[0.01, {infinity}]"))
    assert load_config_hf(tmp_path)["ssm_cfg"]["dt_limit"] == (0.01, math.inf)
