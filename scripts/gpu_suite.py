"""Everything that needs a GPU, in parts of a few minutes, on a machine without network.

    python scripts/gpu_suite.py                    # all parts that have not passed yet
    python scripts/gpu_suite.py --list             # the parts and what became of them
    python scripts/gpu_suite.py --parts 'bench-sd15-*' --again
    python scripts/gpu_suite.py --minutes 9        # start no part after nine minutes
    python scripts/gpu_suite.py --wheels DIR       # install from these wheels first
    python scripts/gpu_suite.py --dry-run          # print the commands
    python scripts/gpu_suite.py --tiny             # on a CPU, tiny: does the suite itself work?

Each part is a process. After each one the results are written to benchmarks/results/<gpu>.json and
.md, and a later call goes on where the last one stopped: what has passed with the same sources,
torch and device is not run again. Such a machine needs torch with CUDA, a CUDA toolkit, cmake,
ninja, pytest and pytest-benchmark; what else is missing (diffusers, typer, rich) is carried in as
wheels.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PASSED, FAILED, TIMED_OUT, SKIPPED = "passed", "failed", "timed out", "skipped"
TAIL = 4000  # characters of a part's output that are kept


@dataclasses.dataclass(frozen=True)
class Part:
    """One process of the suite.

    command: what is run in the repository's root; `{out}` stands for a file it may write JSON to,
    and `{chart}` for a picture. needs: a program without which the part is skipped.
    """

    name: str
    command: tuple[str, ...]
    needs: str = ""


def bench_part(name: str, *arguments: str) -> Part:
    main = "from hgc.cli import main; main()"
    files = ("--json", "{out}", "--chart", "{chart}")
    return Part(f"bench-{name}", (sys.executable, "-c", main, "bench", *arguments, *files))


def pytest_part(name: str, *arguments: str) -> Part:
    return Part(name, (sys.executable, "-m", "pytest", "-q", *arguments))


def build_parts(wheels: Path | None) -> list[Part]:
    pip = (sys.executable, "-m", "pip", "install")
    parts = []
    if wheels is not None:
        carried = sorted(str(path) for path in wheels.glob("*.whl"))
        parts.append(Part("wheels", (*pip, "--no-index", "--no-deps", *carried)))
    build = (*pip, "--no-build-isolation", "--no-deps", "--force-reinstall", ".")
    return [*parts, Part("build", build, needs="nvcc")]


def gpu_parts(wheels: Path | None, peers: str) -> list[Part]:
    parts = build_parts(wheels)
    parts += [
        pytest_part("tests-ops", "-m", "gpu", "tests/kernels"),
        pytest_part("tests-engine", "-m", "gpu", "tests/test_engine_gpu.py"),
    ]
    memory = ("env", f"PYTHON={sys.executable}", "sh", "scripts/check_memory.sh")
    parts.append(Part("memory", memory, "compute-sanitizer"))
    for op in ("attend_and_store", "apply_map", "apply_map_project"):
        # before anything is timed; writes hgc_kernels/launch/<gpu>.json, which is to be committed
        tune = (sys.executable, "benchmarks/ops/tune.py", "--ops", op, "--json", "{out}")
        parts.append(Part(f"tune-{op}", tune))
    parts.append(pytest_part("tests-tuned", "-m", "gpu", "tests/kernels/test_gpu.py"))
    for op in ("gather_blocks", "scatter_rows", "attend_and_store", "apply_map"):
        parts.append(
            pytest_part(
                f"ops-{op}", "benchmarks/ops", "--benchmark-only", "-k", f"cuda and {op}",
                "--benchmark-json", "{out}",
            )
        )  # fmt: skip
    for model, steps in (("sd15", 20), ("sdxl", 30)):
        for batch in (1, 4, 8):
            for mode in ("eager", "compiled", "graphs"):
                arguments = [
                    "--model", model, "--device", "cuda", "--dtype", "fp16", "--steps", str(steps),
                    "--batch", str(batch), "--modes", mode, "--fewer-steps",
                    "--presets", "exact,paper,balanced,fast,turbo" if batch == 1 else "paper,fast",
                    "--repeats", "5" if model == "sd15" else "3",
                ]  # fmt: skip
                if peers and mode == "eager":
                    arguments += ["--peers", peers]
                parts.append(bench_part(f"{model}-batch{batch}-{mode}", *arguments))
    return parts


def tiny_parts() -> list[Part]:
    return [
        pytest_part("tests-collected", "-m", "gpu", "--collect-only", "tests/test_engine_gpu.py"),
        bench_part(
            "testbed", "--model", "testbed", "--size", "64", "--steps", "2", "--repeats", "1",
            "--presets", "exact",
        ),
        Part("memcheck", ("compute-sanitizer", "--version"), "a program that is nowhere"),
    ]  # fmt: skip


def sources() -> str:
    """A hash of everything that is measured; a copied tree has no git to ask."""
    digest = hashlib.sha256()
    for folder in ("hgc", "hgc_kernels", "csrc", "tests", "benchmarks", "scripts"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".cpp", ".h", ".sh") and path.is_file():
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def about(tiny: bool) -> dict[str, object]:
    """What a figure must be quoted with. Asked of a process of its own, so that none of the GPU's
    memory is held here."""
    code = (
        "import json, torch; cuda = torch.cuda.is_available(); "
        "print(json.dumps({'torch': torch.__version__, 'cuda': torch.version.cuda, "
        "'device': torch.cuda.get_device_name(0) if cuda else None, "
        "'memory_bytes': torch.cuda.get_device_properties(0).total_memory if cuda else None}))"
    )
    asked = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    found: dict[str, object] = json.loads(asked.stdout.splitlines()[-1])
    if found["device"] is None:
        if not tiny:
            raise SystemExit("gpu_suite: torch sees no CUDA GPU; --dry-run and --tiny need none")
        found["device"] = f"cpu {platform.machine()} tiny"
    found["commit"], found["sources"] = commit(), sources()
    found["python"] = platform.python_version()
    return found


def result_paths(device: str, folder: Path) -> tuple[Path, Path]:
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return folder / f"{name}.json", folder / f"{name}.md"


def run_part(part: Part, timeout_s: float, folder: Path) -> dict[str, object]:
    """Run a part; what became of it, with the JSON it wrote."""
    if part.needs and shutil.which(part.needs) is None:
        return {"status": SKIPPED, "why": f"{part.needs} is not on the PATH", "seconds": 0.0}
    charts = folder / "charts"
    with tempfile.TemporaryDirectory() as temporary:
        out, chart = Path(temporary, "out.json"), Path(temporary, "chart.png")
        places = {"{out}": str(out), "{chart}": str(chart)}
        command = [places.get(argument, argument) for argument in part.command]
        start = time.monotonic()
        # a session of its own, so that a part that hangs is ended with all it started
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        )  # fmt: skip
        try:
            text, _ = process.communicate(timeout=timeout_s)
            status = PASSED if process.returncode == 0 else FAILED
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, _ = process.communicate()
            status = TIMED_OUT
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        found: dict[str, object] = {
            "status": status,
            "seconds": round(time.monotonic() - start, 1),
            "output": text[-TAIL:],
        }
        if out.exists() and status == PASSED:
            found["data"] = json.loads(out.read_text())
        if chart.exists() and status == PASSED:
            charts.mkdir(parents=True, exist_ok=True)
            shutil.copy(chart, charts / f"{part.name}.png")
        return found


def markdown(results: dict) -> str:
    """The results as a page: what ran, then each benchmark's table."""
    known = results["about"]
    lines = [
        f"# {known['device']}",
        "",
        f"torch {known['torch']}, CUDA {known['cuda']}, Python {known['python']}, commit "
        f"{known['commit']}. Written by `python scripts/gpu_suite.py`.",
        "",
        "| part | result | seconds | |",
        "|---|---|---:|---|",
    ]
    for name, part in results["parts"].items():
        lines.append(f"| {name} | {part['status']} | {part['seconds']} | {part.get('why', '')} |")
    for name, part in results["parts"].items():
        data = part.get("data")
        if not data:
            continue
        lines += ["", f"## {name}", ""]
        if "rows" in data:
            lines += bench_table(data)
        elif "tuned" in data:
            lines += tuned_table(data)
        else:
            lines += ops_table(data)
    return "\n".join(lines) + "\n"


