"""What a MambaLMHeadModel is made of: its config, and the config.json of mamba_ssm and of transformers as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastlvm.compat._checks import UnsupportedError
from fastlvm.errors import InputError, shown
from fastlvm.files import Entries, whole_number, wrong_entry


@dataclass
class MambaConfig:
    """Sizes and options of a `MambaLMHeadModel`.

    Args:
        d_model: channels of the residual stream.
        d_intermediate: channels within the MLP of every layer; 0 for none.
        n_layer: layers.
        vocab_size: tokens; the embedding has the next multiple of `pad_vocab_size_multiple` rows.
        ssm_cfg: arguments of every mixer, and `layer`: "Mamba1", which is the default, or "Mamba2".
        attn_layer_idx: empty; fastlvm has no attention layers.
        attn_cfg: of no effect without them.
        rms_norm: RMS norms instead of layer norms.
        residual_in_fp32: keep the residual stream in float32.
        fused_add_norm: norm the residual stream in float32 instead of in the weights' dtype.
        tie_embeddings: the head's weight is the embedding's.
    """

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


def _kind(of: type, what: str) -> tuple[str, Any]:
    return what, lambda value: isinstance(value, of)


_FLAG, _OBJECT = _kind(bool, "true or false"), _kind(dict, "an object")
_ENTRIES: Entries = {
    "d_model": whole_number(1),
    "d_intermediate": whole_number(0),
    "n_layer": whole_number(0),
    "vocab_size": whole_number(1),
    "ssm_cfg": _OBJECT,
    "attn_layer_idx": _kind(list, "a list"),
    "attn_cfg": _OBJECT,
    "rms_norm": _FLAG,
    "residual_in_fp32": _FLAG,
    "fused_add_norm": _FLAG,
    "pad_vocab_size_multiple": whole_number(1),
    "tie_embeddings": _FLAG,
}
_MIXER = {"d_state": "state_size", "d_conv": "conv_kernel", "expand": "expand", "bias": "use_bias"}
_MIXER |= {"conv_bias": "use_conv_bias"}  # argument of a mixer -> its name in transformers
_KINDS = {  # model_type -> what else its mixers take
    "mamba": {"dt_rank": "time_step_rank"},
    "mamba2": {"headdim": "head_dim", "ngroups": "n_groups", "chunk_size": "chunk_size"},
}


def from_entries(content: Mapping[str, Any], where: object) -> MambaConfig:
    """The config of a config.json; a name or a value that is none of it is an InputError with `where` in it."""
    if unknown := sorted(content.keys() - _ENTRIES.keys()):
        known = ", ".join(_ENTRIES)
        raise InputError(f"config.json of {where} has {shown(unknown[0])}, which is no option of MambaConfig: {known}")
    if wrong := wrong_entry({**dataclasses.asdict(MambaConfig()), **content}, _ENTRIES):
        raise InputError(f"config.json of {where} makes no MambaConfig: {wrong}")
    return MambaConfig(**content)


def from_transformers(content: Mapping[str, Any], where: object) -> dict[str, Any]:
    """The entries of transformers' MambaConfig or Mamba2Config as those of `MambaConfig`."""
    kind = content.get("model_type")
    if kind not in _KINDS:
        wanted = "mamba or mamba2; take transformers' AutoModelForCausalLM and fastlvm.compat.patch_transformers"
        raise UnsupportedError(f"config.json of {where} is of a model {shown(kind)}; wants {wanted}")
    names = _MIXER | _KINDS[kind]
    wanted_names = ["hidden_size", "num_hidden_layers", "vocab_size", *names.values()]
    if missing := [name for name in wanted_names if name not in content]:
        raise InputError(f"config.json of {where} lacks {missing[0]}: save the model with transformers again")
    for name, value in (("layer_norm_epsilon", 1e-5), ("hidden_act", "silu")):
        if content.get(name, value) != value:
            raise UnsupportedError(f"config.json of {where} has {name} {shown(content[name])}; mamba_ssm has {value}")
    mixer = {name: content[theirs] for name, theirs in names.items()}
    if kind == "mamba2":
        mixer |= {"layer": "Mamba2", "dt_limit": _limits(content.get("time_step_limit"))}
    return {
        "d_model": content["hidden_size"],
        "n_layer": content["num_hidden_layers"],
        "vocab_size": content["vocab_size"],
        "ssm_cfg": mixer,
        "residual_in_fp32": content.get("residual_in_fp32", True),
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": content.get("tie_word_embeddings", True),
    }


def _limits(limits: Any) -> tuple[float, ...]:
    """JSON has no infinity: transformers writes {"__float__": "Infinity"}, or the bare word."""
    if limits is None:
        return (0.0, float("inf"))
    return tuple(float(x["__float__"] if isinstance(x, dict) else x) for x in limits)
