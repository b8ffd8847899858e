"""Exact ranks, baselines, intervals, latency, gates, and the report that holds them. Never imports torch."""

from __future__ import annotations

from fastlvm.evaluation.baselines import fit_baselines
from fastlvm.evaluation.gates import GATES, check, enforce
from fastlvm.evaluation.latency import Latency, measure, measure_retrieval
from fastlvm.evaluation.metrics import MISS, Bootstrap, Estimate, exact_ranks, rank_many
from fastlvm.evaluation.ranker import Pool, Ranker
from fastlvm.evaluation.report import Report, evaluate

__all__ = [
    "Bootstrap",
    "Estimate",
    "GATES",
    "Latency",
    "MISS",
    "Pool",
    "Ranker",
    "Report",
    "check",
    "enforce",
    "evaluate",
    "exact_ranks",
    "fit_baselines",
    "measure",
    "measure_retrieval",
    "rank_many",
]
