"""mamba_ssm (state-spaces/mamba), its functions and modules with the same arguments, through fastlvm's ops.

`fastlvm.compat.install()` lets `import mamba_ssm` find them. They run on every device and layout that the ops run on,
with any d_state, and take float64 throughout beside the dtypes of the original.
"""

from __future__ import annotations

from fastlvm import __version__ as _fastlvm
from fastlvm.compat.mamba_ssm.block import Block
from fastlvm.compat.mamba_ssm.cache import InferenceParams
from fastlvm.compat.mamba_ssm.config import MambaConfig
from fastlvm.compat.mamba_ssm.generation import (
    GenerationMixin,
    decode,
    modify_logit_for_repetition_penalty,
    modify_logits_for_min_p_filtering,
    modify_logits_for_top_k_filtering,
    modify_logits_for_top_p_filtering,
    sample,
)
from fastlvm.compat.mamba_ssm.hf import load_config_hf, load_state_dict_hf
from fastlvm.compat.mamba_ssm.lm import MambaLMHeadModel, MixerModel, create_block
from fastlvm.compat.mamba_ssm.mamba import Mamba
from fastlvm.compat.mamba_ssm.mamba2 import Mamba2
from fastlvm.compat.mamba_ssm.mlp import GatedMLP
from fastlvm.compat.mamba_ssm.norms import (
    LayerNormGated,
    RMSNorm,
    RMSNormGated,
    layer_norm_fn,
    layernorm_fn,
    rms_norm_fn,
    rmsnorm_fn,
)
from fastlvm.compat.mamba_ssm.selective_scan import (
    mamba_inner_fn,
    mamba_inner_ref,
    selective_scan_fn,
    selective_scan_ref,
)
from fastlvm.compat.mamba_ssm.ssd import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
from fastlvm.compat.mamba_ssm.state_update import selective_state_update

__version__ = f"2.3.2+fastlvm.{_fastlvm}"  # whose signatures these are, and where the code comes from

__all__ = [
    "Block",
    "GatedMLP",
    "GenerationMixin",
    "InferenceParams",
    "LayerNormGated",
    "Mamba",
    "Mamba2",
    "MambaConfig",
    "MambaLMHeadModel",
    "MixerModel",
    "RMSNorm",
    "RMSNormGated",
    "create_block",
    "decode",
    "layer_norm_fn",
    "layernorm_fn",
    "load_config_hf",
    "load_state_dict_hf",
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_inner_ref",
    "mamba_split_conv1d_scan_combined",
    "modify_logit_for_repetition_penalty",
    "modify_logits_for_min_p_filtering",
    "modify_logits_for_top_k_filtering",
    "modify_logits_for_top_p_filtering",
    "rms_norm_fn",
    "rmsnorm_fn",
    "sample",
    "selective_scan_fn",
    "selective_scan_ref",
    "selective_state_update",
]
