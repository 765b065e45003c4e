"""A page of the first pictures: one file, without links."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hgc.generation.sinks import Drawn

__all__ = ["page"]

_STYLE = """
body { font: 14px sans-serif; margin: 2em; background: #fafafa; color: #222; }
section { display: flex; gap: 6px; align-items: flex-start; margin-bottom: 1.2em; }
figure { margin: 0; } figcaption { max-width: 160px; overflow-wrap: anywhere; color: #666; }
img { width: 160px; image-rendering: auto; border: 1px solid #ccc; }
p { margin: 0 0 4px; max-width: 60em; overflow-wrap: anywhere; }
"""


def _img(png: bytes, what: str) -> str:
    data = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{html.escape(what)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(what)}</figcaption></figure>"
    )


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def page(title: str, summary: str, rows: Sequence[tuple[Any, Sequence[Drawn]]]) -> str:
    """HTML of some items: each condition (a PIL image) with the pictures made of it."""
    parts = [
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><p>{html.escape(summary)}</p>",
    ]
    for condition, drawn in rows:
        about = drawn[0].about
        shown = [_img(_png(condition), "condition")]
        shown += [_img(one.png, f"seed {one.about['seed']}") for one in drawn]
        parts.append(f"<p><b>{html.escape(about['id'])}</b> {html.escape(about['text'])}</p>")
        parts.append(f"<section>{''.join(shown)}</section>")
    return "\n".join(parts) + "\n"
