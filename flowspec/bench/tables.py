"""Tables as Markdown, LaTeX and CSV; line breaks in cells become spaces where unsupported."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

NO_FIGURE = "-"
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "{": r"\{",
        "}": r"\}",
        **{character: rf"\{character}" for character in "&%$#_"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "–": "--",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "\n": " ",
    }
)
_MARKDOWN = str.maketrans({"|": r"\|", "\n": " ", "*": r"\*", "_": r"\_"})


@dataclass(frozen=True, slots=True)
class Table:
    """A table; the first column names a row, the others hold figures."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), self.title

    def without_empty(self) -> "Table":
        """Return the table without the columns in which no row has a figure."""
        kept = [0, *(k for k in range(1, len(self.columns)) if self._has_figures(k))]
        columns = [self.columns[k] for k in kept]
        return replace(self, columns=columns, rows=[[row[k] for k in kept] for row in self.rows])

    def _has_figures(self, column: int) -> bool:
        return any(row[column] not in ("", NO_FIGURE) for row in self.rows)


def to_markdown(tables: Iterable[Table]) -> str:
    """Write pipe tables below bold titles, with notes below them."""
    return "\n".join(map(_markdown, tables))


def _markdown(table: Table) -> str:
    lines = [table.columns, ["---", *("---:" for _ in table.columns[1:])]]
    cells = [
        *([cell.translate(_MARKDOWN) for cell in row] for row in lines[:1]),
        lines[1],
        *([cell.translate(_MARKDOWN) for cell in row] for row in table.rows),
    ]
    body = [f"| {' | '.join(row)} |" for row in cells]
    notes = [line for note in table.notes for line in ("", note.translate(_MARKDOWN))]
    return "\n".join([f"**{table.title.translate(_MARKDOWN)}**", "", *body, *notes, ""])


def to_latex(tables: Iterable[Table]) -> str:
    """Write `table` environments; they need \\usepackage{booktabs}."""
    return "\n".join(map(_latex, tables))


def _latex(table: Table) -> str:
    def line(cells: Iterable[str]) -> str:
        return " & ".join(cell.translate(_LATEX) for cell in cells) + r" \\"

    caption = ". ".join([table.title, *table.notes]).translate(_LATEX)
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}.}}",
            rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
            r"\toprule",
            line(table.columns),
            r"\midrule",
            *map(line, table.rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def to_csv(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Write one header and one line per row; None becomes an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return out.getvalue()
