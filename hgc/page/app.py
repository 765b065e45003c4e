"""``hgc page``: the screen in Gradio. What it shows is made by :mod:`hgc.page.studio`."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio

from hgc import testbed
from hgc.page import markup
from hgc.page.given import MOST_BYTES, Refused, picture_of
from hgc.page.studio import JSON, MOST_STEPS, OWN, ROUNDS, Blind, Form, Studio
from hgc.page.work import Say, Worker

__all__ = ["build", "launch", "serve"]

_HERE = Path(__file__).resolve().parent
_BLANK = "a day scene with grass"


def serve(studio: Studio, host: str, port: int | None, on_ready: Callable[[str], None]) -> None:
    """Show the page until the process is interrupted; ``on_ready`` is given its address."""
    with tempfile.TemporaryDirectory(prefix="hgc-page-") as folder:
        # nothing is put there: no component takes or gives files
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build(studio)
        on_ready(launch(page, host, port))
        page.block_thread()


def launch(page: Any, host: str, port: int | None) -> str:
    """Serve a page made by :func:`build`, and go on; returns its address."""
    _, address, _ = page.launch(
        server_name=host, server_port=port, share=False, ssr_mode=False, quiet=True,
        footer_links=[], enable_monitoring=False, max_file_size=1, allowed_paths=[],
        prevent_thread_lock=True, theme=gradio.themes.Default(
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        css=markup.style() + (_HERE / "screen.css").read_text(encoding="utf-8"),
        head=f"<script>{markup.script()}</script>",
    )  # fmt: skip
    return str(address)


def build(studio: Studio) -> Any:
    """The page, not yet served."""
    worker = Worker()
    first = studio.conditions[0]
    image, prompt = _first(studio, first)

    def check_picture(given: Any) -> dict[str, str]:
        """Called by the pad with a file it read, and the condition."""
        link, condition = given
        try:
            image = picture_of(link, studio.size, str(condition))
        except Refused as error:
            return {"said": str(error), "picture": ""}
        size = f"{studio.size[0]} x {studio.size[1]}"
        return {"said": f"its middle, at {size} pixels", "picture": markup.picture_link(image)}

    html = functools.partial(gradio.HTML, apply_default_css=False)
    with gradio.Blocks(title="hgc", analytics_enabled=False) as page:
        html(
            '<div class="hgc-head"><h1>With and without the cache</h1><p>A picture drawn twice '
            "from the same noise. Move the handle over it, and read what it cost.</p></div>"
        )
        with gradio.Row():
            with gradio.Column(scale=2, min_width=320):
                condition = gradio.Dropdown(
                    studio.conditions, value=first, label="Condition", visible=studio.has_scenes
                )
                with gradio.Row(visible=studio.has_scenes):
                    scene = gradio.Number(0, label="Held-out scene", precision=0, minimum=0)
                    take = gradio.Button("take the scene")
                pad = html(
                    value=markup.picture_link(image),
                    html_template=_pad(studio.size),
                    js_on_load=(_HERE / "pad.js").read_text(encoding="utf-8"),
                    palette=studio.palette(first),
                    kind=first,
                    most_bytes=MOST_BYTES,
                    server_functions=[check_picture],
                    elem_id="pad",
                )
                prompt_box = gradio.Textbox(prompt, label="Prompt", lines=2, elem_id="prompt")
                with gradio.Row():
                    seed = gradio.Number(0, label="Seed", precision=0, min_width=100)
                    steps = gradio.Number(20, label="Steps", precision=0, minimum=2,
                                          maximum=MOST_STEPS, min_width=100)  # fmt: skip
                    guidance = gradio.Number(
                        testbed.GUIDANCE_SCALE if studio.has_scenes else 7.5,
                        label="Guidance", min_width=100,
                    )  # fmt: skip
                scheduler = gradio.Dropdown(studio.schedulers, value=OWN, label="Scheduler")
                plan = gradio.Dropdown(
                    studio.choices, value="balanced", label="Compare the uncached picture with",
                    elem_id="plan",
                )  # fmt: skip
                json = gradio.Textbox(
                    label="Configuration (JSON)", lines=6, max_lines=12, visible=False,
                    elem_id="json", info="As Config.to_json or `hgc calibrate` writes it.",
                )  # fmt: skip
            with gradio.Column(scale=3, min_width=320):
                with gradio.Row():
                    draw = gradio.Button("Draw", variant="primary", elem_id="draw")
                    stop = gradio.Button("Stop", variant="stop", elem_id="stop")
                status = html(
                    '<p class="hgc-status" role="status">Nothing drawn yet.</p>', elem_id="status"
                )
                result = html(elem_id="result")
        with gradio.Accordion("All presets beside fewer steps", open=False):
            show_all = gradio.Button("Draw them all", elem_id="draw-all")
            gallery = html(elem_id="gallery")
        with gradio.Accordion("Blind test: which picture is uncached?", open=False):
            begin = gradio.Button("Begin", elem_id="begin")
            pair = html(elem_id="pair")
            with gradio.Row():
                guesses = {
                    which: gradio.Button(f"{which} is uncached", interactive=False,
                                         elem_id=f"guess-{which.lower()}")
                    for which in "AB"
                }  # fmt: skip
            score = html(elem_id="score")
            blind = gradio.State(Blind())
        with gradio.Accordion("Where each word looked, and another prompt midway", open=False):
            look = gradio.Button("Show where each word looked", elem_id="look")
            words = html(elem_id="words")
            with gradio.Row():
                other = gradio.Textbox("a night scene with water", label="Another prompt")
                step = gradio.Number(6, label="After step", precision=0, minimum=1)
            change = gradio.Button("Change it, and keep the layout", elem_id="change")
            edited = html(elem_id="edited")
        html(f'<p class="hgc-status">{markup.about()}</p>')

        form = [condition, scene, pad, prompt_box, seed, steps, guidance, scheduler, plan, json]
        started = []

        def on(
            button: Any, job: Callable[..., str], output: Any, more: tuple[Any, ...] = ()
        ) -> Any:
            """A button that has the worker do ``job`` with the form and the values of ``more``."""

            def run(request: gradio.Request, *given: Any) -> Iterator[tuple[Any, Any]]:
                asked, rest = Form(*given[: len(form)]), given[len(form) :]
                for told, made in worker.run(
                    str(request.session_hash), functools.partial(job, asked, *rest)
                ):
                    yield told, gradio.skip() if made is None else made

            event = button.click(
                run, [*form, *more], [status, output], concurrency_id="worker",
                concurrency_limit=1, show_progress="minimal", show_progress_on=[status],
                api_visibility="private",
            )  # fmt: skip
            started.append(event)

        on(draw, studio.compare, result)
        on(show_all, studio.gallery, gallery)
        on(look, studio.words, words)
        on(change, studio.edited, edited, (other, step))

        def play(
            request: gradio.Request, test: Blind, *given: Any
        ) -> Iterator[tuple[Any, Any, Any, Any, Any]]:
            """The next round."""
            test = Blind() if test.played >= ROUNDS else test
            off, ready = gradio.Button(interactive=False), gradio.Button(interactive=True)
            after: list[Blind] = []

            def job(say: Say) -> str:
                shown, then = studio.begin(Form(*given), test, say)
                after.append(then)
                return shown

            for told, made in worker.run(str(request.session_hash), job):
                if made is None:
                    yield told, gradio.skip(), gradio.skip(), off, off
                else:
                    yield told, made, after[0], ready, ready

        def guessed(which: str, test: Blind) -> tuple[Any, ...]:
            said, now = studio.guess(test, which)
            off = gradio.Button(interactive=False)
            return said, now, off, off

        both = list(guesses.values())
        asking = {
            "concurrency_id": "worker", "concurrency_limit": 1, "show_progress": "minimal",
            "show_progress_on": [status], "api_visibility": "private",
        }  # fmt: skip
        outputs = [status, pair, blind, *both]
        started.append(begin.click(play, [blind, *form], outputs, **asking))
        for which, button in guesses.items():
            button.click(
                functools.partial(guessed, which), [blind], [score, blind, *both],
                api_visibility="private",
            ).then(
                lambda test: gradio.Button("Next round" if test.played < ROUNDS else
                                           "Begin again"),
                [blind], [begin], api_visibility="private",
            )  # fmt: skip

        def stopped(request: gradio.Request) -> str:
            worker.stop(str(request.session_hash))
            return '<p class="hgc-status" role="status">stopped</p>'

        stop.click(stopped, None, [status], queue=False, cancels=started, api_visibility="private")

        def left(request: gradio.Request) -> None:
            worker.stop(str(request.session_hash))

        page.unload(left)

        def taken(kind: str, index: Any) -> tuple[Any, str]:
            image, prompt = studio.scene(kind, index)
            return (
                gradio.HTML(value=markup.picture_link(image), palette=studio.palette(kind),
                            kind=kind),
                prompt,
            )  # fmt: skip

        if studio.has_scenes:
            for trigger in (take.click, condition.change):
                trigger(taken, [condition, scene], [pad, prompt_box], api_visibility="private")
        plan.change(
            lambda name: gradio.Textbox(visible=name == JSON), [plan], [json],
            api_visibility="private",
        )  # fmt: skip
    return page


def _first(studio: Studio, condition: str) -> tuple[Any, str]:
    """The condition and the prompt that the page opens with."""
    if studio.has_scenes:
        return studio.scene(condition, 0)
    from PIL import Image

    return Image.new("RGB", studio.size), _BLANK


def _pad(size: tuple[int, int]) -> str:
    text = (_HERE / "pad.html").read_text(encoding="utf-8")
    return text.replace("SIDE_W", str(size[0])).replace("SIDE_H", str(size[1]))
