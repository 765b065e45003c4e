"""`hgc generate`: a table in, a data set out, whatever happens in between."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("PIL")
hypothesis = pytest.importorskip("hypothesis")

from commands import refused, run  # noqa: E402
from generation import (  # noqa: E402
    SIZE,
    StubModel,
    drawn,
    failed,
    files,
    lines,
    make,
    picture,
    settings,
    table,
)
from hypothesis import strategies as st  # noqa: E402
from PIL import Image  # noqa: E402

import hgc  # noqa: E402
from hgc import GenerateError, testbed  # noqa: E402
from hgc.evaluation.models import ModelError  # noqa: E402
from hgc.evaluation.record import fingerprint  # noqa: E402
from hgc.generation.items import Bad, Item, item_of, noise_seed  # noqa: E402
from hgc.generation.job import Job, Model  # noqa: E402
from hgc.generation.sinks import SINKS  # noqa: E402
from hgc.generation.store import Record, Store, to_try_again  # noqa: E402
from hgc.generation.tables import Scan, open_table  # noqa: E402

FORMATS = [
    "webdataset",
    "folder",
    pytest.param("parquet", marks=pytest.mark.skipif(
        not __import__("importlib.util").util.find_spec("pyarrow"), reason="needs pyarrow")),
]  # fmt: skip


def _pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


# The real model


def test_pictures_are_those_of_the_pipeline_with_hgc_on_it(tmp_path):
    out = tmp_path / "out"
    progress = []
    summary = hgc.generate(
        out=out, limit=2, images=2, steps=3, batch=4, keep_conditions=True, check=1.0,
        on_progress=progress.append,
    )  # fmt: skip
    found = drawn(out)
    scenes = testbed.held_out(2)
    pipe = testbed.load_pipeline("segmentation")
    conditions = [testbed.condition_image(scene, "segmentation") for scene in scenes]

    def pictures():
        return pipe(
            [scene.caption for scene in scenes for _ in range(2)],
            image=[condition for condition in conditions for _ in range(2)],
            num_inference_steps=3,
            guidance_scale=testbed.GUIDANCE_SCALE,
            generator=[torch.Generator().manual_seed(one.about["seed"]) for one in found],
        ).images

    plain = pictures()
    with hgc.install(pipe, config="balanced") as installation:
        expected = pictures()
        report = installation.report()
    assert [one.about["id"] for one in found] == ["scene-0", "scene-0", "scene-1", "scene-1"]
    for n, one in enumerate(found):
        assert np.array_equal(_pixels(one.png), np.asarray(expected[n]))
        assert np.array_equal(_pixels(one.condition), np.asarray(conditions[n // 2]))
        about = one.about
        assert about["text"] == scenes[n // 2].caption and about["plan"] == "balanced"
        assert about["macs"] == report.macs.total // 4 < about["macs_uncached"]
        assert (about["evaluations"], about["reused"]) == (3, sum(
            row.depth != "full" for row in report.rows))  # fmt: skip
        ours, theirs = (np.asarray(p, np.float64) for p in (expected[n], plain[n]))
        distance = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert summary.distances[n] == pytest.approx(distance)
    assert summary.pictures == summary.made == 4 and summary.failed == 0
    assert 0 <= summary.waited < 1 and summary.macs == sum(one.about["macs"] for one in found)
    assert progress[-1].done == progress[-1].total == 4
    assert "1,000 pictures" in str(summary) and "the device waited" in str(summary)
    assert (out / "page.html").read_text().count("<img") == 6
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["run"]["versions"]["torch"] == torch.__version__
    assert hgc.Config.from_json(json.dumps(manifest["run"]["config"])) == hgc.Config.of("balanced")


# Where pictures come from, and where they go


def test_noise_follows_from_seed_id_and_index_alone():
    item = Item(7, "é", "a house", b"")
    assert noise_seed(0, item, 0) == noise_seed(0, Item(0, "é", "other", b"", scale=0.5), 0)
    others = [
        noise_seed(1, item, 0),
        noise_seed(0, item, 1),
        noise_seed(0, Item(7, "e", "", b""), 0),
    ]
    assert len({noise_seed(0, item, 0), *others}) == 4
    own = Item(7, "é", "a house", b"", seed=1)
    assert noise_seed(0, own, 0) == noise_seed(5, own, 0) == noise_seed(1, item, 0)


def test_a_picture_does_not_depend_on_where_it_stands(tmp_path):
    rows = lines(11)
    make(table(tmp_path / "a", rows), tmp_path / "1")
    make(table(tmp_path / "b", rows[::-1]), tmp_path / "2", batch=5, shard=3, devices=["cpu"] * 2)
    first, second = ({(o.about["id"], o.about["index"]): o.png for o in drawn(tmp_path / k)}
                     for k in "12")  # fmt: skip
    assert len(first) == 22 and first == second


@pytest.mark.parametrize("format", FORMATS)
def test_formats_hold_the_same(tmp_path, format):
    data = table(tmp_path, lines(9))
    make(data, tmp_path / "tar", keep_conditions=True)
    summary = make(data, tmp_path / "out", format=format, keep_conditions=True)
    found, expected = drawn(tmp_path / "out", format), drawn(tmp_path / "tar")
    assert summary.pictures == 18
    for one, other in zip(found, expected, strict=True):
        assert (one.key, one.png, one.condition) == (other.key, other.png, other.condition)
        assert one.about == other.about


@pytest.mark.parametrize(
    ("format", "loader", "pattern"),
    [
        ("webdataset", "webdataset", "*.tar"),
        ("parquet", "parquet", "*.parquet"),
        ("folder", "imagefolder", None),
    ],
)
def test_datasets_reads_what_was_written(tmp_path, format, loader, pattern):
    datasets = pytest.importorskip("datasets")
    make(table(tmp_path, lines(9)), tmp_path / "out", format=format, keep_conditions=True)
    shards = tmp_path / "out" / "shards"
    where = {"data_dir": str(shards)} if pattern is None else {"data_files": str(shards / pattern)}
    found = datasets.load_dataset(loader, split="train", cache_dir=str(tmp_path / "cache"), **where)
    expected = drawn(tmp_path / "out", format)
    assert len(found) == len(expected) == 18
    names = {"webdataset": ("png", "condition.png"), "folder": ("image", "condition")}
    image, condition = names.get(format, ("image", "condition"))
    by_key = {one.key: one for one in expected}
    for row in found:
        about = row["json"] if format == "webdataset" else row
        one = by_key.pop(about["key"])
        assert about["id"] == one.about["id"] and about["seed"] == one.about["seed"]
        assert np.array_equal(np.asarray(row[image]), _pixels(one.png))
        assert np.array_equal(np.asarray(row[condition]), _pixels(one.condition))
    assert not by_key


def test_webdataset_reads_what_was_written(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    make(table(tmp_path, lines(9)), tmp_path / "out")
    urls = [str(path) for path in sorted((tmp_path / "out" / "shards").iterdir())]
    found = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    for row, one in zip(found, drawn(tmp_path / "out"), strict=True):
        assert row["__key__"] == one.key and row["json"] == one.about
        assert np.array_equal(row["png"], _pixels(one.png))


def _as_folder(folder: Path) -> Path:
    table(folder, [
        {"file_name": "true.png", "condition_file_name": row["condition"], "text": row["text"],
         "id": row["id"]} for row in lines(9)
    ], "metadata.jsonl")  # fmt: skip
    return folder


def _as_parquet(folder: Path) -> Path:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table(folder, []).unlink()
    rows = [{**row, "condition": (folder / row["condition"]).read_bytes()} for row in lines(9)]
    for n, part in enumerate((rows[:5], rows[5:])):
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(part), folder / f"{n}.parquet", row_group_size=2
        )
    return folder


def _as_tars(folder: Path) -> str:
    table(folder, [])
    for n in range(2):
        with tarfile.open(folder / f"{n}.tar", "w") as tar:
            for k, row in list(enumerate(lines(9)))[n * 5 : n * 5 + 5 - n]:
                about = json.dumps({"id": row["id"], "text": row["text"]}).encode()
                for end, data in (("png", (folder / row["condition"]).read_bytes()),
                                  ("json", about)):  # fmt: skip
                    member = tarfile.TarInfo(f"long/{'x' * 120}{k}.{end}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return str(folder / "*.tar")


@pytest.mark.parametrize("written", [_as_folder, _as_parquet, _as_tars])
def test_inputs_give_the_same_pictures(tmp_path, written):
    data = written(tmp_path / "in")
    make(data, tmp_path / "out")
    make(table(tmp_path, lines(9)), tmp_path / "json")
    assert files(tmp_path / "out") == files(tmp_path / "json")


def test_batches_share_one_scale_and_texts_keep_their_negatives(tmp_path):
    rows = lines(6)
    rows[1]["scale"] = rows[4]["scale"] = 0.5
    rows[2]["negative_prompt"] = "rain"
    make(table(tmp_path, rows), tmp_path / "out", shard=6)
    batches: dict[int, set] = {}
    for one in drawn(tmp_path / "out"):
        batches.setdefault(one.about["batch"], set()).add(one.about["scale"])
        assert one.about["negative_prompt"] == ("rain" if one.about["id"] == "item 2" else None)
    assert batches == {0: {1.0}, 1: {1.0}, 2: {1.0}, 3: {0.5}, 4: {0.5}}


# What cannot be made


def test_bad_items_are_named_and_the_others_made(tmp_path):
    rows = lines(12)
    data = table(tmp_path, rows)
    (tmp_path / "maps" / "text.png").write_text("no picture")
    whole = (tmp_path / "maps" / "1.png").read_bytes()
    (tmp_path / "maps" / "cut.png").write_bytes(whole[: len(whole) // 2])
    picture(3, 24).save(tmp_path / "maps" / "large.png")
    Image.fromarray(np.zeros((SIZE, SIZE), np.uint16)).save(tmp_path / "maps" / "deep.png")
    changes = {
        1: {"condition": "maps/none.png"}, 2: {"condition": "maps/text.png"},
        3: {"condition": "maps/cut.png"}, 4: {"condition": "maps/large.png"},
        5: {"condition": "maps/deep.png"}, 6: {"text": "  "}, 7: {"text": "nan"},
        8: {"condition": "../secret.png"}, 9: {"scale": float("nan")}, 10: {"seed": -1},
    }  # fmt: skip
    for n, change in changes.items():
        rows[n].update(change)
    picture(9).save(tmp_path.parent / "secret.png")
    table(tmp_path, rows)
    summary = make(data, tmp_path / "out")
    assert {one.about["id"] for one in drawn(tmp_path / "out")} == {"item 0", "item 11"}
    reasons = {one["item"]: one["reason"] for one in failed(tmp_path / "out")}
    expected = {
        1: "No such file", 2: "no readable picture", 3: "no readable picture",
        4: "is 24x24, height x width; expected 16x16", 5: "8 bits a channel", 6: "text is empty",
        7: "no numbers", 8: "outside of the folder", 9: "scale must be", 10: "seed must be",
    }  # fmt: skip
    assert reasons.keys() == expected.keys()
    for n, said in expected.items():
        assert said in reasons[n]
    # a picture fails alone, an item once
    assert summary.failed == len(failed(tmp_path / "out")) == 9 + 2
    with pytest.raises(GenerateError, match=r"item \d+, 'item \d+': .* \(--strict"):
        make(data, tmp_path / "strict", strict=True)


def test_other_sizes_are_resized_where_it_was_asked_for(tmp_path):
    data = table(tmp_path, lines(1))
    picture(0, 24).save(tmp_path / "maps" / "0.png")
    make(data, tmp_path / "out", resize="nearest", keep_conditions=True)
    (one, _) = drawn(tmp_path / "out")
    assert _pixels(one.condition).shape == (SIZE, SIZE, 3)


def test_a_shard_of_which_nothing_can_be_made_has_no_file(tmp_path):
    rows = lines(6)
    for row in rows[:4]:
        row["text"] = ""
    data = table(tmp_path, rows)
    summary = make(data, tmp_path / "out")
    assert list(files(tmp_path / "out")) == ["000001.tar"]
    assert (summary.pictures, summary.failed) == (4, 4)
    assert make(data, tmp_path / "out").made == 0


HOSTILE = [
    "../../evil", "/etc/passwd", "a/../../b", "..", ".", "a\0b", "C:\\x", "~root", "a\nb", "a.b.c",
    "x" * 999, "%2e%2e%2f", "\u202egnp", "CON", "<script>alert(1)</script>", "-rf", "$(reboot)",
    "\u00e9", "e\u0301",
]  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_an_id_never_becomes_a_path(tmp_path, format):
    inside = tmp_path / "deep" / "down"
    data = table(inside, [{**lines(1)[0], "id": name} for name in HOSTILE])
    before = {p for p in tmp_path.rglob("*") if inside not in p.parents}
    make(data, inside / "out", format=format)
    assert {one.about["id"] for one in drawn(inside / "out", format)} == set(HOSTILE)
    assert {p for p in tmp_path.rglob("*") if inside not in p.parents} == before
    names = [Path(name).name for name in files(inside / "out")]
    assert all(set(name) <= set("0123456789_.abcdefghijklmnopqrstuvwxyz") for name in names)
    assert "<script>" not in (inside / "out" / "page.html").read_text()


def test_an_id_twice_is_refused_before_anything_is_written(tmp_path):
    rows = [*lines(5), {**lines(4)[3], "text": "again"}]
    with pytest.raises(GenerateError, match=r"'item 3' is there twice, as item 3 and 5"):
        make(table(tmp_path, rows), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no item"),
        ('{"id": "a", "text": "b", "condition": "c"}\n{"id"', r"at byte 43, is not JSON"),
        ("[1]\n", "not an object"),
        ("[" * 100_000, "not JSON"),
        ('{"id": "a", "prompt": "b", "condition": "c"}', "no item of the data has a field 'text'"),
    ],
)
def test_a_broken_table_is_refused_before_anything_is_written(tmp_path, text, said):
    path = tmp_path / "items.jsonl"
    path.write_text(text)
    with pytest.raises(GenerateError, match=said):
        make(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _tar(path: Path, *members: tuple[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def _png(value: int) -> bytes:
    file = io.BytesIO()
    picture(value).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("order", [1, -1], ids=["json first", "json last"])
def test_members_of_a_tar_go_before_its_json(tmp_path, order):
    about = {"text": "of the JSON", "condition": "maps/0.png", "id": None, "seed": None}
    sample = [("a.json", json.dumps(about).encode()), ("a.png", _png(7)), ("a.txt", b"its own")]
    ((_, row),) = open_table(_tar(tmp_path / "1.tar", *sample[::order])).rows()
    assert row == {"id": "a", "text": "its own", "condition": _png(7)}
    nulls = {"text": "of the JSON", "condition": None, "id": None}
    sample = [("a.json", json.dumps(nulls).encode()), ("a.png", _png(7))]
    ((_, row),) = open_table(_tar(tmp_path / "2.tar", *sample[::order])).rows()
    assert row == {"id": "a", "text": "of the JSON", "condition": _png(7)}


def test_what_a_system_leaves_beside_the_data_is_no_item(tmp_path):
    data = _tar(
        tmp_path / "in" / "a.tar", ("README", b"none"), (".DS_Store", b"none"),
        ("._a.png", b"none"), ("a.png", _png(1)), ("x/._a.json", b"{"), ("a.txt", b"a house"),
    )  # fmt: skip
    (data.parent / "._a.tar").write_bytes(b"none")
    for given in (data.parent, data.parent / "*.tar"):
        rows = [row for _, row in open_table(given).rows()]
        assert rows == [{"id": "a", "text": "a house", "condition": _png(1)}]


def test_the_id_is_the_path_beside_the_bytes():
    row = {"text": "a house", "condition": {"bytes": _png(1), "path": "a.png"}}
    item = item_of(0, row, Path())
    assert isinstance(item, Item) and (item.id, item.condition) == ("a.png", _png(1))
    for condition in (_png(1), {"bytes": _png(1), "path": None}, {"bytes": _png(1)}):
        bad = item_of(0, {"text": "a house", "condition": condition}, Path())
        assert isinstance(bad, Bad) and "the condition has no path" in bad.reason


def test_ids_of_a_parquet_table_are_the_paths_in_it(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [
        {"text": "a house", "condition": {"bytes": _png(n), "path": f"{n}.png"}} for n in range(5)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    assert make(tmp_path / "a.parquet", tmp_path / "out").failed == 0
    assert {one.about["id"] for one in drawn(tmp_path / "out")} == {f"{n}.png" for n in range(5)}
    rows[3]["condition"]["path"] = "0.png"
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(GenerateError, match=r"'0\.png' is there twice, as item 0 and 3"):
        make(tmp_path / "a.parquet", tmp_path / "twice")


def test_a_condition_that_is_no_file_is_named_and_not_waited_for(tmp_path):
    rows = lines(3)
    data = table(tmp_path, rows)
    os.mkfifo(tmp_path / "maps" / "pipe.png")
    (tmp_path / "maps" / "text.png").write_text("no picture")
    for row, name in zip(rows, ("pipe", "none", "text"), strict=True):
        row["condition"] = f"maps/{name}.png"
    table(tmp_path, rows)
    child = multiprocessing.get_context("fork").Process(
        target=make, args=(data, tmp_path / "out"), daemon=True
    )
    child.start()
    child.join(60)
    assert child.exitcode == 0, "it waits for a writer of the pipe"
    reasons = [one["reason"] for one in failed(tmp_path / "out")]
    assert "pipe.png': it is no regular file" in reasons[0]
    assert "maps/none.png': No such file" in reasons[1]
    assert reasons[2].endswith("is no readable picture: cannot identify image file")


# Any table

_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
_any = st.recursive(_scalars, lambda inner: st.lists(inner, max_size=2), max_leaves=3)
_paths = st.sampled_from([f"maps/{n}.png" for n in range(8)]) | st.sampled_from(
    ["../secret.png", "/etc/passwd", "maps/../maps/1.png", "maps", "maps/\0", "a" * 5000, "\ud800"]
)
_rows = st.fixed_dictionaries(
    {},
    optional={
        "id": st.text(max_size=8) | st.integers() | _any,
        "text": st.text(max_size=8) | _any,
        "condition": _paths | st.text(max_size=8) | _any,
        "negative_prompt": _any,
        "scale": _any | st.floats(0, 2),
        "seed": _any | st.integers(0, 9),
        "more": _any,
    },
)


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    picture(9).save(folder / "secret.png")
    table(folder / "in", [])
    return folder


def _make_any(maps, rows, sound, shard):
    rows = rows + lines(sound)
    data = maps / "in" / "items.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = maps / "out"
    shutil.rmtree(out, ignore_errors=True)
    try:
        summary = make(data, out, shard=shard, images=1)
    except GenerateError as error:
        assert str(error) and not out.exists()
        return
    made = {int(one.key.partition("_")[0]): one for one in drawn(out)}
    bad = {one["item"]: one for one in failed(out)}
    assert made.keys().isdisjoint(bad) and made.keys() | bad.keys() == set(range(len(rows)))
    assert len(made) == summary.pictures >= sound and len(bad) == summary.failed
    assert all(one["reason"] for one in bad.values())
    for number, one in made.items():
        row = rows[number]
        assert one.about["text"] == row["text"]
        assert one.about["id"] == str(row["condition"] if row.get("id") is None else row["id"])
        assert "secret" not in row["condition"] and row["condition"] != "/etc/passwd"
    assert {p.name for p in maps.iterdir()} == {"in", "out", "secret.png"}


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_item_of_any_table_is_made_or_named_or_the_table_refused(maps, count):
    limits = hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    given = hypothesis.given(
        rows=st.lists(_rows, max_size=6), sound=st.integers(0, 3), shard=st.integers(1, 4)
    )

    @limits
    @given
    def check(rows, sound, shard):
        _make_any(maps, rows, sound, shard)

    check()


# Resume


def _undisturbed(tmp_path, count=30, **changes) -> tuple[Path, dict[str, bytes]]:
    data = table(tmp_path, lines(count))
    make(data, tmp_path / "whole", **changes)
    return data, files(tmp_path / "whole")


@pytest.mark.parametrize("format", FORMATS)
def test_a_run_that_died_goes_on(tmp_path, format):
    data, expected = _undisturbed(tmp_path, format=format)
    out = tmp_path / "out"
    with pytest.raises(GenerateError, match=r"fell off the bus.*same command goes on"):
        make(data, out, model=StubModel(dies_at=9), format=format)
    there = {p.name: p.stat().st_mtime_ns for p in (out / "shards").iterdir() if p.name[0] != "."}
    assert 0 < len(there) < 8
    summary = make(data, out, format=format)
    assert files(out) == expected and summary.pictures == 60 > summary.made
    assert {name: (out / "shards" / name).stat().st_mtime_ns for name in there} == there
    assert make(data, out, format=format).made == 0


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_shards_are_made_again(tmp_path, format):
    data, expected = _undisturbed(tmp_path, format=format)
    out = tmp_path / "whole"
    shards = sorted((out / "shards").iterdir())
    ending = SINKS[format].ending
    victims = list(shards[0].rglob("*.png"))[:1] if format == "folder" else [shards[0]]
    os.truncate(victims[0], victims[0].stat().st_size // 2)
    if shards[2].is_dir():
        for file in shards[2].iterdir():
            file.unlink()
        shards[2].rmdir()
    else:
        shards[2].unlink()
    (out / "records" / "000004.json").unlink()
    (out / "records" / "000005.json").write_text('{"shard": 5')
    (out / "shards" / f".000001{ending}.x.tmp").write_text("left by a process that died")
    summary = make(data, out, format=format)
    assert files(out) == expected
    assert summary.pictures == 60 and summary.made == 4 * 8
    assert not list(out.rglob("*.tmp"))


def test_failures_are_there_once_after_a_resume(tmp_path):
    rows = lines(30)
    for row in rows[::3]:
        row["text"] = ""
    data = table(tmp_path, rows)
    with pytest.raises(GenerateError):
        make(data, tmp_path / "out", model=StubModel(dies_at=9))
    make(data, tmp_path / "out")
    assert [one["item"] for one in failed(tmp_path / "out")] == list(range(0, 30, 3))


def _child(data, out, seed):
    random.seed(seed)
    make(data, out, model=StubModel(seconds=0.0005), images=1, batch=4, shard=8)
    os._exit(0)


def test_thirty_runs_killed_at_random_lose_nothing(tmp_path):
    """SIGKILL, again and again, until a run comes to its end. `scripts/generate_trial.py` does the
    same to the testbed and to Ray."""
    data, expected = _undisturbed(tmp_path, 200, images=1, batch=4, shard=8)
    fork = multiprocessing.get_context("fork")
    chance = random.Random(20)
    begun, child = time.monotonic(), fork.Process(target=_child, args=(data, tmp_path / "own", 0))
    child.start()
    child.join()
    took, kills = time.monotonic() - begun, 0
    for trial in range(30):
        out = tmp_path / f"out-{trial}"
        longest = 0.8 * took  # more after each kill, so that it comes to an end
        for attempt in range(100):
            child = fork.Process(target=_child, args=(data, out, attempt))
            child.start()
            child.join(chance.uniform(0.0, longest))
            if child.is_alive():
                os.kill(child.pid, signal.SIGKILL)
                kills, longest = kills + 1, longest * 1.1
            child.join()
            if child.exitcode == 0:
                break
        assert child.exitcode == 0
        assert files(out) == expected
        assert not list(out.rglob("*.tmp"))
    assert kills >= 30


def test_another_run_is_refused_with_what_differs(tmp_path):
    data, expected = _undisturbed(tmp_path)
    out = tmp_path / "whole"
    with pytest.raises(
        GenerateError,
        match=r"holds another run: seed is 0 there and 1 here;.* "
        r"steps is 2 there and 3 here\. Give another --out",
    ):
        make(data, out, seed=1, steps=3)
    make(data, out, check=0.5, strict=True)  # change no picture
    rows = lines(30)
    rows[4]["text"] = "another"
    with pytest.raises(GenerateError, match="data is "):
        make(table(tmp_path / "other", rows), out)
    assert files(out) == expected
    forced = [make(data, out, seed=1, force=True, limit=n).folder for n in (5, 6, 5)]
    assert [p.name for p in forced] == ["whole-2", "whole-3", "whole-2"]
    assert files(out) == expected
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(GenerateError, match=r"holds files, and no manifest\.json"):
        make(data, tmp_path / "full")


def test_what_conditions_are_taken_from_is_part_of_a_run(tmp_path):
    data = table(tmp_path / "in", lines(2))
    shutil.copytree(tmp_path / "in", tmp_path / "other")
    more = {"size": [SIZE, SIZE], "images": 1, "steps": 1, "limit": 1}
    net = testbed.path() / "controlnet_segmentation"

    def again(data=data, out="rooted", **changes):
        return hgc.generate(data, tmp_path / out, controlnet=net, **{**more, **changes})

    assert again(root=tmp_path / "in").made == 1
    assert again(root=os.path.relpath(tmp_path / "in")).made == 0
    with pytest.raises(GenerateError, match=r"root is '.*/in' there and '.*/other' here"):
        again(root=tmp_path / "other")
    with pytest.raises(GenerateError, match="condition is 'segmentation' there and 'depth' here"):
        again(root=tmp_path / "in", condition="depth")
    given = json.loads((tmp_path / "rooted" / "manifest.json").read_text())["arguments"]
    assert given["root"] == str(tmp_path / "in") and given["condition"] == "segmentation"
    assert given["limit"] == 1
    again(out="moved")
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    assert again(tmp_path / "elsewhere" / data.name, "moved").made == 0


def _tar_of(path: Path, pictures: list[bytes]) -> Path:
    return _tar(path, *(
        (f"{n}.{end}", data) for n, png in enumerate(pictures)
        for end, data in (("png", png), ("txt", b"a house"))
    ))  # fmt: skip


def _parquet_of(path: Path, pictures: list[bytes]) -> Path:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"id": n, "text": "a house", "condition": png} for n, png in enumerate(pictures)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(("ending", "written"), [("tar", _tar_of), ("parquet", _parquet_of)])
def test_pictures_of_another_size_in_a_table_are_other_data(tmp_path, ending, written):
    data = written(tmp_path / f"a.{ending}", [_png(1), _png(2)])
    make(data, tmp_path / "out")
    written(data, [_png(1), _png(2)])
    assert make(data, tmp_path / "out").made == 0
    written(data, [_png(1), _png(2) + bytes(1)])
    with pytest.raises(GenerateError, match="data is "):
        make(data, tmp_path / "out")


def test_failures_of_earlier_runs_are_said_and_can_be_made_again(tmp_path):
    rows = lines(30)
    for n in (1, 2, 9):
        rows[n]["condition"] = f"late/{n}.png"
    data = table(tmp_path, rows)
    first = make(data, tmp_path / "out")
    assert (first.failed, first.failed_before) == (3, 0) and "tried" not in str(first)
    shutil.copytree(tmp_path / "maps", tmp_path / "late")
    picture(9).save(tmp_path / "late" / "9.png")
    again = make(data, tmp_path / "out")
    said = "delete records/000000.json, records/000002.json, and the same command tries them again"
    assert (again.made, again.failed, again.failed_before) == (0, 3, 3)
    assert f"3 of those failed in earlier runs and were not tried again: {said}" in str(again)
    with pytest.raises(GenerateError, match=f"3 failed in earlier runs, and --strict.*{said}"):
        make(data, tmp_path / "out", strict=True)
    (tmp_path / "out" / "records" / "000000.json").unlink()
    (tmp_path / "out" / "records" / "000002.json").unlink()
    last = make(data, tmp_path / "out", strict=True)
    assert (last.pictures, last.failed, last.failed_before) == (60, 0, 0)
    assert failed(tmp_path / "out") == []


def test_many_records_of_failures_are_not_all_named():
    records = [Record(n, failed=[{}] if n % 2 else []) for n in range(11)]
    assert to_try_again(records) == (
        "delete records/000001.json, records/000003.json, records/000005.json and the 2 others in "
        "which something failed, and the same command tries them again"
    )


def test_pictures_beside_a_model_do_not_change_it(tmp_path):
    (tmp_path / "unet" / "deep").mkdir(parents=True)
    (tmp_path / "unet" / "deep" / "weights").write_text("1")
    index = {"_class_name": "A", "unet": ["diffusers", "B"], "safety_checker": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    model = Model(tmp_path, tmp_path / "unet", "fp32")
    before = model.identity()
    assert before["model"] == fingerprint(tmp_path, "**/*")
    for place in (tmp_path / "pictures", tmp_path / "unet" / "pictures"):
        place.mkdir()
        (place / "manifest.json").touch()
        if place.parent == tmp_path:
            assert model.identity() == before
    assert model.identity()["controlnet"] == before["controlnet"]
    (tmp_path / "unet" / "deep" / "weights").write_text("2")
    assert model.identity()["model"] != before["model"]
    with pytest.raises(ModelError, match=r"cannot read .*model_index\.json"):
        Model(tmp_path / "unet", None, "fp32").identity()


@pytest.mark.parametrize("out", ["", ".", "../in"])
def test_the_working_folder_may_be_that_of_another_run(tmp_path, monkeypatch, out):
    data = table(tmp_path, lines(1))
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    make(data, out)
    assert make(data, out, force=True, seed=1).folder.resolve() == tmp_path / "in-2"


def test_two_processes_do_not_write_to_one_folder(tmp_path):
    data, _ = _undisturbed(tmp_path)
    store = Store(tmp_path / "whole", SINKS["webdataset"])
    with store.locked(), pytest.raises(GenerateError, match="another process is writing"):
        make(data, tmp_path / "whole")
    assert make(data, tmp_path / "whole").made == 0


# Disks


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True
    )
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_ends_in_an_error_and_the_run_goes_on_once_there_is_room(tmp_path, small_disk):
    data, expected = _undisturbed(tmp_path, 60)
    out = small_disk / "out"
    (small_disk / "ballast").write_bytes(bytes(100 << 10))
    with pytest.raises(GenerateError, match=r"No space left on device.*the same command goes on"):
        make(data, out)
    done = {name: data for name, data in files(out).items() if name[0] != "."}
    assert 0 < len(done) < len(expected) and all(expected[name] == done[name] for name in done)
    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    make(data, out)
    assert files(out) == expected


def test_a_read_only_folder_is_an_error(tmp_path, small_disk):
    data = table(tmp_path, lines(3))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(GenerateError, match="Read-only file system"):
        make(data, small_disk / "out")


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(GenerateError, match=r"Not a directory.* goes on once that is"):
        make(table(tmp_path, lines(3)), tmp_path / "out")


# What is checked, and what is said


def test_the_distance_is_measured_on_the_share_that_was_asked_for(tmp_path):
    data = table(tmp_path, lines(60))
    # three batches a shard, of 3, 3 and 2 pictures; every tenth of them is checked
    for check, count in ((0.0, 0), (0.1, 3 + 3 + 2 + 3 + 3), (1.0, 120)):
        summary = make(data, tmp_path / str(check), check=check, model=StubModel(off=4))
        assert len(summary.distances) == summary.uncached_pictures == count
        found = drawn(tmp_path / str(check))
    ours = _pixels(found[0].png).astype(float)
    distance = np.linalg.norm(np.full_like(ours, 4)) / np.linalg.norm(ours + 4)
    assert summary.distances[0] == pytest.approx(distance)
    assert f"mean {summary.distance:.4f}" in str(summary)


@pytest.mark.parametrize("check", [0.01, 0.3, 0.5, 0.7, 0.99, 1.0])
def test_the_share_that_is_checked_is_not_rounded(tmp_path, check):
    scanned = Scan(4000, ((0, 0),) * 1000, "")
    data, config = open_table(table(tmp_path, lines(1))), hgc.Config.preset("fast")
    job = Job(data, scanned, StubModel(), config, settings(check=check, batch=8), tmp_path, 1)
    found = [job.is_checked(shard, 0) for shard in range(1000)]
    assert found[0] and sum(found) == round(1000 * check)


def test_past_the_largest_distance_it_stops(tmp_path):
    data = table(tmp_path, lines(60))
    more = {"check": 0.1, "model": StubModel(off=40)}
    with pytest.raises(GenerateError, match=r"are at 0\.\d+ from \d+ uncached ones"):
        make(data, tmp_path / "out", max_distance=0.01, **more)
    assert 0 < len([n for n in files(tmp_path / "out") if n[0] != "."]) < 15
    with pytest.raises(GenerateError, match="uncached"):  # nothing has changed since
        make(data, tmp_path / "out", max_distance=0.01, **more)
    assert make(data, tmp_path / "out", max_distance=10.0, **more).pictures == 120


def test_other_shards_are_begun_while_the_device_is_busy(tmp_path):
    data = table(tmp_path, lines(40))
    model = StubModel(waits_for=tmp_path / "out")
    assert make(data, tmp_path / "out", model=model).pictures == 80


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"engine": "spark"}, "engine must be one of local, ray"),
        ({"workers": 2}, "for engine='ray'"),
        ({"max_distance": 0.1}, "max_distance needs check"),
        ({"dtype": "fp8"}, "dtype must be one of"),
        ({"images": 0}, "images must be an integer of at least 1; got 0"),
        ({"format": "zip"}, "format must be one of"),
        ({"size": (65, 64)}, "multiples of 8"),
        ({"check": 2.0}, "check must be a share"),
        ({"resize": "lanczos"}, "resize must be one of"),
        ({"data": "nowhere"}, "got nowhere, which holds none"),
        ({"device": []}, r"device must be a name such as .* or a list of them; got \[\]"),
        ({"device": ","}, "device must be .*; got ','"),
        ({"device": ["cpu", 1]}, "device must be"),
        ({"device": None}, "device must be .*; got None"),
        ({"size": 64}, "size must be two multiples of 8 pixels, height and width; got 64"),
        ({"size": (64,)}, r"size must be two .*; got \(64,\)"),
        ({"size": (64, 64, 64)}, "size must be two"),
        ({"size": (64.0, 64)}, "size must be two"),
        ({"limit": 1.5}, "limit must be an integer of at least 1; got 1.5"),
        ({"limit": 0}, "limit must be an integer of at least 1; got 0"),
        ({"seed": "x"}, "seed must be an integer of at least 0; got 'x'"),
        ({"check": "x"}, "check must be a finite number; got 'x'"),
        ({"check": 1, "max_distance": float("nan")}, "max_distance must be a finite number; got n"),
        ({"check": 1, "max_distance": -0.1}, "max_distance must be at least 0; got -0.1"),
        ({"guidance": "x"}, "guidance must be a finite number; got 'x'"),
        ({"data": [{"text": "a house"}]}, "data must be one path; got list"),
        ({"root": 1}, "root must be one path; got int 1"),
        ({"workers": 0, "engine": "ray"}, "workers must be an integer of at least 1; got 0"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, given, said):
    with pytest.raises(GenerateError, match=said):
        hgc.generate(out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path):
    out = tmp_path / "out"
    command = ["generate", "--out", out, "--limit", 1, "--images", 2, "--steps", 1]
    said = run(*command, "--format", "folder")
    assert "2 pictures in" in said and "page.html" in said
    assert len(list((out / "shards" / "000000").glob("*.png"))) == 2
    assert "holds another run: steps is 1 there and 2 here" in refused(
        *command, "--format", "folder", "--steps", 2)  # fmt: skip
    assert "quick" in refused(*command, "--config", "quick")
    assert "only model='testbed' has items" in refused("generate", "--model", tmp_path)
    table = tmp_path / "table.jsonl"
    table.write_text('{"text": "a house", "condition": "missing.png"}\n')
    said = run("generate", "--data", table, "--out", tmp_path / "none", "--steps", 1, code=2)
    assert "every item failed: there is no picture" in said
    assert len(failed(tmp_path / "none")) == 1
    assert "sees no GPU" in refused(*command, "--device", "cuda") or torch.cuda.is_available()


def test_settings_that_change_no_picture_are_not_in_the_manifest():
    names = settings(check=0.5, strict=True).pictures()
    assert names == settings().pictures() and not {"check", "strict"} & names.keys()
