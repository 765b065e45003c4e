"""``hgc page`` in a real browser. docs/page.md has the command that installs what it needs."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

import hgc
from hgc import testbed

pytest.importorskip("gradio", reason="Gradio is not installed: the extra `page` installs it")
sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("HGC_CHROMIUM") or shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH or in HGC_CHROMIUM"),
]
WAIT_MS = 300_000


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A served page, and that it left no file where Gradio keeps what is given to it."""
    from hgc.page.app import build, launch
    from hgc.page.studio import Studio

    folder = tmp_path_factory.mktemp("gradio")
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    served = build(Studio())
    yield launch(served, "127.0.0.1", None)
    served.close()
    assert not any(path.is_file() for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def browser():
    with sync.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def tabs(browser, address):
    """Opens tabs of one person; at the end none has an error, and none has asked another host."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.set_default_timeout(WAIT_MS)
    wrong: list[str] = []

    def opened():
        tab = context.new_page()
        tab.on("console", lambda m: m.type in ("error", "warning") and wrong.append(m.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", lambda r: r.url.startswith((address, "data:")) or wrong.append(r.url))
        tab.goto(address)
        tab.wait_for_selector("#pad canvas")
        tab.wait_for_function("document.querySelector('#pad input[type=radio]') !== null")
        return tab

    yield opened
    context.close()
    assert wrong == []


@pytest.fixture
def tab(tabs):
    return tabs()


def fill(tab, label: str, value) -> None:
    box = tab.get_by_label(label, exact=True)
    box.fill(str(value))
    box.blur()


def drawn(tab, steps: int = 8) -> None:
    """Press the button, and wait for the result."""
    fill(tab, "Steps", steps)
    tab.click("#draw")
    tab.wait_for_selector("#status :text-is('done')")


def pixels(tab, selector: str) -> np.ndarray:
    head, _, data = tab.get_attribute(selector, "src").partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def made(steps: int, config: str | None, scene: int = 0, condition=None) -> np.ndarray:
    pipe = testbed.load_pipeline("segmentation")
    (one,) = testbed.held_out(1, scene)
    image = testbed.condition_image(one, "segmentation") if condition is None else condition
    if config is not None:
        hgc.install(pipe, config=config)
    return np.asarray(
        pipe(
            one.caption, image=image, num_inference_steps=steps, guidance_scale=3.5,
            generator=torch.Generator().manual_seed(0),
        ).images[0]
    )  # fmt: skip


def test_pictures_arrive_without_loss_and_the_slider_moves(tab):
    drawn(tab)
    assert np.array_equal(pixels(tab, "#result .hgc-slider img >> nth=0"), made(8, None))
    assert np.array_equal(pixels(tab, "#result .hgc-slider img >> nth=1"), made(8, "balanced"))
    handle = tab.locator("#result .hgc-slider input")
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    tab.mouse.click(box["x"] + box["width"] * 0.8, box["y"] + box["height"] / 2)
    assert 75 <= int(handle.input_value()) <= 85
    handle.press("Home")
    assert (
        tab.locator("#result .hgc-slider").evaluate("e => e.style.getPropertyValue('--at')") == "0%"
    )
    cell = tab.locator("#result .hgc-cell").nth(1)
    cell.hover()
    assert tab.inner_text("#result .hgc-why") == cell.get_attribute("title")
    assert "Evaluation 2: " in cell.get_attribute("title")


def test_what_is_drawn_is_what_the_control_net_sees(tab):
    canvas = tab.locator("#pad canvas")
    tab.get_by_label("checker").check()
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    tab.mouse.move(box["x"] + 20, box["y"] + 20)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] - 20, box["y"] + box["height"] / 2, steps=5)
    tab.mouse.up()
    canvas.focus()
    tab.get_by_label("tent").check()
    canvas.focus()
    for key in ("ArrowLeft", "ArrowLeft", "Space"):
        canvas.press(key)
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(
        canvas.evaluate("e => e.toDataURL()").partition(",")[2]))).convert("RGB"))  # fmt: skip
    (scene,) = testbed.held_out(1)
    before = np.asarray(testbed.condition_image(scene, "segmentation"))
    changed = {tuple(c) for c in seen[(seen != before).any(axis=-1)]}
    assert changed == {(230, 0, 200), (255, 255, 255)}
    drawn(tab)
    expected = made(8, "balanced", condition=Image.fromarray(seen))
    assert np.array_equal(pixels(tab, "#result .hgc-slider img >> nth=1"), expected)
    with tab.expect_download() as download:
        tab.click("text=download the condition")
    assert np.array_equal(np.asarray(Image.open(download.value.path())), seen)


def test_a_bad_file_is_refused_and_a_good_one_is_taken(tab, tmp_path):
    bad, good = tmp_path / "bad.png", tmp_path / "good.png"
    bad.write_text("not a picture")
    Image.new("RGB", (100, 80), (60, 200, 60)).save(good)
    canvas = tab.locator("#pad canvas")
    before = canvas.evaluate("e => e.toDataURL()")
    tab.set_input_files("#pad input[type=file]", bad)
    tab.wait_for_selector("#pad .hgc-pad-said:has-text('must be one of PNG, JPEG, WEBP')")
    assert canvas.evaluate("e => e.toDataURL()") == before
    huge = tmp_path / "huge.png"
    huge.write_bytes(b"\0" * (5 * 2**20))
    tab.set_input_files("#pad input[type=file]", huge)
    tab.wait_for_selector("#pad .hgc-pad-said:has-text('at most 4 MiB')")
    tab.set_input_files("#pad input[type=file]", good)
    tab.wait_for_selector("#pad .hgc-pad-said:has-text('its middle, at 64 x 64 pixels')")
    assert canvas.evaluate("e => [...e.getContext('2d').getImageData(9, 9, 1, 1).data]") == [
        60, 200, 60, 255,
    ]  # fmt: skip


def test_the_server_takes_no_file_and_gives_none(address, tmp_path):
    """What Gradio itself would take and give at its own addresses."""
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")

    def status(place: str, data: bytes | None = None) -> int:
        kind = {"Content-Type": "multipart/form-data; boundary=b"}
        try:
            asked = urllib.request.Request(f"{address}gradio_api/{place}", data, kind)
            with urllib.request.urlopen(asked) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    part = (
        b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n12\r\n--b--\r\n'
    )
    assert status("upload", part) == 413
    assert status(f"file={secret}") == 403
    assert status("info") == 200  # what the address is when it is right


def test_a_configuration_is_downloaded_and_given_back(tab):
    drawn(tab)
    with tab.expect_download() as download:
        tab.click("text=download the configuration")
    assert download.value.suggested_filename == "balanced.json"
    text = download.value.path().read_text()
    assert hgc.Config.from_json(text) == hgc.Config.preset("balanced")
    first = pixels(tab, "#result .hgc-slider img >> nth=1")
    choose(tab, "#plan", "the JSON below")
    tab.fill("#json textarea", json.dumps({"name": "mine", "num_evaluations": -1}))
    tab.click("#draw")
    tab.wait_for_selector("#status [role=alert]:has-text('num_evaluations')")
    tab.fill("#json textarea", text)
    drawn(tab)
    assert np.array_equal(pixels(tab, "#result .hgc-slider img >> nth=1"), first)


def choose(tab, dropdown: str, value: str) -> None:
    tab.click(f"{dropdown} input")
    tab.get_by_role("option", name=value, exact=True).click()


def test_a_blind_test_of_ten_rounds(tab):
    fill(tab, "Steps", 7)
    choose(tab, "#plan", "turbo")
    tab.click("text=Blind test: which picture is uncached?")
    for i in range(10):
        tab.click("#begin")
        tab.wait_for_selector(f"#pair :text('Round {i + 1} of 10')")
        assert tab.locator("#pair img").count() == 2
        tab.click("#guess-a:not([disabled])")
        tab.wait_for_selector(f"#score :text('of {i + 1} so far')")
    assert re.search(r"That was the last round: \d+ of 10", tab.inner_text("#score"))
    assert tab.inner_text("#begin") == "Begin again"


def test_two_tabs_are_served_one_after_the_other(tabs):
    one, other = tabs(), tabs()
    fill(one, "Steps", 12)
    fill(other, "Steps", 8)
    one.click("#draw")
    other.click("#draw")
    for tab in (one, other):
        tab.wait_for_selector("#status :text-is('done')")
    assert np.array_equal(pixels(one, "#result .hgc-slider img >> nth=0"), made(12, None))
    assert np.array_equal(pixels(other, "#result .hgc-slider img >> nth=0"), made(8, None))


def test_stop_ends_a_long_request_and_the_next_one_is_right(tab):
    fill(tab, "Steps", 100)
    tab.click("#draw")
    tab.wait_for_selector("#status progress")
    tab.click("#stop")
    tab.wait_for_selector("#status :text-is('stopped')")
    time.sleep(1)
    assert tab.inner_text("#status") == "stopped"
    assert tab.locator("#result img").count() == 0
    drawn(tab)
    assert np.array_equal(pixels(tab, "#result .hgc-slider img >> nth=0"), made(8, None))


def test_words_prompts_and_the_gallery_are_shown(tab):
    fill(tab, "Steps", 8)
    tab.click("text=Where each word looked, and another prompt midway")
    tab.click("#look")
    tab.wait_for_selector("#words img")
    (scene,) = testbed.held_out(1)
    said = [one.strip() for one in tab.locator("#words figcaption").all_inner_texts()]
    assert " ".join(said).replace(" ,", ",") == scene.caption
    tab.click("#change")
    tab.wait_for_selector("#edited .hgc-slider")
    tab.click("text=All presets beside fewer steps")
    tab.click("#draw-all")
    tab.wait_for_selector("#gallery table")
    assert tab.locator("#gallery img").count() == 10


def test_nothing_overlaps_or_is_cut_and_the_keyboard_reaches_everything(browser, address, tabs):
    tab = tabs()
    drawn(tab)
    assert tab.locator("img:not([alt]), img[alt='']").count() == 0
    for width in (1280, 390):
        tab.set_viewport_size({"width": width, "height": 900})
        tab.wait_for_timeout(300)
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    wanted = set(
        tab.evaluate(
            """() => [...document.querySelectorAll(
                 '#pad canvas, #pad button, #pad input[type=file], #draw, #stop, #result button, '
                 + '#result input, #result a, #result pre, #begin, #draw-all')]
               .filter((e) => e.checkVisibility())
               .map((e, i) => { e.dataset.seen = i; return String(i); })"""
        )
    )
    tab.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    reached = set()
    for _ in range(150):
        tab.keyboard.press("Tab")
        reached.add(tab.evaluate("document.activeElement.dataset.seen"))
    assert wanted and wanted <= reached
