"""`hgc eval` on a checkpoint and a folder of pictures: tiny models with random weights."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from commands import run

from hgc.evaluation import Candidate, DataError, Folder, ModelError, Settings, evaluate
from hgc.planning.config import Calibration, Config, StepPlan

for name in ("transformers", "PIL", "skimage", "torchmetrics", "matplotlib"):
    pytest.importorskip(name)

from PIL import Image  # noqa: E402

from hgc.evaluation import judging  # noqa: E402

SIZE = 32
CLASSES = 5
SHALLOW = StepPlan(control="reuse", depth=1, guidance="reuse")
QUICK = Config(name="quick", num_evaluations=3, steps=(StepPlan(), SHALLOW, StepPlan()))
ROWS = [Candidate("uncached", None, 3), Candidate("quick", QUICK, 3)]
NEEDS_A_JUDGE = ("segmentation", "depth")


def _seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return make().eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The folder of a tiny pipeline with text encoder, tokenizer and ControlNet."""
    from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

    from hgc import testbed

    tokenizer = AutoTokenizer.from_pretrained(testbed.path() / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=models.TEXT, intermediate_size=models.TEXT,
        num_attention_heads=2, num_hidden_layers=1, max_position_embeddings=32,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    pipe = StableDiffusionControlNetPipeline(
        vae=models.vae(), text_encoder=_seeded(lambda: CLIPTextModel(config)), tokenizer=tokenizer,
        unet=models.small_unet(), controlnet=models.small_controlnet(),
        scheduler=models.scheduler(DDIMScheduler), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("checkpoint")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judges(tmp_path_factory) -> dict[str, Path | None]:
    """Folders of a segmenter and a depth model; the edges have none."""
    from transformers import (
        GLPNConfig,
        GLPNForDepthEstimation,
        GLPNImageProcessor,
        SegformerConfig,
        SegformerForSemanticSegmentation,
        SegformerImageProcessor,
    )

    tiny = {
        "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1],
        "decoder_hidden_size": 8,
    }  # fmt: skip
    root = tmp_path_factory.mktemp("judges")
    made = {
        "segmentation": (
            lambda: SegformerForSemanticSegmentation(SegformerConfig(num_labels=CLASSES, **tiny)),
            SegformerImageProcessor(size={"height": SIZE, "width": SIZE}),
        ),
        "depth": (lambda: GLPNForDepthEstimation(GLPNConfig(**tiny)), GLPNImageProcessor()),
    }
    for condition, (make, processor) in made.items():
        _seeded(make).save_pretrained(root / condition)
        processor.save_pretrained(root / condition)
    return {"canny": None, "softedge": None, **{name: root / name for name in made}}


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    from transformers import (
        AutoTokenizer,
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
    )

    from hgc import testbed

    tokenizer = AutoTokenizer.from_pretrained(testbed.path() / "tokenizer")
    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1,
             "num_hidden_layers": 1, "projection_dim": 8}  # fmt: skip
    config = CLIPConfig(
        text_config={**small, "vocab_size": len(tokenizer), "max_position_embeddings": 32,
                     "eos_token_id": tokenizer.eos_token_id},
        vision_config={**small, "image_size": SIZE, "patch_size": 16},
        projection_dim=8,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("clip")
    _seeded(lambda: CLIPModel(config)).save_pretrained(folder)
    crop = {"height": SIZE, "width": SIZE}
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=crop)
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    """Three pictures of 40 x 40 with conditions and labels: they are resized."""
    folder = tmp_path / "data"
    random = np.random.default_rng(12)
    lines = []
    for i in range(3):
        soft = np.kron(random.integers(0, 255, (5, 5, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        labels = np.kron(random.integers(0, CLASSES, (5, 5)), np.ones((8, 8))).astype(np.uint8)
        labels[:4] = 255
        for name, pixels in (("true", soft), ("condition", soft[::-1]), ("label", labels)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
        lines.append(
            {
                "file_name": f"true/{i}.png",
                "text": f"a day scene with {('grass', 'sand', 'water')[i]}",
                "condition_file_name": f"condition/{i}.png",
                "label_file_name": f"label/{i}.png",
            }
        )
    _write(folder, lines)
    return folder


def _write(folder: Path, lines: list[dict]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metadata.jsonl").write_text(text)


def _lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def _uint8(images: np.ndarray) -> np.ndarray:
    return (images * 255 + 0.5).astype(np.uint8)


# The measures, each against a way of its own


def _expected(condition, images, data, judges):
    """Fidelity of pictures [3 lines x 2, H, W, 3] with code that is not the evaluation's."""
    from transformers import (
        AutoImageProcessor,
        AutoModelForDepthEstimation,
        AutoModelForSemanticSegmentation,
    )

    def opened(kind: str, i: int, how) -> Image.Image:
        return Image.open(data / kind / f"{i // 2}.png").resize((SIZE, SIZE), how)

    nearest, bicubic = Image.Resampling.NEAREST, Image.Resampling.BICUBIC
    if condition == "canny":
        scores = []
        for i, image in enumerate(images):
            found = judging.canny(image)
            wanted = np.asarray(opened("condition", i, nearest))[..., 0] > 127
            scores.append(2 * (found & wanted).sum() / max(found.sum() + wanted.sum(), 1))
        return np.mean(scores)
    if condition == "softedge":
        from hgc.testbed.conditions import softedge

        found = np.stack([softedge(image) for image in images])
        true = [softedge(np.asarray(opened("true", i, bicubic))) for i in range(len(images))]
        return judging.softedge_ssim(found, np.stack(true)).mean()
    processor = AutoImageProcessor.from_pretrained(judges[condition])
    given = processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")
    if condition == "depth":
        model = AutoModelForDepthEstimation.from_pretrained(judges[condition])
        with torch.no_grad():
            depth = model(**given).predicted_depth.numpy().astype(np.float64)
        errors = []
        for i, one in enumerate(depth):
            true = np.asarray(opened("condition", i, bicubic))[..., 0].astype(np.float64)
            one, true = ((x - x.min()) / (x.max() - x.min()) for x in (one, true))
            errors.append(-np.sqrt(((one - true) ** 2).mean()))
        return np.mean(errors)
    model = AutoModelForSemanticSegmentation.from_pretrained(judges[condition])
    with torch.no_grad():
        logits = model(**given).logits
    logits = torch.nn.functional.interpolate(logits, (SIZE, SIZE), mode="bilinear")
    seen = logits.argmax(1).numpy()
    true = np.stack([np.asarray(opened("label", i, nearest)) for i in range(len(images))])
    known, ious = true != 255, []
    for k in np.unique(true[known]):
        union = ((seen == k) | (true == k)) & known
        ious.append(((seen == k) & (true == k)).sum() / union.sum())
    return np.mean(ious)


@pytest.mark.parametrize("condition", ["segmentation", "canny", "softedge", "depth"])
def test_fidelity_is_what_the_judge_says_of_the_pictures(
    condition, checkpoint, judges, data, tmp_path
):
    subject = Folder(checkpoint, data, condition, judge=judges[condition], images=2)
    kept = []
    rows = evaluate(
        None, ROWS, Settings(scenes=3, steps=3, batch=4), subject=subject,
        on_images=lambda batch: kept.append((batch.candidate.name, batch.images)),
    )  # fmt: skip
    for row in rows:
        images = _uint8(np.concatenate([images for name, images in kept if name == row.name]))
        assert images.shape == (6, SIZE, SIZE, 3)
        expected = _expected(condition, images, data, judges)
        assert row["fidelity"].mean == pytest.approx(expected, abs=1e-5)
        assert (row.scenes, row.images, row.scheduler) == (3, 2, "unipc")
        assert (row.frechet is None) == (row.frechet_truth is None) == (judges[condition] is None)
    assert rows[0]["distance"].mean == 0.0 < rows[1]["distance"].mean
    assert rows[1].macs.total < rows[0].macs.total and rows[1].sd15_macs is None
    # pictures of one condition differ in their noise
    assert np.abs(kept[0][1][0] - kept[0][1][1]).max() > 0.01


def test_edges_come_from_the_true_picture_where_no_condition_is_given(checkpoint, data):
    lines = _lines(data)
    for line in lines:
        del line["condition_file_name"], line["label_file_name"]
    _write(data, lines)
    for condition in ("canny", "softedge"):
        (one,) = Folder(checkpoint, data, condition, images=1).inputs(condition, 1, 1)
        true = Image.open(data / "true/1.png").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        if condition == "canny":
            expected = judging.canny(np.asarray(true)).astype(np.uint8) * 255
        else:
            from hgc.testbed.conditions import softedge

            expected = softedge(np.asarray(true))
        np.testing.assert_array_equal(one.condition, np.repeat(expected[..., None], 3, -1))
        assert one.prompt == lines[1]["text"]


def test_agreement_is_clips_score(checkpoint, data, clip):
    from transformers import CLIPModel, CLIPProcessor

    subject = Folder(checkpoint, data, "canny", clip=clip, images=1)
    kept = []
    (row,) = evaluate(
        None, ROWS[:1], Settings(scenes=2, steps=3, batch=2), subject=subject,
        on_images=lambda batch: kept.append(batch.images),
    )  # fmt: skip
    given = CLIPProcessor.from_pretrained(clip)(
        text=[line["text"] for line in _lines(data)[:2]], images=list(_uint8(kept[0])),
        return_tensors="pt", padding=True,
    )  # fmt: skip
    model = CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        logits = model(**given).logits_per_image.diagonal() / model.logit_scale.exp()
    expected = float(100 * logits.clamp(min=0).mean())
    assert row["agreement"].mean == pytest.approx(expected, abs=1e-4)


def test_f1_of_edges_by_hand():
    found, wanted = np.zeros((2, 4, 4), bool)
    assert judging.edge_f1(found, wanted) == 1.0
    found[0], wanted[0, :2], wanted[1, :2] = True, True, True
    # 2 of 4 found are wanted, 2 of 4 wanted are found
    assert judging.edge_f1(found, wanted) == pytest.approx(0.5)


# What is wrong is named


def _change(field, value, index=1):
    def change(folder: Path) -> None:
        lines = _lines(folder)
        if value is None:
            lines[index].pop(field)
        else:
            lines[index][field] = value
        _write(folder, lines)

    return change


def _labels(value):
    def change(folder: Path) -> None:
        pixels = np.full((40, 40), value, np.uint8)
        Image.fromarray(pixels).save(folder / "label/1.png")

    return change


def _truncate(folder: Path) -> None:
    path = folder / "condition/1.png"
    path.write_bytes(path.read_bytes()[:90])


def _smaller(folder: Path) -> None:
    Image.open(folder / "label/1.png").resize((32, 40)).save(folder / "label/1.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "metadata.jsonl").unlink(), "cannot read .*metadata.jsonl"),
        (lambda folder: _write(folder, []), "metadata.jsonl has no line"),
        (lambda folder: (folder / "metadata.jsonl").write_text("{"), "line 1 is not JSON"),
        (_change("text", None), "line 2 has no field 'text'"),
        (_change("condition_file_name", None), "line 2 has no field 'condition_file_name'"),
        (_change("label_file_name", None), "line 2 has no field 'label_file_name'"),
        (_change("condition_file_name", "no.png"), "line 2: condition_file_name 'no.png' is not"),
        (_change("file_name", 3), "line 2: file_name must be a path; got 3"),
        (lambda folder: (folder / "true/1.png").write_text("x"), "true/1.png is not a picture"),
        (_truncate, "cannot read the picture .*condition/1.png"),
        (_smaller, r"line 2: .*true/1.png is 40 x 40, .*label/1.png is 32 x 40"),
        (_labels(CLASSES), rf"label/1.png has the class {CLASSES}, and the judge .* knows 0 to 4"),
        (
            lambda folder: shutil.copy(folder / "true/1.png", folder / "label/1.png"),
            "label/1.png has the mode RGB",
        ),
    ],
)  # fmt: skip
def test_data_that_cannot_be_used_is_named(change, message, checkpoint, judges, data):
    change(data)
    with pytest.raises(DataError, match=message):
        subject = Folder(checkpoint, data, "segmentation", judge=judges["segmentation"])
        evaluate(None, ROWS, Settings(scenes=3, steps=3), subject=subject)


def test_models_that_cannot_be_used_are_named(checkpoint, judges, data, tmp_path):
    def refused(message: str, condition: str = "segmentation", model=checkpoint, **options):
        with pytest.raises(ModelError, match=message):
            Folder(model, data, condition, **options)

    refused("no model_index.json", model=tmp_path)
    refused("needs a judge")
    refused("architectures are GLPNForDepthEstimation", judge=judges["depth"])
    refused("measured without a judge", "canny", judge=judges["depth"])
    refused("no config.json, so no transformers model", judge=data)
    refused("clip .* holds no config.json", "canny", clip=data)
    refused("dtype: expected one of fp32, fp16, bf16", "canny", dtype="fp8")
    refused("holds no config.json, so no ControlNet", "canny", controlnet=data)
    alone = tmp_path / "alone"
    shutil.copytree(checkpoint, alone)
    shutil.rmtree(alone / "controlnet")
    refused("has no ControlNet", "canny", model=alone)
    bare = tmp_path / "bare"
    shutil.copytree(judges["depth"], bare)
    (bare / "preprocessor_config.json").unlink()
    refused("no preprocessor_config.json", "depth", judge=bare)


def test_more_scenes_than_there_are(checkpoint, data):
    subject = Folder(checkpoint, data, "canny")
    with pytest.raises(ValueError, match=r"2 scenes from 2 on were asked for, and .* has 3"):
        evaluate(None, ROWS, Settings(scenes=2, start=2, steps=3), subject=subject)


# The command


def _command(checkpoint, judges, data, out, *more) -> list[str]:
    return [
        "eval", "--model", checkpoint, "--data", data, "--judge", judges["segmentation"],
        "--conditions", "segmentation", "--images", 2, "--batch", 2, "--steps", 3, "--out", out,
        "--rows", "exact,fewer-steps,2-steps", "--rival-schedulers", "unipc,dpm++2m", *more,
    ]  # fmt: skip


_TIMES = {"seconds", "reference_seconds", "waited", "speedup"}


def _untimed(folder: Path) -> dict[str, object]:
    """What an evaluation left behind, without what a clock says."""
    found: dict[str, object] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in x.items() if k not in _TIMES} for x in lines]
        elif path.suffix == ".json":
            rows = json.loads(path.read_text())["rows"]
            found[name] = [{k: v for k, v in x.items() if k not in _TIMES} for x in rows]
        else:
            found[name] = None
    return found


@pytest.mark.slow
def test_a_killed_evaluation_ends_as_one_that_was_not(checkpoint, judges, data, tmp_path):
    """The process is killed between two calls; what it then writes is the same byte for byte."""
    output = run(*_command(checkpoint, judges, data, tmp_path / "whole"))
    assert "segmentation (mean IoU), 3 held-out scenes of 2 pictures" in output
    whole = _untimed(tmp_path / "whole")
    assert {"measured.jsonl", "pareto.png", "table.md"} <= set(whole)
    rows = {row["name"]: row for row in whole["table.json"]}
    rivals = ("2 steps", "2 steps@dpm++2m")
    assert list(rows) == ["uncached", "exact", *rivals]
    nearest = min(rivals, key=lambda name: rows[name]["distance"])
    assert [n for n, row in rows.items() if row["shown"]] == ["uncached", "exact", nearest]
    assert rows["exact"]["distance"] == 0.0

    killed = tmp_path / "killed"
    arguments = [str(a) for a in _command(checkpoint, judges, data, killed)]
    code = (
        f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"
        f"from hgc.cli import main; import sys; sys.argv = ['hgc', *{arguments!r}]; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    record = killed / "measured.jsonl"
    deadline = time.monotonic() + 120
    try:
        while not (record.exists() and record.read_bytes().count(b"\n") >= 5):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    before = record.read_bytes()
    run(*_command(checkpoint, judges, data, killed))
    # nothing that was whole is made again, and nothing is lost
    good = before[: before.rfind(b"\n") + 1]
    assert record.read_bytes().startswith(good) and 5 <= good.count(b"\n") < 12
    assert _untimed(killed) == whole


def test_more_scenes_add_to_a_record(checkpoint, judges, data, tmp_path):
    out = tmp_path / "out"
    run(*_command(checkpoint, judges, data, out, "--scenes", 2))
    before = (out / "measured.jsonl").read_bytes()
    run(*_command(checkpoint, judges, data, out))
    assert (out / "measured.jsonl").read_bytes().startswith(before)
    run(*_command(checkpoint, judges, data, tmp_path / "whole"))
    ours, whole = _untimed(out), _untimed(tmp_path / "whole")
    assert ours.keys() == whole.keys()
    for name in ours:
        if name != "measured.jsonl":
            assert ours[name] == whole[name], name


def test_settings_of_the_command_reach_the_pipeline(checkpoint, data, tmp_path):
    """Guidance, scheduler and size change the pictures; the table says so."""
    common = [
        "eval", "--model", checkpoint, "--controlnet", checkpoint / "controlnet", "--data", data,
        "--conditions", "canny", "--rows", "uncached", "--steps", 2, "--images", 1, "--scenes", 1,
        "--first-scene", 1,
    ]  # fmt: skip
    seen = {}
    for name, more in {
        "plain": [], "guidance": ["--guidance", 2], "scheduler": ["--scheduler", "ddim"],
        "size": ["--size", "32x48"],
    }.items():  # fmt: skip
        run(*common, "--out", tmp_path / name, *more)
        about = json.loads((tmp_path / name / "table.json").read_text())["about"]
        (line,) = (tmp_path / name / "measured.jsonl").read_text().splitlines()
        seen[name] = about, json.loads(line)
    assert seen["plain"][0]["guidance_scale"] == 7.5 and seen["guidance"][0]["guidance_scale"] == 2
    assert [seen[n][0]["scheduler"] for n in ("plain", "scheduler")] == ["unipc", "ddim"]
    assert seen["size"][0]["size"] == [32, 48]
    assert len({line["values"]["fidelity"][0] for _, line in seen.values()}) > 2
    assert len({line["key"] for _, line in seen.values()}) == 4
    assert all(line["first"] == 1 for _, line in seen.values())


def test_quick_is_eight_scenes_at_most(checkpoint, data, tmp_path):
    _write(data, _lines(data) * 4)
    run(
        "eval", "--model", checkpoint, "--data", data, "--conditions", "canny", "--images", 1,
        "--rows", "uncached", "--steps", 2, "--quick", "--out", tmp_path / "out",
    )  # fmt: skip
    (row,) = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert row["scenes"] == 8


def test_a_plain_pipeline_takes_the_controlnet_that_is_given(data):
    """The testbed's folder as a stranger's: a pipeline that was saved without its ControlNet."""
    from hgc import testbed

    net = testbed.path() / "controlnet_canny"
    subject = Folder(testbed.path(), data, "canny", controlnet=net, images=1)
    pipe = subject.load("canny", "cpu")
    assert type(pipe).__name__ == "StableDiffusionControlNetPipeline"
    assert pipe.safety_checker is None and subject.size() == (64, 64)
    ours = testbed.load_pipeline("canny").controlnet.state_dict()
    assert all(torch.equal(v, ours[k]) for k, v in pipe.controlnet.state_dict().items())


def test_wrong_uses_of_the_command_are_named(checkpoint, judges, data, tmp_path):
    def refused(*arguments) -> str:
        output = run("eval", "--out", tmp_path / "out", *arguments, code=2).strip()
        assert output.startswith("hgc: ") and "\n" not in output
        return output

    assert "--data goes with --model" in refused("--data", data)
    assert "--model needs --data" in refused("--model", checkpoint)
    given = ("--model", checkpoint, "--data", data)
    assert "the one condition" in refused(*given)
    assert "--size must be pixels" in refused(*given, "--conditions", "canny", "--size", "x")
    edges = (*given, "--conditions", "canny", "--images", 1, "--steps", 3)
    assert "no scheduler named 'lcm'" in refused(*edges, "--rival-schedulers", "lcm")
    assert "no scheduler named 'lcm'" in refused(*edges, "--scheduler", "lcm")
    assert "guidance must be above 1" in refused(*edges, "--guidance", 1)

    deep = tmp_path / "deep.json"
    config = Config(num_evaluations=3, key_steps=(0,), depth=9)
    config.to_json(deep)
    assert "'deep' is a plan for another model: its depth is 9" in refused(*edges, "--rows", deep)
    known = Calibration("UNet2DConditionModel 123", "UniPC", 3, 3, 0.5, 0.1, 0.1, 2, 0.1, 1)
    other = tmp_path / "other.json"
    dataclasses.replace(config, depth=1, calibration=known).to_json(other)
    said = refused(*edges, "--rows", other)
    assert "other.json is a plan for another model: its calibration.model" in said
