"""The report: results.json, the table of the terminal and the self-contained report.html."""

from sparq.report.codec import read_results, write_results
from sparq.report.drop import Drop, average_drop, drops, row_drop
from sparq.report.html import render_html, write_html
from sparq.report.provenance import collect_provenance, utc_now
from sparq.report.results import (
    FRAMEWORKS,
    FULL,
    PRECISIONS,
    SCHEMA_VERSION,
    AsrSplit,
    AudioSample,
    ErrorRate,
    Example,
    LayerOutliers,
    Outliers,
    Perplexity,
    Provenance,
    Results,
    Row,
    SpeechReference,
    SplitSummary,
    TaskOutliers,
)
from sparq.report.summary import summarize
from sparq.report.terminal import render_terminal
from sparq.report.traces import AttentionMap, CurvePoint, HiddenMap, LiveSlice, TrainingCurve, matrix

__all__ = [
    "FRAMEWORKS",
    "FULL",
    "PRECISIONS",
    "SCHEMA_VERSION",
    "AsrSplit",
    "AttentionMap",
    "AudioSample",
    "CurvePoint",
    "Drop",
    "ErrorRate",
    "Example",
    "HiddenMap",
    "LayerOutliers",
    "LiveSlice",
    "Outliers",
    "Perplexity",
    "Provenance",
    "Results",
    "Row",
    "SpeechReference",
    "SplitSummary",
    "TaskOutliers",
    "TrainingCurve",
    "average_drop",
    "collect_provenance",
    "drops",
    "matrix",
    "read_results",
    "render_html",
    "render_terminal",
    "row_drop",
    "summarize",
    "utc_now",
    "write_html",
    "write_results",
]
