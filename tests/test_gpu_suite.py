"""scripts/gpu_suite.py, with parts that need no GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
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


def part(suite, name, code, needs=""):
    return suite.Part(name, (sys.executable, "-c", code, "{out}"), needs)


@pytest.fixture
def parts(suite, monkeypatch, tmp_path):
    """Small parts, each of which leaves a line in `log` when it runs."""
    log = tmp_path / "log"
    note = f"import sys; open({str(log)!r}, 'a').write('%s\\n'); "
    found = [
        part(suite, "good", note % "good" + "open(sys.argv[1], 'w').write('{\"benchmarks\": []}')"),
        part(suite, "bad", note % "bad" + "print('what went wrong'); sys.exit(3)"),
        part(suite, "hangs", note % "hangs" + "import time; time.sleep(600)"),
        part(suite, "other", note % "other"),
        part(suite, "absent", note % "absent", needs="a program that is nowhere"),
    ]
    monkeypatch.setattr(suite, "tiny_parts", lambda: found)
    monkeypatch.setattr(
        suite, "about", lambda tiny: {"device": "A GPU", "torch": "2", "cuda": "13", "python": "3",
                                      "commit": "c", "sources": "s"},
    )  # fmt: skip
    return lambda: log.read_text().split() if log.exists() else []


def run(suite, tmp_path, *arguments):
    return suite.main(["--tiny", "--results", str(tmp_path), "--timeout", "3", *arguments])


def test_results_are_kept_part_by_part_and_a_later_call_goes_on(suite, parts, tmp_path, capsys):
    assert run(suite, tmp_path) == 1
    assert parts() == ["good", "bad", "hangs", "other"]
    path = tmp_path / "a-gpu.json"
    found = json.loads(path.read_text())
    status = {name: one["status"] for name, one in found["parts"].items()}
    assert status == {
        "good": "passed", "bad": "failed", "hangs": "timed out", "other": "passed",
        "absent": "skipped",
    }  # fmt: skip
    assert "what went wrong" in found["parts"]["bad"]["output"]
    assert found["parts"]["good"]["data"] == {"benchmarks": []}
    assert found["parts"]["hangs"]["seconds"] < 60
    page = (tmp_path / "a-gpu.md").read_text()
    assert "| bad | failed |" in page and "a program that is nowhere is not on the PATH" in page

    assert run(suite, tmp_path, "--parts", "good,bad") == 1  # only what has not passed
    assert parts()[4:] == ["bad"]
    assert run(suite, tmp_path, "--parts", "good", "--again") == 0
    assert parts()[5:] == ["good"]
    assert run(suite, tmp_path, "--parts", "o*") == 0 and len(parts()) == 6
    capsys.readouterr()
    assert run(suite, tmp_path, "--list") == 0
    assert "bad: failed" in capsys.readouterr().out


def test_other_sources_begin_anew(suite, parts, tmp_path, monkeypatch):
    run(suite, tmp_path, "--parts", "good")
    known = suite.about(True)
    monkeypatch.setattr(suite, "about", lambda tiny: {**known, "commit": "another"})
    run(suite, tmp_path, "--parts", "good")
    assert parts() == ["good"]
    monkeypatch.setattr(suite, "about", lambda tiny: {**known, "sources": "others"})
    run(suite, tmp_path, "--parts", "good")
    assert parts() == ["good", "good"]


def test_the_time_is_kept(suite, parts, tmp_path):
    assert run(suite, tmp_path, "--minutes", "0", "--parts", "good") == 0
    assert parts() == []


def test_dry_run_needs_no_gpu(suite, capsys, tmp_path):
    assert suite.main(["--dry-run", "--wheels", str(tmp_path), "--results", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.partition(":")[0] for line in lines]
    assert names[:5] == ["wheels", "build", "tests-ops", "tests-engine", "memory"]
    assert {f"bench-{m}-batch{b}-{mode}" for m in ("sd15", "sdxl") for b in (1, 4, 8)
            for mode in ("eager", "compiled", "graphs")} <= set(names)  # fmt: skip
    assert "compute-sanitizer" in (PATH.parent / "check_memory.sh").read_text()
    assert not list(tmp_path.iterdir())
    assert suite.main(["--dry-run", "--parts", "nothing"]) == 2


def test_a_bench_is_a_table(suite):
    timing = {"p20": 1.0, "p50": 2.0, "p80": 3.0}
    against = {"loop": 2.5, "arrived": 0.9}
    row = {
        "name": "fast", "steps": 10, "mode": "compiled", "loop": timing, "against": against,
        "against_eager": None, "peak_bytes": 2**21, "launches": None,
    }  # fmt: skip
    line = suite.bench_table({"rows": [row]})[-1]
    assert line == "| fast, 10 steps, compiled | 2 [1, 3] | 2.50x | 90% |  | 2 |  |"


@pytest.mark.slow
def test_the_tiny_suite_runs_on_a_cpu(suite, tmp_path):
    """pytest and `hgc bench` as the suite calls them."""
    assert suite.main(["--tiny", "--results", str(tmp_path)]) == 0
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    status = {name: one["status"] for name, one in found["parts"].items()}
    assert status == {
        "tests-collected": "passed", "bench-testbed": "passed", "memcheck": "skipped"
    }  # fmt: skip
    assert (tmp_path / "charts" / "bench-testbed.png").exists()
    assert "exact, 2 steps, eager" in next(tmp_path.glob("*.md")).read_text()
