"""The file that ``hgc demo --html`` writes."""

from __future__ import annotations

import ast
import base64
import importlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import refused, run
from PIL import Image

import hgc
from hgc import testbed
from hgc.evaluation import relative_l2

STEPS = 8  # two more than the key steps of `balanced`


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text of the cells of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def all(self, tag: str, kind: str = "") -> list[dict[str, str | None]]:
        found = [attributes for name, attributes in self.found if name == tag]
        return [a for a in found if kind in (a.get("class") or "").split() or not kind]


def pixels(link: str) -> np.ndarray:
    head, _, data = link.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("demo")
    output = run(
        "demo", "--conditions", "canny", "--scenes", 1, "--presets", "balanced", "--seed", 3,
        "--steps", STEPS, "--out", folder / "demo.png", "--html", folder / "demo.html",
    )  # fmt: skip
    assert f"wrote {folder / 'demo.html'}" in output
    return (folder / "demo.html").read_text(encoding="utf-8")


def test_it_asks_no_network(text):
    page = Elements(text)
    links = [
        a[name] for _, a in page.found for name in ("src", "href", "action", "srcset") if name in a
    ]
    assert links and all(link.startswith("data:") for link in links)
    rest = re.sub(r'"data:[^"]*"', "", text)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|fetch|XMLHttp", rest)


def test_it_is_read_without_eyes_and_without_a_pointer(text):
    page = Elements(text)
    pictures = page.all("img")
    assert pictures and all(one["alt"] for one in pictures)
    assert all(one["aria-label"] for one in page.all("input") + page.all("button"))
    assert all(one["tabindex"] == "0" for one in page.all("div", "hgc-scroll"))
    assert text.count("<label>") == len(page.all("select")) == 2
    assert page.all("html")[0]["lang"] == "en"


def test_pictures_strip_and_figures_are_those_of_the_runs(text):
    """Against runs made here: every pixel, what each evaluation did, and the distance."""
    pipe = testbed.load_pipeline("canny")
    (scene,) = testbed.held_out(1)
    condition = testbed.condition_image(scene, "canny")

    def picture(steps):
        return np.asarray(
            pipe(
                scene.caption, image=condition, num_inference_steps=steps,
                guidance_scale=testbed.GUIDANCE_SCALE,
                generator=torch.Generator().manual_seed(scene.seed + 3),
            ).images[0]
        )  # fmt: skip

    uncached = picture(STEPS)
    with hgc.install(pipe, config="balanced") as installed:
        cached = picture(STEPS)
        report = installed.report()
    assert not np.array_equal(cached, uncached)
    page = Elements(text)
    shown = [pixels(one["src"]) for one in page.all("img")]
    assert np.array_equal(shown[0], np.asarray(condition))
    assert np.array_equal(shown[1], uncached) and np.array_equal(shown[2], cached)

    kinds = [one["class"].split()[1] for one in page.all("button", "hgc-cell")[: len(report.rows)]]
    depths = {"full": "hgc-full", 0: "hgc-none"}
    assert kinds == [
        "hgc-half" if row.depth == "full" and row.guidance != "both" else depths[row.depth]
        for row in report.rows
    ]
    assert len(set(kinds)) > 1
    distance = relative_l2(cached[None] / 255, uncached[None] / 255)[0]
    assert f"<td>{distance:.4f}</td>" in text
    assert f"<td>{report.macs.paper / report.full_macs.paper:.1%}</td>" in text


def test_what_comes_from_people_is_no_markup():
    from hgc.page import markup
    from hgc.page.drawing import Drawn

    image = Image.new("RGB", (8, 8))
    drawn = Drawn('<b onclick="x">', image, 2, 0.1, None, None, None, ("<script>",))
    for made in (markup.slider(drawn, drawn), markup.strip(drawn), markup.warned(drawn)):
        assert "<b" not in made and "<script" not in made


def test_a_file_that_cannot_be_written_is_said_before_the_work(tmp_path):
    assert "cannot write" in refused("demo", "--html", tmp_path / "none" / "demo.html")


def test_the_page_imports_only_what_is_public():
    """Names in ``__all__`` of the packages that people import from, and its own modules."""
    offered = ("hgc", "hgc.testbed", "hgc.testbed.scenes", "hgc.evaluation")
    public = {name: set(importlib.import_module(name).__all__) for name in offered}
    public["hgc"].add("testbed")
    files = sorted(Path(hgc.__file__).parent.glob("page/*.py"))
    assert files
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert all(not a.name.startswith("hgc.") for a in node.names), file
            elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("hgc"):
                if str(node.module).startswith("hgc.page"):
                    continue
                assert {a.name for a in node.names} <= public[str(node.module)], file
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                where = {"hgc": "hgc", "testbed": "hgc.testbed"}.get(node.value.id)
                known = public.get(str(where), {node.attr}) | {"__version__"}
                assert node.attr in known, f"{file}: {node.attr}"
