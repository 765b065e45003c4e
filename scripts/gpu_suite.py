"""Everything that needs a GPU, in nine minutes, on a machine without a network.

    scripts/gpu_carry.sh carry                         # here: what has to be carried there
    python scripts/gpu_suite.py --carried carry --results out --seconds 540      # there: one call
    python scripts/gpu_suite.py --dry-run              # the parts and their commands
    python scripts/gpu_suite.py --tiny --results out   # every part, so small that a CPU runs it

Parts come in the order of worth; those that check run side by side, those that time run alone.
Results are written to `<results>/<gpu>.json` and `.md` after every part. The suite ends at once
where the CUDA library is not loaded: all that follows would measure the reference.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_HERE = "|".join(map(re.escape, (str(ROOT), f"{sys.prefix}/bin/")))
_OF_MACHINE = re.compile(rf"/\S*/(?:site-packages|hgc-site-\w+)/|(?:{_HERE})/?")
TAIL = 6000  # characters of a part's output that are kept
CALL = "python scripts/gpu_suite.py --carried carry --results out --seconds 540"


@dataclasses.dataclass(frozen=True)
class Part:
    """One process of the suite.

    Attributes:
        name: In results.
        command: Run in the repository's root; `{out}` stands for a file it may write JSON to,
            `{work}` for a folder that all parts share, `{left}` for the seconds it has.
        cap: Seconds it may take, unless a few parts were asked for.
        tiny: What makes the command one for a CPU.
        beside: It checks and does not time: it runs beside its neighbours that do the same.
    """

    name: str
    command: tuple[str, ...]
    cap: float
    tiny: tuple[str, ...] = ("--tiny",)
    beside: bool = False


def parts(pipelines: str) -> list[Part]:
    """All parts. pipelines: those of benchmarks/gpu.py, all where it is empty."""
    python = sys.executable
    collect = ("--collect-only",)
    test = (python, "-m", "pytest", "-v", "--tb=short", "-m", "gpu", "-p", "no:cacheprovider")
    ops, engine = "tests/kernels/test_gpu.py", "tests/test_engine_gpu.py"
    memcheck = ("sh", "scripts/check_memory.sh", "memcheck")
    chosen = "((gather or group_norm) and (odd or mixed)) or (attention and primes-fp16)"
    compiled = "compiled and torch.float16"
    goals = (python, "benchmarks/ops/gpu_goals.py")
    whole = (python, "benchmarks/gpu.py")
    macs, left = "{work}/macs.json", ("--seconds", "{left}", "--parts", pipelines)
    timed = (*whole, "--macs", macs, "--json", "{out}", *left)
    return [
        Part("info", (*goals, "--ceilings", "{out}"), 60),
        Part("tests-ops", (*test, "-n", "8", ops), 150, collect, True),
        Part("tests-engine", (*test, "-n", "8", engine, "-k", "not compiled"), 200, collect, True),
        Part("memcheck", (*memcheck, chosen), 150, (), True),
        Part("tests-compiled", (*test, "-n", "3", engine, "-k", compiled), 200, collect, True),
        Part("macs", (*whole, "--count", macs), 110, beside=True),
        Part("ops", (*goals, "--json", "{out}"), 60),
        Part("pipelines", timed, 330),
    ]


def unpack(carried: Path) -> None:
    """Put the kernels where the source tree looks for them, and the wheels on the path."""
    shutil.copytree(carried / "hgc_kernels", ROOT / "hgc_kernels", dirs_exist_ok=True)
    site = tempfile.mkdtemp(prefix="hgc-site-")
    install = ("install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", site)
    wheels = map(str, sorted((carried / "wheels").glob("*.whl")))
    subprocess.run((sys.executable, "-m", "pip", *install, *wheels), check=True)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), site])


def about(tiny: bool) -> dict[str, object]:
    """What a figure must be quoted with. Asked of a process of its own, so that none of the GPU's
    memory is held here."""
    code = (
        "import json, platform, torch; "
        "print(json.dumps({'torch': torch.__version__, 'cuda': torch.version.cuda, "
        "'python': platform.python_version(), 'device': torch.cuda.is_available() "
        "and torch.cuda.get_device_name(0)}))"
    )
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(asked.stdout.splitlines()[-1])
    if not (found["device"] or tiny):
        raise SystemExit("gpu_suite: torch sees no CUDA GPU; --dry-run and --tiny need none")
    found["device"] = found["device"] or "cpu tiny"
    head = ("git", "rev-parse", "--short=12", "HEAD")
    done = subprocess.run(head, cwd=ROOT, capture_output=True, text=True)
    # a copied tree may have no git to ask, or the wrong one
    found["commit"] = os.environ.get("HGC_COMMIT") or done.stdout.strip() or "unknown"
    return found


class Running:
    """A part that was started."""

    def __init__(self, part: Part, tiny: bool, work: Path, left: float) -> None:
        self.part, self._out = part, work / f"{part.name}.json"
        self._log = (work / f"{part.name}.log").open("w+", errors="replace")
        self._cap, self._start = min(part.cap, left), time.monotonic()
        # a part that has an eye on its time begins nothing in its last quarter
        places = {"{out}": str(self._out), "{left}": f"{0.75 * self._cap:.0f}"}
        self.command = (*part.command, *(part.tiny if tiny else ()))
        # a session of its own, so that a part that hangs is ended with all it started
        self._process = subprocess.Popen(
            [places.get(a, a.replace("{work}", str(work))) for a in self.command], cwd=ROOT,
            stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def ended(self) -> dict[str, object] | None:
        """What became of it, with the JSON it wrote; None while it runs."""
        seconds, code = time.monotonic() - self._start, self._process.poll()
        if code is None and seconds < self._cap:
            return None
        self.kill()
        self._log.seek(0)
        found: dict[str, object] = {  # 127: a program is not there
            "status": {None: "timed out", 0: "passed", 127: "skipped"}.get(code, "failed"),
            "seconds": round(seconds, 1),
            "command": " ".join(["python3" if c == sys.executable else c for c in self.command]),
            "output": _OF_MACHINE.sub("", self._log.read())[-TAIL:],
        }
        if self._out.exists():  # of a part that was ended too: it writes as it goes
            found["data"] = json.loads(self._out.read_text())
        return found

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def markdown(results: dict) -> str:
    """The results as a page: what ran, then each part's tables."""
    known = results["about"]
    versions = f"torch {known['torch']}, CUDA {known['cuda']}, Python {known['python']}"
    written = f"commit {known['commit']}. Written by `python scripts/gpu_suite.py`."
    lines = [f"# {known['device']}", "", f"{versions}, {written}", ""]
    lines += ["| part | result | seconds |", "|---|---|---:|"]
    for name, part in results["parts"].items():
        lines.append(f"| {name} | {part['status']} | {part['seconds']} |")
    for name, part in results["parts"].items():
        data = part.get("data", {})
        for title, one in data.get("pipelines", {name: data}).items():
            text = one.get("markdown") or one.get("error")
            if text:
                lines += ["", f"## {title}", "", text.rstrip()]
    return "\n".join(lines) + "\n"


