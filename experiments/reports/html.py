"""Reports of runs and evaluations as self-contained HTML files."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from experiments.reports.tables import plain_text
from tptt_jax.durable import atomic_file

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
caption {{ text-align: left; font-weight: 600; padding-bottom: .3rem; }}
td, th {{ padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }}
td:first-child, th:first-child {{ text-align: left; }}
pre {{ background: #f6f6f6; padding: .8rem; overflow-x: auto; white-space: pre-wrap; }}
img {{ max-width: 100%; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


class Section(NamedTuple):
    """A part of a report.

    Attributes:
      title: of the part, such as the name of a task.
      tables: in order.
      samples: readable examples; empty ones are left out.
      png: the picture; None or a file that is missing: there is none.
    """

    title: str
    tables: Sequence[Table]
    samples: Sequence[str]
    png: Path | None


def write_report(
    path: Path, title: str, sections: Sequence[Section], about: Mapping[str, str]
) -> None:
    """Writes the file atomically.

    Args:
      path: of the file.
      title: of the page.
      sections: in order.
      about: texts by heading: command, configuration, environment.
    """
    parts = [part for section in sections for part in _section(section)]
    for heading, text in about.items():
        parts += [f"<h2>{html.escape(heading)}</h2>", f"<pre>{html.escape(text)}</pre>"]
    page = _PAGE.format(title=html.escape(title), body="\n".join(parts))
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _section(section: Section) -> list[str]:
    parts = [f"<h2>{html.escape(section.title)}</h2>", *map(_table, section.tables)]
    if section.png is not None and section.png.is_file():
        data = base64.b64encode(section.png.read_bytes()).decode()
        parts.append(f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{data}">')
    return parts + [f"<pre>{html.escape(sample)}</pre>" for sample in section.samples if sample]


def _table(table: Table) -> str:
    heads = "".join(f"<th>{_plain(column.header)}</th>" for column in table.columns)
    rows = zip(*(column.cells for column in table.columns), strict=True)
    body = "".join(
        "<tr>" + "".join(f"<td>{_plain(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><caption>{_plain(table.title or '')}</caption><tr>{heads}</tr>{body}</table>"


def _plain(cell: object) -> str:
    """A cell of a rich table as HTML."""
    return html.escape(plain_text(cell))
