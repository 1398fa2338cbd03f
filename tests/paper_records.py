"""Records of experiments with made-up numbers."""

from sparq.papers import Cell, Record
from sparq.report import Provenance, collect_provenance

PROVENANCE: Provenance = collect_provenance(("test",))


def record(cell: Cell, seed: int = 0, **values: float | None) -> Record:
    return Record(
        profile="test", model="tiny", recipe="small", cell=cell, measure="tasks", seed=seed, settings="", values=values,
        seconds=1.5, created="2026-01-01T00:00:00+00:00", provenance=PROVENANCE,
    )  # fmt: skip


def tasks(cell: Cell, seed: int, *values: float) -> Record:
    return record(cell, seed, **dict(zip(("textlm_ppl", "speechlm_ppl", "asr_wer", "tts_uer"), values, strict=True)))
