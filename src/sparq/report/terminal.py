"""The report as plain text for a terminal of 110 columns."""

import textwrap

from sparq.report.outlier_tables import outlier_tables
from sparq.report.results import Results
from sparq.report.summary import summarize
from sparq.report.tables import WIDTH, draw, main_table, prose_table


def render_terminal(results: Results) -> str:
    """Return the main, prose and outlier tables, the summary and the notes, without a final newline."""
    tables = (main_table(results), prose_table(results), *outlier_tables(results))
    blocks = [draw(table) for table in tables if table is not None]
    sentences = [*summarize(results), *(f"Note: {note}" for note in results.notes)]
    wrapped = ["\n".join(textwrap.wrap(s, WIDTH - 2, initial_indent="* ", subsequent_indent="  ")) for s in sentences]
    if wrapped:
        blocks.append("\n".join(wrapped))
    return "\n\n".join(blocks)
