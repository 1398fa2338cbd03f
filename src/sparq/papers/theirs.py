"""What the papers print for a cell of an experiment."""

from sparq.papers.experiments import Cell
from sparq.papers.published import PublishedRow, PublishedTable


def models_of(table: PublishedTable | None) -> list[str]:
    """Return the models of a table in its order; one empty name where it names none, nothing without a table."""
    return [] if table is None else list(dict.fromkeys(str(row.labels.get("model", "")) for row in table.rows))


def find_row(table: PublishedTable, cell: Cell, model: str) -> PublishedRow | None:
    """Return the row of a cell for one of the table's models; their framework is both readings of it."""
    # A table of parameters has one row a model, whatever its attention.
    any_framework = "framework" not in table.rows[0].labels
    own = [row for row in table.rows if str(row.labels.get("model", "")) == model]
    rows = [row for row in own if any_framework or cell.is_of(row.labels)]
    assert len(rows) <= 1, f"{table.name} has {len(rows)} rows of {cell} for {model or 'its model'}"
    return rows[0] if rows else None
