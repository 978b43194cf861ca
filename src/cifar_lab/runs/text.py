"""Tables, durations, names of classes, and templates, as every command shows them."""

import csv
import io
import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Table:
    """A header and rows of cells, which are texts, or numbers for CSV; None is an empty cell.

    `essential`: of the columns, how many a narrow terminal shows; all where it is None.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    essential: int | None = None

    def markdown(self) -> str:
        """Return a Markdown table in which every cell is shown as it is."""
        rows = [[markdown(cell) for cell in row] for row in self.rows]
        return markdown_table([markdown(name) for name in self.header], rows)

    def text(self, width: int = 10_000) -> str:
        """Return it for a terminal of that width: aligned, or a few lines for each row.

        A column of empty cells is left out; where it is too wide, those that are not essential.
        """
        cells = [["" if cell is None else one_line(cell) for cell in row] for row in self.rows]
        filled = [i for i, _ in enumerate(self.header) if any(row[i] for row in cells)]
        for kept in (filled, [i for i in filled if i < (self.essential or len(self.header))]):
            names = [self.header[i] for i in kept]
            rows = [[row[i] for i in kept] for row in cells]
            lines = align([names, *rows])
            if max(map(len, lines)) <= width:
                return "\n".join(lines)
        records = [
            "; ".join(f"{n} {cell}" for n, cell in zip(names, row, strict=True) if cell not in "–")
            for row in rows
        ]
        return "\n".join(fill(record, width, "* ") for record in records)

    def html(self) -> str:
        """Return a table for a notebook, in which every cell is text."""
        rows = ("".join(f"<td>{escape(str(c))}</td>" for c in r) for r in (self.header, *self.rows))
        return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"

    def latex(self, caption: str) -> str:
        """Return a table for LaTeX, in the look of the package booktabs."""
        rows = [" & ".join(map(latex, row)) + r" \\" for row in (self.header, *self.rows)]
        return rf"""% needs \usepackage{{booktabs}}
\begin{{table}}
\centering
\caption{{{latex(caption)}}}
\begin{{tabular}}{{{"l" * len(self.header)}}}
\toprule
{rows[0]}
\midrule
{chr(10).join(rows[1:])}
\bottomrule
\end{{tabular}}
\end{{table}}
"""

    def csv(self) -> str:
        """Return lines of CSV; no cell is one that a spreadsheet takes for a formula."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerows([_csv_cell(cell) for cell in row] for row in (self.header, *self.rows))
        return buffer.getvalue()


def _csv_cell(cell: str | float | None) -> str:
    if isinstance(cell, int | float):
        whole = abs(cell) >= 1 and float(cell).is_integer()
        return str(int(cell)) if whole else f"{cell:.10g}"
    text = cell or ""
    is_number = re.fullmatch(r"[+-]?(\d+\.?|\d*\.\d+)(e[+-]?\d+)?", text)
    return "'" + text if text.startswith(tuple("=+-@\t\r")) and not is_number else text


def one_line(text: Any) -> str:
    """Return a text on one line, without what would move a terminal's cursor."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))


def markdown(text: str) -> str:
    """Return text that Markdown shows as it is, on one line; no HTML in it is HTML."""
    line = one_line(text)
    line = re.sub(r"&(?=[#\w])", "&amp;", line)
    line = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", line)
    line = re.sub(r"([\\`*\[\]|~])", r"\\\1", line)
    return re.sub(r"^([>#+-])(?= |$)", r"\\\1", line)


def latex(text: Any) -> str:
    """Return text that LaTeX shows as it is, on one line."""
    line = one_line(text)
    line = re.sub(r"[\\{}&%$#_^~]", lambda special: _LATEX[special[0]], line)
    line = re.sub(r"^-(?=\d)", "$-$", line)
    return line.replace("±", r"$\pm$").replace("–", "--").replace("†", r"$^{\dagger}$")


_LATEX = {
    **{character: rf"\{character}" for character in "{}&%$#_"},
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
}


def align(
    rows: Sequence[Sequence[str]], *, right: Collection[int] = (), separator: str = "  "
) -> list[str]:
    """Return a line per row, with aligned columns; those of the numbers `right` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.rjust if column in right else str.ljust for column, _ in enumerate(widths)]
    padded = ([s(c, w) for s, c, w in zip(sides, row, widths, strict=True)] for row in rows)
    return [separator.join(cells).rstrip() for cells in padded]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns are aligned in the source too.

    The cells are taken as they are: text with Markdown's own characters is escaped by the caller.
    """
    rule = ["-" * max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = align([["", *row, ""] for row in (header, rule, *rows)], separator=" | ")
    return "\n".join(line.strip() for line in lines)


def fill(text: str, width: int, start: str = "") -> str:
    """Return a paragraph on lines of at most `width` characters, the first with a start."""
    return textwrap.fill(
        one_line(text),
        max(width, 20),
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_on_hyphens=False,
    )


def duration(seconds: float) -> str:
    """Return a duration as 4.2 s, 3:07 or 2:04:09."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def class_name(target_config: Mapping[str, Any] | None) -> str:
    """Return the name of a target's class, such as Adam; "none" without a target."""
    return str(target_config["_target_"]).rpartition(".")[2] if target_config else "none"


def render(template: Path, **values: Any) -> str:
    """Return a template filled in; in an HTML page, a value is text and never markup.

    In a template, `file("name")` is a file beside it as it is, and the filter `markdown` makes a
    value text that Markdown shows as it is.
    """
    import jinja2  # late: most commands render nothing
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False}
    environment.filters["markdown"] = markdown
    environment.globals["file"] = lambda name: Markup(
        template.with_name(name).read_text(encoding="utf-8")
    )
    page = environment.get_template(template.name).render(values)
    return page.encode("utf-8", "replace").decode()  # names of folders may be no Unicode