def save(results: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", str(results["about"]["device"]).lower()).strip("-")
    texts = {".json": json.dumps(results, indent=1) + "\n", ".md": markdown(results)}
    for suffix, text in texts.items():
        (temporary := folder / f"{name}{suffix}.part").write_text(text)
        temporary.replace(folder / f"{name}{suffix}")  # whole or not at all


def groups(of: list[Part]) -> Iterator[list[Part]]:
    """Neighbours that may run side by side, together; the others alone."""
    for beside, found in itertools.groupby(of, lambda part: part.beside):
        group = list(found)
        yield from [group] if beside else [[part] for part in group]


def run(group: list[Part], tiny: bool, work: Path, end: float) -> Iterator[tuple[Part, dict]]:
    """Each part of a group with what became of it, as they end."""
    running = [Running(part, tiny, work, end - time.monotonic()) for part in group]
    try:
        while running:
            time.sleep(0.1)
            for one in list(running):
                found = one.ended()
                if found is not None:
                    running.remove(one)
                    yield one.part, found
    finally:
        for one in running:
            one.kill()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--carried", type=Path, metavar="FOLDER", help="what scripts/gpu_carry.sh made"
    )
    parser.add_argument("--results", type=Path, help="the folder results are written to")
    parser.add_argument("--parts", default="", help="names, with commas between; default: all")
    parser.add_argument("--pipelines", default="", help="parts of benchmarks/gpu.py; default: all")
    parser.add_argument("--seconds", type=float, default=540.0, help="the end of the suite")
    parser.add_argument("--dry-run", action="store_true", help="print the parts' commands")
    parser.add_argument("--tiny", action="store_true", help="every part small, on a CPU")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    share = {"cap": options.seconds} if options.parts else {}  # a few may take all the time
    known = {p.name: dataclasses.replace(p, **share) for p in parts(options.pipelines)}
    chosen = options.parts.split(",") if options.parts else list(known)
    if unknown := set(chosen) - set(known):
        parser.error(f"--parts: no {', '.join(sorted(unknown))}; parts: {', '.join(known)}")
    if options.dry_run:
        print(f"carry the tracked files and what scripts/gpu_carry.sh made; there: {CALL}")
        for name in chosen:
            print(f"{name} (at most {known[name].cap:.0f} s): {' '.join(known[name].command)}")
        return 0
    if options.results is None:
        parser.error("--results: name the folder that results are written to")
    if options.carried:
        unpack(options.carried)
    results: dict = {"about": about(options.tiny), "parts": {}}
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as work:
        for group in groups([known[name] for name in chosen]):
            if end - time.monotonic() < 1 or "info" in failed:
                print(f"not run: {', '.join(part.name for part in group)}")
                continue
            for part, found in run(group, options.tiny, Path(work), end):
                results["parts"][part.name] = found
                save(results, options.results)
                print(f"{part.name}: {found['status']}, {found['seconds']} s", flush=True)
                if found["status"] not in ("passed", "skipped"):
                    failed.append(part.name)
                    print(found["output"], flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
