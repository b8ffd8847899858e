"""Ops of Mamba models: one call, one result, on every backend that can run here."""

from __future__ import annotations

from fastlvm.ops._export import decompositions, register
from fastlvm.ops._native import get_num_threads, set_num_threads
from fastlvm.ops.causal_conv1d import causal_conv1d
from fastlvm.ops.causal_conv1d_step import causal_conv1d_step
from fastlvm.ops.dispatch import explain
from fastlvm.ops.info_nce import info_nce
from fastlvm.ops.mamba_step import mamba_step
from fastlvm.ops.ssd_scan import ssd_scan
from fastlvm.ops.ssd_step import ssd_step
from fastlvm.ops.ssm_scan import ssm_scan
from fastlvm.ops.ssm_step import ssm_step

__all__ = [
    "causal_conv1d",
    "causal_conv1d_step",
    "decompositions",
    "explain",
    "get_num_threads",
    "info_nce",
    "mamba_step",
    "register",
    "set_num_threads",
    "ssd_scan",
    "ssd_step",
    "ssm_scan",
    "ssm_step",
]
