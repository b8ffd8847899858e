"""Exact ranks, baselines, intervals, latency, gates, and the report that holds them. Never imports torch."""

from __future__ import annotations

from fastlvm.evaluation.baselines import fit_baselines
from fastlvm.evaluation.bootstrap import Bootstrap, Estimate
from fastlvm.evaluation.gate_file import Gate, load_gate
from fastlvm.evaluation.gates import Verdict, check, enforce
from fastlvm.evaluation.latency import Latency, measure, measure_retrieval
from fastlvm.evaluation.pipeline import evaluate
from fastlvm.evaluation.ranker import Listing, Pool, Ranker
from fastlvm.evaluation.ranks import MISS, exact_ranks, rank_many
from fastlvm.evaluation.report import Report

__all__ = [
    "Bootstrap",
    "Estimate",
    "Gate",
    "Latency",
    "Listing",
    "MISS",
    "Pool",
    "Ranker",
    "Report",
    "Verdict",
    "check",
    "enforce",
    "evaluate",
    "exact_ranks",
    "fit_baselines",
    "load_gate",
    "measure",
    "measure_retrieval",
    "rank_many",
]
