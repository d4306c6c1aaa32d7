"""What a command prints, in the form that is asked for: a table for people, Markdown, or records for programs."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Form = Literal["table", "markdown", "json", "csv"]


def records(rows: Sequence[Mapping[str, Any]], form: Form) -> str:
    """Returns flat records of the same keys as a JSON list, as CSV or as a Markdown pipe table."""
    if form == "json":
        return json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    head = list(rows[0]) if rows else []
    if form == "markdown":
        return pipe_table(head, [[str(value) for value in row.values()] for row in rows])
    text = io.StringIO()
    writer = csv.DictWriter(text, head, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def pipe_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """Returns a Markdown table; the columns at the indices ``numbers`` are aligned to the right."""
    rule = ["---:" if place in numbers else "---" for place in range(len(head))]
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(rule)}|"]
    escaped = ([cell.replace("|", "\\|").replace("*", "\\*") for cell in row] for row in rows)
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in escaped)]) + "\n"
