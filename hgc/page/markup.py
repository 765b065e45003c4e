"""Fragments of HTML that the file and the page share. No fragment names a host or a path."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import hgc
from hgc.evaluation import AMPLIFIED, FLIP_LIGHTEST, difference, flip, relative_l2, visible
from hgc.page.drawing import Drawn

__all__ = [
    "about",
    "code",
    "data_link",
    "difference_map",
    "escape",
    "figures",
    "gallery",
    "kind",
    "legend",
    "picture",
    "picture_link",
    "script",
    "slider",
    "strip",
    "style",
    "warned",
]

_HERE = Path(__file__).resolve().parent

# What an evaluation did, from the most work to the least: its mark, and the words of the legend.
KINDS = {
    "full": ("●", "everything computed"),
    "half": ("◐", "the conditional half computed"),
    "part": ("◔", "some decoder layers computed"),
    "none": ("○", "nothing run: forecast"),
}


def style() -> str:
    """The style sheet of all fragments."""
    return (_HERE / "look.css").read_text(encoding="utf-8")


def script() -> str:
    """The code that the fragments' handlers call."""
    return (_HERE / "look.js").read_text(encoding="utf-8")


def data_link(content: bytes, kind: str) -> str:
    """``content`` as a link that holds all of it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture_link(image: Image.Image) -> str:
    """A picture as a link to a PNG that holds all of its pixels, unchanged."""
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return data_link(file.getvalue(), "image/png")


def picture(image: Image.Image, alt: str, caption: str = "", kind: str = "") -> str:
    """A picture with its text alternative, and a caption that may hold markup."""
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return (
        f'<figure class="hgc-figure {kind}"><img class="hgc-pixels" src="{picture_link(image)}" '
        f'alt="{escape(alt)}">{below}</figure>'
    )


def slider(left: Drawn, right: Drawn) -> str:
    """Two pictures, one over the other, with a handle that says how much of each is seen. The arrow
    keys move it, as a pointer does."""
    return (
        '<figure class="hgc-figure"><div class="hgc-slider" style="--at:50%">'
        f'<img class="hgc-pixels" src="{picture_link(left.image)}" '
        f'alt="Left of the handle: {escape(left.name)}">'
        f'<img class="hgc-pixels hgc-over" src="{picture_link(right.image)}" '
        f'alt="Right of the handle: {escape(right.name)}">'
        '<input type="range" min="0" max="100" value="50" oninput="hgcSlide(this)" '
        f'aria-label="Share of the picture that shows {escape(left.name)}"></div>'
        f"<figcaption>left {escape(left.name)}, right {escape(right.name)}: drag, or use the arrow "
        "keys</figcaption></figure>"
    )


def difference_map(drawn: Drawn, reference: Drawn) -> str:
    """Where a person sees that two pictures differ: FLIP's map, or where flip-evaluator is not
    installed the amplified difference."""
    seen = visible(drawn.pixels, reference.pixels)
    if seen is None:
        seen = difference(drawn.pixels, reference.pixels)
        what = f"the difference, {AMPLIFIED} times as bright"
    else:
        what = f"FLIP: black 0, not to be seen; light yellow {FLIP_LIGHTEST} or more"
    image = Image.fromarray((np.asarray(seen) * 255 + 0.5).astype(np.uint8))
    worst = np.abs(drawn.pixels - reference.pixels).max()
    alt = f"Map of where {drawn.name} differs from {reference.name}"
    if worst == 0:
        alt, what = f"{alt}: nowhere", "equal bit for bit"
    return picture(image, alt, f"where they differ. {escape(what)}")


def _macs(macs: Any) -> str:
    unit, name = (1e12, "T") if macs.total >= 1e11 else (1e9, "G")
    return f"{macs.paper / unit:.2f}{name} ({macs.total / unit:.2f}{name})"


def _share(macs: Any, full: Any) -> str:
    return f"{macs.paper / full.paper:.1%}"


def _bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 1024:.0f} KiB"


def figures(uncached: Drawn, others: Sequence[Drawn]) -> str:
    """The table below the pictures: a column a picture, the uncached one first."""
    reference = uncached.pixels[None]
    columns = [uncached, *others]
    rows: list[tuple[str, list[str]]] = [
        ("steps", [str(one.steps) for one in columns]),
        ("MACs, paper's convention (all)", [_macs(one.macs) for one in columns]),
        ("share of the uncached run's", [_share(one.macs, uncached.macs) for one in columns]),
        ("seconds, the whole call", [f"{one.seconds:.2f}" for one in columns]),
        (
            "distance (relative L2)",
            [f"{relative_l2(one.pixels[None], reference)[0]:.4f}" for one in columns],
        ),
    ]
    seen = [flip(one.pixels[None], reference) for one in columns]
    shown = [f"{value[0]:.4f}" for value in seen if value is not None]
    if shown:
        rows.append(("FLIP, mean", shown))
    held = [0 if one.report is None else one.report.peak_bytes for one in columns]
    rows.append(("most bytes held", [_bytes(count) if count else "0" for count in held]))
    heads = "".join(f'<th scope="col">{escape(one.name)}</th>' for one in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
        for name, cells in rows
    )
    return (
        '<div class="hgc-scroll" tabindex="0" role="region" aria-label="Figures of the pictures">'
        f"<table><thead><tr><td></td>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def gallery(drawn: Sequence[Drawn]) -> str:
    """Small pictures, each with its share of the MACs and its distance, the uncached one first."""
    first = drawn[0]
    cards = []
    for one in drawn:
        far = relative_l2(one.pixels[None], first.pixels[None])[0]
        seen = flip(one.pixels[None], first.pixels[None])
        text = f"{one.name}: {_share(one.macs, first.macs)} of the MACs, distance {far:.4f}"
        text += "" if seen is None else f", FLIP {seen[0]:.4f}"
        cards.append(picture(one.image, text, escape(text)))
    return f'<div class="hgc-cards hgc-gallery">{"".join(cards)}</div>'


def code(heads: Sequence[str], lines: Sequence[str], files: Sequence[tuple[str, str, str]]) -> str:
    """Lines to copy, and files to download: name, link, and what it is."""
    text = escape("\n".join([*heads, "", *lines]))
    links = "".join(
        f'<a class="hgc-file" download="{escape(name)}" href="{link}">download {what} '
        f"({escape(name)})</a>"
        for name, link, what in files
    )
    return (
        '<div class="hgc-code"><p>The lines that give this picture:</p>'
        f'<pre tabindex="0" aria-label="Code">'
        f'<code>{text}</code></pre><button type="button" class="hgc-copy" onclick="hgcCopy(this)">'
        f"copy</button>{links}</div>"
    )


def kind(row: Any) -> str:
    """Which of `KINDS` a row of a report is."""
    if row.depth == "full":
        return "full" if row.guidance == "both" else "half"
    return "none" if row.depth == 0 else "part"


def _said(row: Any, full: Any) -> str:
    """What an evaluation did and why, in words."""
    does = kind(row)
    parts = [KINDS[does][1] if does != "part" else f"{row.depth} decoder layers computed"]
    if does != "none":
        if row.control:
            parts.append(f"ControlNet {', '.join(row.control)}")
        if row.attention == "reuse":
            parts.append("cross-attention reused")
        if does == "part" and row.guidance != "both":
            parts.append("conditional half")
    why = "the plan says so" if row.why == "plan" else row.why
    return (
        f"Evaluation {row.index + 1}: {', '.join(parts)}. Why: {why}. "
        f"{row.macs.total / 1e9:.2f} of {full.total / 1e9:.2f} GMACs, {row.milliseconds:.0f} ms."
    )


def strip(drawn: Drawn) -> str:
    """The run as a strip, a cell an evaluation; its reason stands below while the pointer or the
    focus is on it, and all of them in a list."""
    if drawn.report is None:
        return (
            f'<p class="hgc-why">{escape(drawn.name)}: {drawn.steps} evaluations, all computed by '
            "diffusers.</p>"
        )
    rows, full = drawn.report.rows, drawn.report.full_evaluation
    said = [escape(_said(row, full)) for row in rows]
    cells = "".join(
        f'<button type="button" class="hgc-cell hgc-{kind(row)}" title="{text}" '
        f'aria-label="{text}" onmouseenter="hgcWhy(this)" onfocus="hgcWhy(this)" '
        f'onclick="hgcWhy(this)"><span>{row.index + 1}</span><span>{KINDS[kind(row)][0]}</span>'
        "</button>"
        for row, text in zip(rows, said, strict=True)
    )
    items = "".join(f"<li>{text}</li>" for text in said)
    return (
        f'<div class="hgc-plan"><div class="hgc-strip" role="group" '
        f'aria-label="What each of {len(rows)} evaluations of {escape(drawn.name)} did">{cells}'
        f'</div>{legend({kind(row) for row in rows})}<p class="hgc-why" aria-live="polite">'
        "Point at an evaluation to read what it did and why.</p>"
        f"<details><summary>all of them as a list</summary><ul>{items}</ul></details></div>"
    )


def legend(kinds: set[str]) -> str:
    """The marks of a strip, and what they mean."""
    return (
        '<p class="hgc-legend">'
        + "".join(
            f'<span><b class="hgc-cell hgc-{name}" aria-hidden="true">{mark}</b> {words}</span>'
            for name, (mark, words) in KINDS.items()
            if name in kinds
        )
        + "</p>"
    )


def warned(drawn: Drawn) -> str:
    """What hgc warned of during a run."""
    return "".join(f'<p class="hgc-warned">{escape(text)}</p>' for text in drawn.warned)


def about() -> str:
    """Versions, for the foot of a page."""
    import diffusers
    import torch

    return escape(
        f"hgc {hgc.__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}, "
        f"CPU threads: {torch.get_num_threads()}"
    )
