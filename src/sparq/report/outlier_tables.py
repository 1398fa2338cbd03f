"""The tables of outliers: of layer outputs, of attention, and by task."""

from collections.abc import Callable, Iterable

from sparq.report.numbers import precision_label, show_number
from sparq.report.results import Outliers, Results, Row
from sparq.report.tables import Line, Table


def outlier_tables(results: Results) -> list[Table]:
    """Return the tables of outliers that the rows can fill, in the order in which they are to be read."""
    rows = [(row, row.outliers) for row in results.ordered_rows() if row.outliers]
    if not rows:
        return []
    tables = [_norms(rows), _attention(rows)]
    if any(len(found.by_task) > 1 for _, found in rows):
        tables.append(_tasks(rows))
    return tables


def _norms(rows: Iterable[tuple[Row, Outliers]]) -> Table:
    return Table(
        caption="Outliers of layer outputs",
        columns=("Framework", "Precision", "Max inf norm", "After final norm", "Mean kurtosis", "Tokens"),
        groups=_groups(
            rows,
            lambda found: (
                show_number(found.max_inf_norm),
                show_number(found.final_norm_max_inf_norm),
                show_number(found.mean_kurtosis),
                f"{found.tokens:,}",
            ),
        ),
    )


def _attention(rows: Iterable[tuple[Row, Outliers]]) -> Table:
    return Table(
        caption="Attention: what it spends, on what, and |v|, the norms of the values behind it",
        columns=(
            "Framework",
            "Precision",
            "Row mass",
            "First token",
            "Sinks",
            "Entropy",
            "Max logit",
            "|v| first",
            "|v| sinks",
            "|v| rest",
        ),
        groups=_groups(
            rows,
            lambda found: (
                f"{found.attention_mass:.4f}",
                f"{found.first_token_share:.4f}",
                f"{found.sink_rate:.4f}",
                show_number(found.attention_entropy),
                show_number(found.max_logit),
                show_number(found.first_value_norm),
                show_number(found.sink_value_norm),
                show_number(found.other_value_norm),
            ),
        ),
    )


def _tasks(rows: list[tuple[Row, Outliers]]) -> Table:
    tasks = list(dict.fromkeys(task for _, found in rows for task in found.by_task))
    return Table(
        caption="Outliers by task: max inf norm / mean kurtosis",
        columns=("Framework", "Precision", *tasks),
        groups=_groups(
            ((row, found) for row, found in rows if found.by_task),
            lambda found: tuple(
                f"{show_number(task.max_inf_norm)} / {show_number(task.mean_kurtosis)}"
                if (task := found.by_task.get(name))
                else "-"
                for name in tasks
            ),
        ),
        notes=tuple(
            f"{name}: {' or '.join(f'{n:,}' for n in counts)} tokens."
            for name in tasks
            if (counts := sorted({found.by_task[name].tokens for _, found in rows if name in found.by_task}))
        ),
    )


def _groups(
    rows: Iterable[tuple[Row, Outliers]], cells: Callable[[Outliers], tuple[str, ...]]
) -> tuple[tuple[Line, ...], ...]:
    groups: dict[str, list[Line]] = {}
    for row, found in rows:
        line = Line(cells=(row.framework, precision_label(row.precision), *cells(found)))
        groups.setdefault(row.framework, []).append(line)
    return tuple(tuple(lines) for lines in groups.values())
