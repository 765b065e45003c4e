"""``hgc demo --html``: one file with the pictures, strips and tables. It asks no network."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hgc import testbed
from hgc.evaluation import caption, columns, make_scheduler
from hgc.page import markup
from hgc.page.drawing import Asked, Drawn, draw

if TYPE_CHECKING:
    from PIL import Image

    from hgc.evaluation import Candidate, Row, Settings

__all__ = ["write"]

_SHEET = """
@media (prefers-color-scheme: dark) { :root { %s } }
html { background: var(--hgc-paper); color-scheme: light dark; }
body { margin: 0 auto; padding: 1rem; max-width: 64rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--hgc-ink); }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.15rem; } h3 { font-size: 1rem; }
.choose { display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; margin: 1rem 0; }
select { font: inherit; max-width: 100%%; }
[hidden] { display: none; }
footer, .soft { font-size: .85rem; color: var(--hgc-soft); }
"""


def write(
    path: Path,
    conditions: Sequence[str],
    order: Sequence[Candidate],
    rows: Sequence[Row],
    settings: Settings,
    on_progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> None:
    """Draw a scene of each condition with each of ``order``, the uncached one first, and write it
    with the table of ``rows`` to ``path``. Rows of another package are in the table only."""
    shown = [one for one in order if one.package is None]
    runs = list(itertools.product(conditions, shown))
    cards, done = [], 0
    for condition in conditions:
        pipe = testbed.load_pipeline(condition)
        (scene,) = testbed.held_out(1, settings.start)
        image = testbed.condition_image(scene, condition)
        drawn: list[Drawn] = []
        for one in shown:
            on_progress(f"{condition}: {one.name}", done, len(runs))
            name = one.scheduler or settings.scheduler
            scheduler = None
            if name is not None:
                scheduler = make_scheduler(name, pipe.scheduler.config, settings.steps)
            asked = Asked(
                scene.caption, image, scene.seed + settings.seed,
                testbed.GUIDANCE_SCALE if settings.guidance is None else settings.guidance,
                scheduler,
            )  # fmt: skip
            if not drawn:
                draw(pipe, asked, 2)  # a first call is slower than those that follow
            label = f"{one.name}, {one.steps} steps" if one.config or not drawn else one.label
            drawn.append(draw(pipe, asked, one.steps, one.config, name=label))
            done += 1
        uncached, *others = drawn
        names = [one.name for one in shown[1:]]
        cards += [
            _card(condition, name, scene.caption, image, uncached, other)
            for name, other in zip(names, others, strict=True)
        ]
    on_progress("done", len(runs), len(runs))
    path.write_text(_document(conditions, shown[1:], cards, rows), encoding="utf-8")


def _card(
    condition: str, name: str, prompt: str, image: Image.Image, uncached: Drawn, other: Drawn
) -> str:
    where = markup.escape(f"{condition}/{name}")
    return (
        f'<section data-card="{where}"><h2>{markup.escape(f"{condition}: {other.name}")}</h2>'
        '<div class="hgc-cards">'
        + markup.picture(image, f"The condition, {condition}", f"condition; “{prompt}”")
        + markup.slider(uncached, other)
        + markup.difference_map(other, uncached)
        + f"</div>{markup.figures(uncached, [other])}{markup.strip(other)}{markup.warned(other)}"
        "</section>"
    )


def _document(
    conditions: Sequence[str],
    candidates: Sequence[Candidate],
    cards: Sequence[str],
    rows: Sequence[Row],
) -> str:
    dark = markup.style().partition(".dark {")[2].partition("}")[0]
    choices = (
        ("condition", [(c, c) for c in conditions]),
        ("compared with the uncached picture", [(c.name, c.label) for c in candidates]),
    )
    selects = "".join(
        f'<label>{label} <select data-hgc onchange="hgcShow()">'
        + "".join(
            f'<option value="{markup.escape(value)}">{markup.escape(text)}</option>'
            for value, text in options
        )
        + "</select></label>"
        for label, options in choices
    )
    tables = "".join(_table([row for row in rows if row.condition == c]) for c in conditions)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>hgc: with and without the cache</title><style>{markup.style()}{_SHEET % dark}"
        f"</style></head><body><main><h1>With and without the cache</h1>"
        "<p>The model that hgc ships, 64 x 64 pixels, drawn without the cache and with it, from "
        "the same noise. Move the handle over the picture.</p>"
        f'<div class="choose">{selects}</div>{"".join(cards)}<h2>Over more scenes</h2>{tables}'
        f"</main><footer>{markup.about()}</footer><script>{markup.script()}hgcShow();</script>"
        "</body></html>\n"
    )


def _table(rows: Sequence[Row]) -> str:
    shown = [row for row in rows if row.shown]
    parts = [column for column in columns(shown) if not column.statistics]
    heads = "".join(f'<th scope="col">{markup.escape(part.head)}</th>' for part in parts)
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{markup.escape(part.cell(row))}</th>' if i == 0
            else f"<td>{markup.escape(part.cell(row))}</td>"
            for i, part in enumerate(parts)
        )
        + "</tr>"
        for row in shown
    )  # fmt: skip
    title = markup.escape(caption(shown[0]))
    return (
        f'<h3>{title}</h3><div class="hgc-scroll" tabindex="0" role="region" aria-label="{title}">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )
