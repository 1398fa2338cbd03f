"""Measurements: perplexity, recognition, synthesis of units, outliers."""

from sparq.evaluation.abx import AbxErrors, AbxItem, AbxRate, abx_errors, angular_distances, identity_distances
from sparq.evaluation.attention_maps import HeadMaps, head_maps, most_sinky_head, token_norms
from sparq.evaluation.generation import generate_targets, stream_target
from sparq.evaluation.massive import MassiveActivation, MassiveActivations, find_massive_activations
from sparq.evaluation.minimal_pairs import (
    MinimalPair,
    PairAccuracy,
    pair_accuracies,
    read_pairs,
    read_sblimp,
    read_swuggy,
)
from sparq.evaluation.outeffhop import OutEffHopOutliers
from sparq.evaluation.outlier_report import OutlierReport
from sparq.evaluation.outliers import measure_outliers
from sparq.evaluation.perplexity import Perplexity, log_likelihoods, prose_perplexity, task_perplexity
from sparq.evaluation.recognition import Errors, Transcript, bootstrap_interval, score_transcript, sum_errors
from sparq.evaluation.records import read_records, write_records
from sparq.evaluation.removed_mass import RemovedMass, removed_mass
from sparq.evaluation.synthesis import UnitErrors, unit_errors
from sparq.evaluation.unit_quality import BitRate, UnitQuality, bit_rate, unit_quality

__all__ = [
    "AbxErrors",
    "AbxItem",
    "AbxRate",
    "BitRate",
    "Errors",
    "HeadMaps",
    "MassiveActivation",
    "MassiveActivations",
    "MinimalPair",
    "OutEffHopOutliers",
    "OutlierReport",
    "PairAccuracy",
    "Perplexity",
    "RemovedMass",
    "Transcript",
    "UnitErrors",
    "UnitQuality",
    "abx_errors",
    "angular_distances",
    "bit_rate",
    "bootstrap_interval",
    "find_massive_activations",
    "generate_targets",
    "head_maps",
    "identity_distances",
    "log_likelihoods",
    "measure_outliers",
    "most_sinky_head",
    "pair_accuracies",
    "prose_perplexity",
    "read_pairs",
    "read_records",
    "read_sblimp",
    "read_swuggy",
    "removed_mass",
    "score_transcript",
    "stream_target",
    "sum_errors",
    "task_perplexity",
    "token_norms",
    "unit_errors",
    "unit_quality",
    "write_records",
]
