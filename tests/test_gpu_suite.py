"""scripts/gpu_suite.py, with parts that need no GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parent.parent / "scripts" / "gpu_suite.py"


@pytest.fixture
def suite():
    spec = importlib.util.spec_from_file_location("gpu_suite", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_suite"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_suite"]


@pytest.fixture
def run(suite, monkeypatch, tmp_path):
    """Runs the suite with parts made of Python code; returns the exit status and the results."""
    about = {"device": "A GPU", "torch": "2", "cuda": "13", "python": "3", "commit": "c"}
    monkeypatch.setattr(suite, "about", lambda tiny: dict(about))

    def call(parts, *arguments):
        made = [
            suite.Part(name, (sys.executable, "-c", code, "{out}", "{work}", "{left}"), cap, (), b)
            for name, code, cap, b in parts
        ]
        monkeypatch.setattr(suite, "parts", lambda pipelines: made)
        status = suite.main(["--results", str(tmp_path), *arguments])
        path = tmp_path / "a-gpu.json"
        found = json.loads(path.read_text())["parts"] if path.exists() else {}
        return status, found, path.with_suffix(".md").read_text() if path.exists() else ""

    return call


WRITES = "import sys; open(sys.argv[1], 'w').write('{\"markdown\": \"a table\"}'); "


def test_results_are_kept_part_by_part(run):
    status, found, page = run(
        [
            ("good", WRITES, 60, False),
            ("bad", "print('what went wrong'); raise SystemExit(3)", 60, True),
            ("hangs", WRITES + "import time; time.sleep(600)", 1, True),
            ("absent", "print('a program is not there'); raise SystemExit(127)", 60, False),
        ]
    )
    assert status == 1
    assert {name: one["status"] for name, one in found.items()} == {
        "good": "passed", "bad": "failed", "hangs": "timed out", "absent": "skipped",
    }  # fmt: skip
    assert "what went wrong" in found["bad"]["output"]
    # what a part wrote before its time was over is kept
    assert found["hangs"]["data"] == found["good"]["data"] == {"markdown": "a table"}
    assert 1 <= found["hangs"]["seconds"] < 30
    assert "| bad | failed |" in page and page.count("a table") == 2


def test_checks_run_side_by_side_and_timings_alone(run, tmp_path):
    """Each part writes down when it began and ended."""
    code = (
        "import pathlib, sys, time; begun = time.time(); time.sleep(0.5); "
        "pathlib.Path(sys.argv[2], '{0}').write_text(''); "
        f"open({str(tmp_path / 'log')!r}, 'a').write(f'{{0}} {{{{begun}}}} {{{{time.time()}}}}\\n')"
    )
    parts = [(name, code.format(name), 60, name in "bc") for name in "abcd"]
    assert run(parts)[0] == 0
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    times = {name: (float(begun), float(ended)) for name, begun, ended in lines}
    assert times["b"][0] < times["c"][1] and times["c"][0] < times["b"][1]
    assert times["a"][1] < min(times["b"][0], times["c"][0])
    assert times["d"][0] > max(times["b"][1], times["c"][1])


def test_nothing_is_measured_without_the_library(run, capsys):
    status, found, _ = run([("info", "raise SystemExit(1)", 60, False), ("b", "", 60, False)])
    assert status == 1 and list(found) == ["info"]
    assert "not run: b" in capsys.readouterr().out


def test_the_time_is_kept(run, capsys):
    begun = time.monotonic()
    sleep = "import time; time.sleep(600)"
    status, found, _ = run([("a", sleep, 60, False), ("b", sleep, 60, False)], "--seconds", "3")
    assert status == 1 and time.monotonic() - begun < 30
    assert found["a"]["status"] == "timed out" and "b" not in found
    assert "not run: b" in capsys.readouterr().out


def test_a_part_knows_the_seconds_it_has(run, tmp_path):
    code = f"import sys; open({str(tmp_path / 'left')!r}, 'w').write(sys.argv[3])"
    run([("a", code, 40, False)])
    assert (tmp_path / "left").read_text() == "30"


def test_dry_run_needs_no_gpu(suite, capsys):
    assert suite.main(["--dry-run"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert "carry" in first and suite.CALL in first
    names = [line.partition(" ")[0] for line in lines]
    assert names[0] == "info" and {"tests-ops", "tests-engine", "pipelines", "ops"} <= set(names)
    for wrong in (["--dry-run", "--parts", "nothing"], []):
        with pytest.raises(SystemExit) as error:
            suite.main(wrong)
        assert error.value.code == 2


@pytest.mark.slow
def test_every_part_starts_on_a_cpu(suite, tmp_path):
    pytest.importorskip("DeepCache", reason="the extra peers is not installed")
    assert suite.main(["--tiny", "--results", str(tmp_path), "--seconds", "1200"]) == 0
    found = json.loads(next(tmp_path.glob("*.json")).read_text())["parts"]
    left = {name for name, one in found.items() if one["status"] != "passed"}
    assert left <= {"memcheck"}
    assert set(found) == {part.name for part in suite.parts("")}
    assert "uncached, 5 steps" in next(tmp_path.glob("*.md")).read_text()
