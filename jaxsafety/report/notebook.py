"""A run as somebody at a notebook wants it: tables as polars frames, figures as matplotlib's, itself as a page."""

from dataclasses import dataclass
from html import escape
from pathlib import Path

import polars as pl

from jaxsafety.report import claims_table, judged, sections, tables
from jaxsafety.report.plotting import Drawn
from jaxsafety.rundir import layout

_LABEL = "text-align:left;white-space:nowrap;padding-right:1em"
_NUMBER = "text-align:right;white-space:nowrap;padding-left:1em"


@dataclass(frozen=True)
class Run:
    """A run directory, or what is kept of one, whose files are read anew at every call.

    Attributes:
        directory: where it lies.

    Example:
        >>> import jaxsafety
        >>> run = jaxsafety.open_run("experiments/results/quick")
        >>> run.table()["method"].unique(maintain_order=True).to_list()
        ['pretrained', 'sft', 'dpo', 'unlearn']
        >>> run.claims().height
        28
    """

    directory: Path

    @property
    def figures(self) -> list[str]:
        """The names of the figures that can be drawn of it; none where nothing was analysed."""
        if not (self.directory / "results" / layout.ANALYSIS_FILE).exists():
            return []
        frames, shown = sections.read(self.directory), sections.of_run(self.directory)
        return [name for name in shown if not sections.table(name, frames, shown).is_empty()]

    def table(self) -> pl.DataFrame:
        """Returns the result table, as ``jaxsafety report --format csv`` prints it.

        A row is a model: ``method``, ``lr_name`` and ``lr``; then of every column the mean over seeds, a share in
        [0, 1], and with ``low``, ``high`` and ``n`` behind its name the 95 % interval and the number of living seeds.

        Raises:
            ValueError: the run has not been evaluated, or a file of it is damaged.
        """
        return pl.DataFrame(tables.records(judged.read(self.directory).table()), infer_schema_length=None)

    def verdicts(self) -> pl.DataFrame:
        """Returns what every model of every seed was judged by, a value a row; raises as :meth:`table`."""
        return judged.read(self.directory).evaluated

    def curves(self) -> pl.DataFrame:
        """Returns the learning curves, a value a row, with its ``stage`` and ``step``; raises as :meth:`table`."""
        return judged.read(self.directory).curves

    def analyses(self) -> pl.DataFrame:
        """Returns all that the analyses measured, a value a row.

        Raises:
            ValueError: the run has not been analysed, or a file of it is damaged.
        """
        return sections.read(self.directory)["analyze"]

    def claims(self) -> pl.DataFrame:
        """Returns the statements and what came out of each, as ``jaxsafety claims --format csv`` prints them.

        Raises:
            ValueError: as :meth:`analyses`.
        """
        return pl.DataFrame(claims_table.flat(claims_table.read(self.directory).judgements), infer_schema_length=None)

    def figure(self, name: str) -> Drawn:
        """Returns one of ``figures`` as a matplotlib figure; a notebook shows it as the report does.

        Raises:
            ValueError: an unknown name, which lists them all, a run without analyses, or nothing to draw.
        """
        return sections.drawn(name, self.directory)

    def _repr_html_(self) -> str:
        found = judged.read(self.directory).table()
        head = "".join(f"<th>{escape(name)}</th>" for name in ("model", *tables.column_names(found)))
        body = "".join(
            f'<tr><td style="{_LABEL}">{escape(tables.model_label(row.model))}</td>'
            + "".join(f'<td style="{_NUMBER}">{escape(tables.cell_text(cell))}</td>' for cell in row.cells.values())
            + "</tr>"
            for row in found
        )
        notes = "".join(f"<p>{escape(note)}</p>" for note in self._notes(found))
        title = escape(self.directory.resolve().name)
        # A narrow page scrolls the table alone.
        table = f'<div style="overflow-x:auto"><table><tr>{head}</tr>{body}</table></div>'
        return f"<div><b>{title}</b>{table}{notes}</div>"

    def _notes(self, table: list[tables.StudyRow]) -> list[str]:
        notes = tables.table_notes(table)
        if not (names := self.figures):
            return notes
        judgements = claims_table.read(self.directory).judgements
        counted = [claims_table.counted(judgements)] if judgements else []
        return [*notes, *counted, f"Figures: {', '.join(names)}."]


def open_run(directory: Path) -> Run:
    """See :func:`jaxsafety.open_run`."""
    layout.check_run(directory)
    return Run(directory)
