"""Measurements: perplexity, recognition, synthesis of units, outliers."""

from sparq.evaluation.attention_maps import HeadMaps, head_maps, most_sinky_head, token_norms
from sparq.evaluation.generation import generate_targets, stream_target
from sparq.evaluation.outeffhop import OutEffHopOutliers
from sparq.evaluation.outlier_report import OutlierReport
from sparq.evaluation.outliers import measure_outliers
from sparq.evaluation.perplexity import Perplexity, prose_perplexity, task_perplexity
from sparq.evaluation.recognition import Errors, Transcript, bootstrap_interval, score_transcript, sum_errors
from sparq.evaluation.records import read_records, write_records
from sparq.evaluation.removed_mass import RemovedMass, removed_mass
from sparq.evaluation.synthesis import UnitErrors, unit_errors

__all__ = [
    "Errors",
    "HeadMaps",
    "OutEffHopOutliers",
    "OutlierReport",
    "Perplexity",
    "RemovedMass",
    "Transcript",
    "UnitErrors",
    "bootstrap_interval",
    "generate_targets",
    "head_maps",
    "measure_outliers",
    "most_sinky_head",
    "prose_perplexity",
    "read_records",
    "removed_mass",
    "score_transcript",
    "stream_target",
    "sum_errors",
    "task_perplexity",
    "token_norms",
    "unit_errors",
    "write_records",
]
