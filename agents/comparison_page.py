"""The page of a comparison: one HTML file that needs nothing else, in light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --paper: #fefefe; --ink: #1b1f24; --muted: #5b6471; --grid: #d9dde2;
  --card: #f5f7f9; --accent: #0b6bb0; --warn: #a63a00; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e8eaed; --muted: #a3abb6; --grid: #39404a;
  --card: #1d2127; --accent: #7cc0f0; --warn: #ff9d66; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.5rem; margin: 3rem 0 .5rem; border-bottom: 1px solid var(--grid); padding-bottom: .3rem; }
h3 { font-size: 1.12rem; margin: 2.2rem 0 .1rem; }
p { max-width: 78ch; margin: .5rem 0; }
.note, .sub { color: var(--muted); font-size: .92rem; }
.lead p { max-width: none; }
.lead { background: var(--card); border-left: 4px solid var(--accent); padding: .7rem 1.1rem; border-radius: 4px; }
.figure { width: 100%; height: auto; display: block; margin: .6rem 0 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .82rem; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; text-align: left; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { color: var(--muted); font-weight: 600; vertical-align: bottom; white-space: normal; min-width: 4.2em; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); }
tr.learned td:first-child { font-weight: 700; }
.failed { color: var(--warn); white-space: normal; }
@media print { body { max-width: none; } }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A page.

    Args:
        title: Its title, plain text.
        parts: Pieces of HTML, one after another.
    """
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def element(tag: str, text: str, kind: str = "") -> str:
    """Plain text in an element."""
    given = f' class="{escape(kind)}"' if kind else ""
    return f"<{tag}{given}>{escape(text)}</{tag}>"


def block(kind: str, parts: Sequence[str]) -> str:
    """Pieces of HTML in a block."""
    inner = "\n".join(parts)
    return f'<div class="{escape(kind)}">\n{inner}\n</div>'


def figure(title: str, note: str, svg: str) -> list[str]:
    """A figure below its takeaway."""
    named = svg.replace('role="img"', f'role="img" aria-label="{escape(title)}"', 1)
    return [element("h3", title), element("p", note, "note"), named]


def table(heads: Sequence[str], lines: Sequence[Sequence[str]], kinds: Sequence[str] = ()) -> str:
    """A table of plain text.

    Args:
        heads: Headings of the columns.
        lines: Cells of each row.
        kinds: Class of each row; none by default.
    """
    head = "".join(element("th", text) for text in heads)
    rows = []
    for i, line in enumerate(lines):
        given = f' class="{escape(kinds[i])}"' if kinds else ""
        rows.append(f"<tr{given}>{''.join(element('td', text) for text in line)}</tr>")
    inner = "\n".join(rows)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{inner}\n</tbody></table></div>'
