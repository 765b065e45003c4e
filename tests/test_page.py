"""``hgc page`` without a browser: what people give it, what it draws, and how it is stopped."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from commands import refused
from PIL import Image

import hgc
from hgc import testbed
from hgc.page import markup
from hgc.page.given import Refused, config_of, number, picture_of, prompt_of, uploaded
from hgc.page.studio import JSON, OWN, ROUNDS, Blind, Form, Studio
from hgc.page.work import Stopped, Worker
from hgc.testbed.scenes import PALETTE

STEPS = 8


def link(image: Image.Image, kind: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def text_link(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


# -- what people give ---------------------------------------------------------------------------


def test_pictures_are_read_in_three_formats():
    image = Image.new("RGB", (9, 5), (200, 40, 30))
    for kind in ("PNG", "JPEG", "WEBP"):
        read = uploaded(link(image, kind))
        assert read.size == (9, 5) and read.mode == "RGB"
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert uploaded(link(clear)).getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "did not arrive as a picture"),
        ("/etc/passwd", "did not arrive as a picture"),
        ("data:image/png;base64,@@@@", "did not arrive whole"),
        (text_link(b"<svg onload=alert(1)>"), "must be one of PNG, JPEG, WEBP"),
        (link(Image.new("RGB", (4, 4)), "GIF"), "must be one of PNG, JPEG, WEBP"),
        (link(Image.new("L", (4097, 1))), "at most 4096 x 4096 pixels; this one has 4097 x 1"),
        ("data:image/png;base64," + "A" * (6 * 2**20), "at most 4 MiB"),
        (link(Image.effect_noise((64, 64), 9))[:-400], "cannot be read to its end"),
    ],
)
def test_other_files_are_refused_and_nothing_is_said_of_the_server(given, says):
    with pytest.raises(Refused, match=says) as caught:
        uploaded(given)
    assert "/" not in str(caught.value)


def test_a_picture_becomes_a_condition_of_the_models_size():
    photo = Image.effect_noise((300, 200), 80).convert("RGB")
    made = picture_of(link(photo), (64, 64), "segmentation")
    assert made.size == (64, 64)
    assert {tuple(c) for c in np.asarray(made).reshape(-1, 3)} <= {tuple(c) for c in PALETTE}
    (scene,) = testbed.held_out(1)
    for condition in testbed.CONDITIONS:
        image = testbed.condition_image(scene, condition)
        assert picture_of(link(image), (64, 64), condition).tobytes() == image.tobytes()


def test_numbers_prompts_and_configurations_are_checked(tmp_path):
    assert number("seed", 3.0, 0, 9) == 3 and isinstance(number("seed", 3.0, 0, 9), int)
    for bad in (None, "3", True, 2.5, float("nan"), 10, -1):
        with pytest.raises(Refused, match="seed must be a whole number from 0 to 9; got"):
            number("seed", bad, 0, 9)
    assert prompt_of(" a \n red house ") == "a red house"
    for bad in ("", None, "x" * 501):
        with pytest.raises(Refused, match="1 to 500 characters"):
            prompt_of(bad)
    config = hgc.Config.preset("fast").replace(name="mine")
    assert config_of(config.to_json()) == config
    file = tmp_path / "plan.json"
    config.to_json(file)
    with pytest.raises(hgc.ConfigError, match="is not JSON"):
        config_of(str(file))  # the name of a file that is there


# -- what it draws ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio()


@pytest.fixture
def form(studio) -> Form:
    image, prompt = studio.scene("segmentation", 2)
    return Form(
        condition="segmentation", scene=2, picture=link(image), prompt=prompt, seed=5,
        steps=STEPS, guidance=3.5, scheduler=OWN, plan="balanced", json="",
    )  # fmt: skip


class Told(list):
    """What a request said of its progress."""

    def __call__(self, label, done, total, result=None):
        self.append((label, done, total))


def links(made: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]*)"', made)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in found]


def code(made: str) -> str:
    return html.unescape(re.search(r"<code>(.*?)</code>", made, re.S).group(1))


def test_the_lines_to_copy_give_the_picture_bit_for_bit(studio, form):
    told = Told()
    made = studio.compare(form, told)
    uncached, cached, *_ = links(made)
    assert not np.array_equal(uncached, cached)
    here: dict = {}
    exec(code(made), here)
    assert np.array_equal(np.asarray(here["image"]), cached)
    assert len(code(made).partition("\n\n")[2].splitlines()) == 3
    assert [done for _, done, _ in told] == [*range(STEPS + 1), STEPS, *range(STEPS + 1)]
    hgc.uninstall(here["pipe"])
    assert hgc.install(studio.pipe("segmentation")).uninstall() is None  # nothing was left there


@pytest.mark.slow
def test_the_lines_of_a_drawn_condition_and_a_configuration_name_their_files(
    studio, form, tmp_path, monkeypatch
):
    config = hgc.Config.preset("fast").replace(name="../mine & yours", guidance_damping=0.3)
    image = Image.fromarray(PALETTE[np.arange(64 * 64).reshape(64, 64) // 512 % 10])
    form = dataclasses.replace(
        form, plan=JSON, json=config.to_json(), picture=link(image), scheduler="dpm++2m"
    )
    made = studio.compare(form, Told())
    monkeypatch.chdir(tmp_path)
    for name, data in re.findall(r'download="([^"]*)" href="data:[^,]*,([^"]*)"', made):
        assert re.fullmatch(r"[\w.-]+", name)
        (tmp_path / name).write_bytes(base64.b64decode(data))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["condition.png", "mine---yours.json"]
    assert hgc.Config.of(str(tmp_path / "mine---yours.json")) == config
    here: dict = {}
    exec(code(made), here)
    assert np.array_equal(np.asarray(here["image"]), links(made)[1])
    hgc.uninstall(here["pipe"])


@pytest.mark.slow
def test_fewer_steps_cost_at_least_the_macs_of_the_preset(studio, form):
    pipe, asked, _ = studio.read(form)
    from hgc.page.drawing import draw, fewer_steps

    for name in ("paper", "turbo"):
        config = hgc.Config.preset(name)
        count = fewer_steps(pipe, asked, config, 20)
        one = draw(pipe, asked, 2).macs
        done = hgc.count_macs(
            pipe.unet, pipe.controlnet, config, num_evaluations=20,
            tokens=pipe.tokenizer.model_max_length,
        )  # fmt: skip
        assert 2 * done.paper <= count * one.paper and 2 * done.total <= count * one.total
        less = count - 1
        assert 2 * done.paper > less * one.paper or 2 * done.total > less * one.total


@pytest.mark.slow
def test_words_and_a_prompt_that_changes_midway(studio, form):
    form = dataclasses.replace(form, prompt="a day scene with grass, a brick ball")
    made = studio.words(form, Told())
    named = re.findall(r"<figcaption>([^<]*)</figcaption>", made)
    assert named == ["a", "day", "scene", "with", "grass", ",", "a", "brick", "ball"]
    panels = links(made)
    assert len(panels) == len(named)
    assert not np.array_equal(panels[4], panels[7])

    changed = studio.edited(form, "a night scene with sand, a brick ball", 3, Told())
    before, kept, plain = links(changed)
    assert not np.array_equal(before, kept) and not np.array_equal(kept, plain)
    assert "cross-attention reused" in changed
    for step in (0, STEPS):
        with pytest.raises(Refused, match="the step must be a whole number from 1 to 7"):
            studio.edited(form, "a night scene", step, Told())


def test_a_blind_test_counts_what_was_right(studio, form):
    shown, blind = studio.begin(form, Blind(), Told())
    assert blind.answer in "AB" and blind.answer and len(links(shown)) == 2
    right = 0
    for i in range(ROUNDS):
        blind = dataclasses.replace(blind, answer="AB"[i % 2])
        said, blind = studio.guess(blind, "A")
        right += i % 2 == 0
        assert f"{right} of {i + 1} so far" in said
    assert "5 of 10. Guessing gets as many or more in 62% of tests." in said
    with pytest.raises(Refused, match="start the test first"):
        studio.guess(blind, "A")
    with pytest.raises(Refused, match="bit for bit"):
        studio.begin(dataclasses.replace(form, plan="exact"), Blind(), Told())


@pytest.mark.slow
def test_the_gallery_has_every_preset_and_its_rival(studio, form):
    made = studio.gallery(dataclasses.replace(form, steps=2), Told())
    named = [m.partition(":")[0] for m in re.findall(r"<figcaption>([^<]*)</figcaption>", made)]
    for name, config in hgc.presets().items():
        assert any(n.startswith(f"{name}, 2 steps") for n in named)
        assert any(n.startswith(f"fewer steps ({name})") for n in named) != config.is_exact
    assert named[0] == "uncached"


# -- requests -----------------------------------------------------------------------------------


def test_a_stopped_request_ends_at_its_next_step_and_the_next_one_is_right(studio, form):
    expected = links(studio.compare(form, Told()))
    worker = Worker()
    seen = []

    def job(say):
        def counting(label, done, total, result=None):
            seen.append(done)
            say(label, done, total, result)

        return studio.compare(form, counting)

    told = []
    for status, _ in worker.run("me", job):
        told.append(status)
        worker.stop("somebody else")
        if "step 2 of" in status:
            worker.stop("me")
    assert "stopped" in told[-1] and max(seen) < STEPS
    *_, (status, made) = worker.run("me", lambda say: studio.compare(form, say))
    assert "done" in status
    assert all(map(np.array_equal, links(made), expected))


def test_a_closed_request_stops_too():
    worker, ended = Worker(), threading.Event()

    def job(say):
        try:
            while True:
                say("working", 1, 2)
        except Stopped:
            ended.set()
            raise

    request = worker.run("me", job)
    assert "working" in next(request)[0]
    request.close()
    assert ended.wait(30)


def test_a_failed_request_says_why_and_names_no_file(studio, form, caplog):
    worker = Worker()

    def told(job):
        return list(worker.run("me", job))[-1]

    status, made = told(lambda say: studio.compare(dataclasses.replace(form, steps=1), say))
    assert "steps must be a whole number from 2 to 100; got 1" in status and made is None
    assert 'role="alert"' in status
    status, _ = told(lambda say: Path("/no/such/file").read_text())
    assert "FileNotFoundError" in status and "/no/such" not in status
    assert "/no/such/file" in caplog.text
    assert told(lambda say: "<p>fine</p>")[1] == "<p>fine</p>"


def test_markup_of_a_person_stays_text(studio, form):
    form = dataclasses.replace(form, steps=2, prompt="</code><img src=x onerror=alert(1)>")
    made = studio.compare(form, Told())
    assert "onerror=alert(1)>" not in made.replace("&gt;", "") and "<img src=x" not in made
    assert markup.escape("<") == "&lt;"


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    said = refused("page")
    assert "Gradio" in said and 'pip install "hybrid-grained-cache[page]"' in said
