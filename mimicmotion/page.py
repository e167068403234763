"""What our pages share: each is one file that opens from disk, light or dark, wide or on a phone."""

import html
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mimicmotion.paths import printable

_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--card:#f6f7f9;--ink:#1b1f24;--soft:#5a636e;--line:#d8dde3;
--kept:#2f6fde;--dropped:#c2570c;--wrong:#b3261e}
@media(prefers-color-scheme:dark){:root{--paper:#12151a;--card:#1b2027;--ink:#e6e9ed;--soft:#a0a9b4;--line:#333b45;
--kept:#6ea8fe;--dropped:#f7a15c;--wrong:#ff8a80}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;max-width:84rem;margin:0 auto;padding:1.5rem 1rem 4rem;background:var(--paper);
color:var(--ink);overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.2;margin:.2em 0}h2{font-size:1.25rem;margin:2.5rem 0 .6rem}
h3{font-size:1rem;margin:0 0 .2rem}p{margin:.3rem 0;max-width:70ch}.lead{font-size:1.1rem}
.soft,figcaption,caption{color:var(--soft);font-size:.875rem}
a{color:var(--kept)}nav a{margin-right:1rem}
img,svg,video{max-width:100%;height:auto}figure{margin:0}svg{fill:currentColor}svg text{font-size:11px;fill:var(--soft)}
table{border-collapse:collapse;font-size:.925rem}caption{text-align:left;padding-bottom:.3rem}
th{text-align:left;font-weight:600}td,th{padding:.2rem 1rem .2rem 0;vertical-align:top}
tbody td,tbody th{border-top:1px solid var(--line)}tbody th{font-weight:500}
.number{text-align:right;font-variant-numeric:tabular-nums}
.cards{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--card-width,20rem)),1fr))}
.small{--card-width:15rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.8rem}
.kept{color:var(--kept)}.dropped{color:var(--dropped)}.wrong{color:var(--wrong);font-weight:600}
.unseen{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
"""


def text(value: object) -> str:
    """Anything as text of a page: what no screen can show is replaced, what HTML would obey is escaped."""
    return html.escape(printable(value))


def document(title: str, parts: Iterable[str], style: str = "") -> str:
    """A whole page of parts, which are HTML; style is added to that of all pages."""
    head = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{_STYLE}{style}</style><body><main>"
    )
    return "\n".join([head, *parts, "</main></body></html>"]) + "\n"


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What nested mappings hold, by dotted names; an empty one is a value."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def pairs(cells: Mapping[str, object]) -> str:
    """A table of names and what they are."""
    lines = (f'<tr><th scope="row">{text(name)}</th><td>{text(value)}</td></tr>' for name, value in cells.items())
    return "<table><tbody>" + "\n".join(lines) + "</tbody></table>"
