"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import models
import numpy as np
import pytest
from commands import refused, run

import hgc
import hgc_kernels
from hgc.evaluation.models import load_shapes
from hgc.planning.config import PRESETS, Config, StepPlan

_EXTRA = ("transformers", "PIL", "skimage", "torchmetrics", "matplotlib")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a tiny pipeline with a ControlNet."""
    folder = tmp_path_factory.mktemp("tiny")
    models.sd15_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def extra():
    for name in _EXTRA:
        pytest.importorskip(name)


def test_version():
    assert run("--version").strip() == f"hgc {hgc.__version__}"


def test_help_names_the_commands():
    output = run("--help")
    for name in ("plan", "info", "demo", "eval", "bench", "calibrate"):
        assert re.search(rf"^\s*{name}\b", output, re.MULTILINE)


def test_a_wrong_use_ends_the_process_with_code_2_and_one_line():
    code = "from hgc.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", "-c", "papre"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("hgc: no preset named 'papre'")
    for name in PRESETS:
        assert name in done.stderr


# plan


def test_plan_of_sd15_compares_the_presets():
    first, second = run("plan", "--model", "sd15").split("At another number of steps")
    table = [re.findall(r"[^│┃]+", line) for line in first.splitlines() if line.startswith("│")]
    rows = {cells[0].strip(): [c.strip() for c in cells[1:]] for cells in table}
    assert next(iter(rows)) == "uncached, 20 steps"
    assert rows["uncached, 20 steps"] == ["20", "18.20T", "100.0%", "21.73T", "100.0%"]
    assert list(rows)[1:] == list(PRESETS)
    for name, limit in (("paper", 6.70), ("balanced", 5.6), ("fast", 4.6), ("turbo", 4.0)):
        steps, paper, share, total, _ = rows[name]
        assert int(steps) == PRESETS[name].num_evaluations
        assert float(paper[:-1]) <= limit < float(total[:-1]) * 1.5
        assert float(share[:-1]) == pytest.approx(100 * float(paper[:-1]) / 18.20, abs=0.1)
    shapes = load_shapes("sd15")
    elsewhere = {
        cells[0]: cells[1:]
        for line in second.splitlines()
        if line.startswith("│")
        for cells in [[cell.strip() for cell in line.strip("│").split("│")]]
    }
    assert elsewhere["uncached"] == ["", "9.10T", "18.20T", "27.30T", "45.50T"]
    assert elsewhere["exact"][0] == "any" and elsewhere["turbo"][0] == "20"
    for name, column, steps in (("fast", 2, 20), ("paper", 4, 50), ("turbo", 1, 10)):
        count = hgc.count_macs(
            shapes.unet, list(shapes.controlnets), name, num_evaluations=steps, height=512
        )
        assert elsewhere[name][column].startswith(f"{count.paper / 1e12:.2f}T ("), elsewhere[name]


def test_plan_of_a_folder_is_drawn_a_row_an_evaluation(tiny):
    output = run("plan", "--model", tiny, "-c", "paper", "--size", "32x48", "--no-guidance")
    assert "1 ControlNet, 32 x 48, no classifier-free guidance" in output
    expected = hgc.plan("paper", PRESETS["paper"].num_evaluations)
    bars = re.search(r"^depth +(\S+)$", output, re.MULTILINE)[1]
    assert [bar == "█" for bar in bars] == [step.is_key for step in expected]
    rows = [line for line in output.splitlines() if re.match(r"│ +\d+ │", line)]
    assert len(rows) == len(expected)
    count = hgc.count_macs(
        models.sd15_unet(), models.sd15_controlnet(), "paper", height=32, width=48, guidance=False
    )
    for row, step, macs in zip(rows, expected, count.evaluations, strict=True):
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells[1] == step.control and cells[2] == str(step.depth)
        assert cells[5] == step.guidance
        assert cells[-2] == f"{macs.total / 1e9:.2f}"


def test_plan_with_all_draws_every_preset(tiny):
    output = run("plan", "--model", tiny, "--all", "--steps", "2")
    assert "uncached, 2 steps" in output
    for name in PRESETS:
        assert f"{name}: 2 steps" in output


def test_plan_reads_a_file_and_a_controlnet_folder(tiny, tmp_path):
    path = tmp_path / "mine.json"
    shallow = StepPlan(control="reuse", depth=3, guidance="off", forecast=(1.5, -0.5))
    Config(name="mine", num_evaluations=2, steps=(StepPlan(), shallow)).to_json(path)
    output = run(
        "plan", "--model", tiny / "unet", "--controlnet", tiny / "controlnet",
        "--controlnet", tiny / "controlnet", "-c", path,
    )  # fmt: skip
    assert "mine: 2 steps" in output and "2 ControlNets" in output and "+1.5, -0.5" in output


@pytest.mark.slow
def test_plan_of_sdxl_needs_no_weights():
    output = run("plan", "--model", "sdxl", "-c", "exact", "--steps", "1")
    assert "sdxl, 1 ControlNet, 1024 x 1024" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-c", "papre"], "Did you mean 'paper'"),
        (["--model", "sd51"], "no model named 'sd51'"),
        (["--size", "big"], "--size must be pixels"),
        (["-c", "nowhere.json"], "cannot read nowhere.json"),
        (["--model", "{tiny}/vae"], "AutoencoderKL"),
        (["--model", "{tiny}/.."], "neither unet/config.json"),
        (["--model", "{tiny}", "--size", "33"], "multiple of 2"),
        (["--model", "{tiny}", "--controlnet", "{tiny}"], "no config.json"),
    ],
)
def test_plan_says_what_is_wrong(tiny, arguments, message):
    assert message in refused("plan", *(a.format(tiny=tiny) for a in arguments))


# info


def test_info_lists_versions_and_every_op_with_its_backend():
    output = run("info")
    import diffusers
    import torch

    for text in (hgc.__version__, torch.__version__, diffusers.__version__):
        assert text in output
    assert "torch and diffusers are releases that hgc was tested with" in output
    for op, devices in hgc_kernels.backends().items():
        for device, (backend, why) in devices.items():
            line = next(
                line for line in output.splitlines()
                if re.match(rf"│ {op} +│ {device} ", line)
            )  # fmt: skip
            assert backend in line and why in line


def test_info_says_which_releases_hgc_was_not_tested_with(monkeypatch):
    monkeypatch.setattr("diffusers.__version__", "0.43.0")
    assert "diffusers 0.43.0 is not one that hgc was tested with" in run("info")


# demo


def test_demo_prints_the_table_and_writes_the_grid(extra, tmp_path):
    out = tmp_path / "grid.png"
    output = run(
        "demo", "--out", out, "--scenes", 1, "--steps", 6, "--presets", "exact,turbo",
        "--conditions", "segmentation",
    )  # fmt: skip
    from PIL import Image

    assert "segmentation (mean IoU), 1 held-out scenes" in output
    for name in ("uncached", "exact", "turbo"):
        assert re.search(rf"^ {name} ", output, re.MULTILINE)
    # condition, uncached, turbo and its difference: exact is equal bit for bit and not shown
    assert Image.open(out).width == pytest.approx(4 * 64 * 6, rel=0.1)
    assert out.name in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--presets", "trubo"], "Did you mean 'turbo'"),
        (["--conditions", "cany"], "no condition named 'cany'"),
        (["--out", "{tmp}/none/grid.png"], "cannot write to"),
        (["--out", "{tmp}/grid"], "expected a picture's name"),
        (["--out", "{tmp}/a.png", "--html", "{tmp}/a.png"], "is the file of --out"),
        (["--presets", ","], "--presets names nothing"),
    ],
)
def test_demo_says_what_is_wrong(extra, tmp_path, arguments, message):
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "grid.png")]
    assert message in refused("demo", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["demo", "eval"])
def test_a_missing_extra_is_named(command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    output = refused(command, "--out", tmp_path / "out")
    assert "scikit-image" in output and 'pip install "hybrid-grained-cache[demo]"' in output


# eval


def test_eval_writes_its_tables_and_goes_on_from_its_record(extra, tmp_path):
    path = tmp_path / "mine.json"
    shallow = StepPlan(control="reuse", depth=1, guidance="reuse")
    Config(name="mine", num_evaluations=3, steps=(StepPlan(), shallow, StepPlan())).to_json(path)
    arguments = [
        "eval", "--conditions", "canny", "--scenes", 3, "--batch", 2, "--steps", 3,
        "--rows", f"{path},2-steps", "--rival-schedulers", "unipc", "--out", tmp_path / "out",
    ]  # fmt: skip
    output = run(*arguments)
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {
        "measured.jsonl", "pareto.png", "table.csv", "table.json", "table.md",
    }  # fmt: skip
    first = json.loads((out / "table.json").read_text())
    assert [row["name"] for row in first["rows"]] == ["uncached", "mine", "2 steps"]
    assert first["about"]["scenes"] == 3 and first["about"]["torch"]
    assert "| mine | 3 |" in (out / "table.md").read_text()
    assert "2 steps" in output

    # as if it had been interrupted after the fourth of six
    lines = (out / "measured.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 6
    (out / "measured.jsonl").write_text("".join(lines[:4]))
    run(*arguments)
    again = json.loads((out / "table.json").read_text())
    for old, new in zip(first["rows"], again["rows"], strict=True):
        for field in set(old) - {"seconds", "speedup"}:
            assert old[field] == new[field]
    resumed = (out / "measured.jsonl").read_text().splitlines(keepends=True)
    assert resumed[:4] == lines[:4] and len(resumed) == 6


def test_eval_says_what_is_wrong(extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycvvdp", None)
    assert (
        'jod needs cvvdp, which the jod extra installs: pip install "hybrid-grained-cache[jod]"'
        in (refused("eval", "--jod", "--out", tmp_path / "out", "--quick"))
    )
    (tmp_path / "file").touch()
    assert "cannot write to" in refused("eval", "--out", tmp_path / "file" / "out")
    assert "--rows names nothing" in refused("eval", "--rows", ",", "--out", tmp_path / "out")
    assert "Did you mean 'paper'" in refused(
        "eval", "--rows", "papre", "--out", tmp_path / "out", "--quick"
    )
    assert "--device must be cpu or cuda" in refused(
        "eval", "--device", "tpu", "--out", tmp_path / "out"
    )
    assert "--images goes with --model" in refused("eval", "--images", 2, "--out", tmp_path / "out")


# bench


def test_bench_of_a_folder(tiny, tmp_path):
    path = tmp_path / "bench.json"
    output = run(
        "bench", "--model", tiny, "--size", 32, "--steps", 8, "--repeats", 1,
        "--presets", "exact,turbo", "--json", path, "--scheduler", "euler",
    )  # fmt: skip
    data = json.loads(path.read_text())
    assert [(row["name"], row["steps"]) for row in data["rows"]] == [
        ("uncached", 8), ("exact", 8), ("turbo", 8),
    ]  # fmt: skip
    assert data["about"]["scheduler"] == "EulerDiscreteScheduler"
    assert data["about"]["repeats"] == 1 and data["about"]["height"] == 32
    turbo = data["rows"][2]
    assert turbo["against"]["steps"] == turbo["against_equal"]["steps"] == 8
    for text in ("promised", "arrived", "uncached, 8 steps", "[p20, p80]"):
        assert text in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--presets", "papre"], "Did you mean 'paper'"),
        (["--model", "sd51"], "no model named 'sd51'"),
        (["--dtype", "fp8"], "--dtype must be one of fp32, fp16, bf16"),
        (["--scheduler", "eulr"], "no scheduler named 'eulr'"),
        (["--presets", ","], "names nothing"),
        (["--json", "{tmp}/none/x.json"], "cannot write to"),
        (["--model", "{tiny}", "--size", "33"], "divisible by 8|multiple of 2"),
        (["--model", "{tiny}/unet"], "model_index.json"),
    ],
)
def test_bench_says_what_is_wrong(tiny, tmp_path, arguments, message):
    arguments = [a.format(tiny=tiny, tmp=tmp_path) for a in arguments]
    assert re.search(message, refused("bench", *arguments, "--repeats", 1))


def test_calibrate_writes_a_plan_that_install_takes(tmp_path, extra):
    """On the testbed's folder as a stranger's: pictures with prompts beside them."""
    from hgc import testbed

    out, data = tmp_path / "mine.json", tmp_path / "data"
    data.mkdir()
    scene = testbed.held_out(1)[0]
    testbed.condition_image(scene, "canny").save(data / "a.png")
    (data / "a.txt").write_text(scene.caption)
    net = testbed.path() / "controlnet_canny"
    output = run(
        "calibrate", "--model", testbed.path(), "--controlnet", net, "--data", data, "--out", out,
        "--max-macs", 0.6, "--steps", 5, "--trials", 4, "--guidance", 2.0,
    )  # fmt: skip
    config = Config.of(str(out))
    assert config.name == "mine" and config.calibration.uncached_steps == 5
    assert config.calibration.macs_share <= 0.6 and "uncached steps" in output
    pipe = testbed.load_pipeline("canny")
    with hgc.install(pipe.unet, pipe.controlnet, config=str(out)):
        pipe(
            scene.caption, image=testbed.condition_image(scene, "canny"),
            num_inference_steps=config.calibration.steps, output_type="latent",
        )  # fmt: skip


def test_wrong_calibrations_are_refused(tmp_path, tiny, extra):
    from PIL import Image

    out = tmp_path / "plan.json"
    assert "one of the three" in refused("calibrate", "--out", out)
    both = ("--max-macs", 0.5, "--preset", "fast")
    assert "one of the three" in refused("calibrate", "--out", out, *both)
    assert "did you mean 'fast'" in refused("calibrate", "--out", out, "--preset", "fsat").lower()
    common = ("calibrate", "--out", out, "--max-macs", 0.5)
    assert "no model_index.json" in refused(*common, "--model", tmp_path)
    assert "--data" in refused(*common, "--model", tiny)
    assert "holds no .png" in refused(*common, "--model", tiny, "--data", tmp_path)
    (tmp_path / "a.png").touch()
    assert "a.png has no prompt" in refused(*common, "--model", tiny, "--data", tmp_path)
    assert "max_macs" in refused("calibrate", "--out", out, "--max-macs", 2, "--inputs", 1)
    assert "go with --model" in refused(*common, "--data", tmp_path)
    assert "does not go with --model" in refused(*common, "--model", tiny, "--condition", "canny")
    assert "must be one condition; got 'all'" in refused(*common, "--condition", "all")
    folder = (*common, "--model", tiny, "--data", tmp_path)
    (tmp_path / "a.txt").write_text("a house")
    assert "a.png is not a picture" in refused(*folder)
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "a.png")
    assert re.search(r"a.png has the mode I;?1?6?; expected 8 bits", refused(*folder))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xff")
    assert re.search(r"cannot read the prompt .*a.txt", refused(*folder))
    assert not out.exists()
