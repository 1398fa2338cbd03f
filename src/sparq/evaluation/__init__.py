"""Measurements: perplexity, recognition, synthesis of units, outliers."""

from sparq.evaluation.attention_maps import attention_map, most_sinky_head, token_norms
from sparq.evaluation.generation import generate_targets
from sparq.evaluation.outeffhop import OutEffHopOutliers, measure_outeffhop
from sparq.evaluation.outliers import OutlierReport, measure_outliers
from sparq.evaluation.perplexity import Perplexity, prose_perplexity, task_perplexity
from sparq.evaluation.recognition import Transcribed, WordErrors, word_errors
from sparq.evaluation.removed_mass import RemovedMass, removed_mass
from sparq.evaluation.synthesis import UnitErrors, unit_errors

__all__ = [
    "OutEffHopOutliers",
    "OutlierReport",
    "Perplexity",
    "RemovedMass",
    "Transcribed",
    "UnitErrors",
    "WordErrors",
    "attention_map",
    "generate_targets",
    "measure_outeffhop",
    "measure_outliers",
    "most_sinky_head",
    "prose_perplexity",
    "removed_mass",
    "task_perplexity",
    "token_norms",
    "unit_errors",
    "word_errors",
]