def bench_table(data: dict) -> list[str]:
    lines = [
        "| | loop s, p50 [p20, p80] | over its mode | arrived | over eager | peak MiB | launches |",
        "|---|" + "---:|" * 6,
    ]
    for row in data["rows"]:
        own, eager, loop = row["against"], row["against_eager"], row["loop"]
        arrived = "" if own is None or own["arrived"] is None else f"{own['arrived']:.0%}"
        peak, launches = row["peak_bytes"], row["launches"]
        cells = [
            f"{row['name']}, {row['steps']} steps, {row['mode']}",
            f"{loop['p50']:.4g} [{loop['p20']:.4g}, {loop['p80']:.4g}]",
            "" if own is None else f"{own['loop']:.2f}x",
            arrived,
            "" if eager is None else f"{eager['loop']:.2f}x",
            "" if peak is None else f"{peak / 2**20:.0f}",
            "" if launches is None else f"{launches:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def tuned_table(data: dict) -> list[str]:
    lines = ["| op | calls | configuration | time over the heuristic's |", "|---|---|---|---:|"]
    for op, buckets in data["tuned"].items():
        for bucket, one in buckets.items():
            fields = ", ".join(f"{name} {value}" for name, value in one["fields"].items())
            lines.append(f"| {op} | {bucket} | {fields} | {one['over_heuristic']:.2f} |")
    return lines


def ops_table(data: dict) -> list[str]:
    lines = ["| benchmark | median us | GB/s |", "|---|---:|---:|"]
    for one in data.get("benchmarks", []):
        rate = one.get("extra_info", {}).get("GB/s", "")
        rate = f"{rate:.0f}" if isinstance(rate, (int, float)) else rate
        lines.append(f"| {one['name']} | {one['stats']['median'] * 1e6:.1f} | {rate} |")
    return lines


def save(results: dict, paths: tuple[Path, Path]) -> None:
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    texts = (json.dumps(results, indent=1) + "\n", markdown(results))
    for path, text in zip(paths, texts, strict=True):
        # whole or not at all, whenever this process is ended
        temporary = path.with_suffix(path.suffix + ".part")
        temporary.write_text(text)
        temporary.replace(path)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="*", help="names, with wildcards and commas between")
    parser.add_argument("--again", action="store_true", help="also what has passed")
    parser.add_argument("--list", action="store_true", help="the parts, and what became of them")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    parser.add_argument("--tiny", action="store_true", help="small parts that run on a CPU")
    parser.add_argument("--minutes", type=float, help="start no part after so many minutes")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds a part may take")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install first")
    parser.add_argument("--peers", default="", help="deepcache-3, ...: must be installed")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are written")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    parts = tiny_parts() if options.tiny else gpu_parts(options.wheels, options.peers)
    patterns = [pattern.strip() for pattern in options.parts.split(",")]
    parts = [p for p in parts if any(fnmatch.fnmatch(p.name, pattern) for pattern in patterns)]
    if not parts:
        print(f"gpu_suite: no part is called {options.parts!r}; see --list", file=sys.stderr)
        return 2
    if options.dry_run:
        for part in parts:
            print(f"{part.name}: {' '.join(part.command)}")
        return 0
    known = about(options.tiny)
    paths = result_paths(str(known["device"]), options.results)
    results = {"about": known, "parts": {}}
    if paths[0].exists():
        old = json.loads(paths[0].read_text())
        # a commit that changes nothing measured changes no result
        if {**old["about"], "commit": known["commit"]} == known:
            results["parts"] = old["parts"]
    if options.list:
        for part in parts:
            status = results["parts"].get(part.name, {}).get("status", "not run")
            print(f"{part.name}: {status}")
        return 0
    begun = time.monotonic()
    failed = []
    for part in parts:
        if results["parts"].get(part.name, {}).get("status") == PASSED and not options.again:
            continue
        if options.minutes is not None and time.monotonic() - begun > options.minutes * 60:
            print(f"{part.name}: left for the next call")
            continue
        print(f"{part.name} ...", flush=True)
        found = run_part(part, options.timeout, options.results)
        found["command"] = " ".join(part.command)
        results["parts"][part.name] = found
        save(results, paths)
        print(f"{part.name}: {found['status']}, {found['seconds']} s", flush=True)
        if found["status"] in (FAILED, TIMED_OUT):
            failed.append(part.name)
            print(found["output"], file=sys.stderr)
    print(f"results: {paths[0]} and {paths[1]}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
