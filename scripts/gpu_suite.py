"""Everything that needs a GPU, in nine minutes, on a machine without a network.

    python scripts/gpu_suite.py --prepare carry        # here: what has to be carried there
    python scripts/gpu_suite.py --carried carry --results out --seconds 540      # there: one call
    python scripts/gpu_suite.py --dry-run              # the parts and their commands
    python scripts/gpu_suite.py --tiny --results out   # small parts that run on a CPU

`--prepare` is run with that machine's versions of Python and torch: it builds the kernels for its
GPU and fetches the wheels that are missing there. Parts come in the order of worth; those that
check run side by side, those that time run alone. Results are written to `<results>/<gpu>.json` and
`.md` after every part. The suite ends at once where the CUDA library is not loaded, since all that
follows would measure the reference.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TAIL = 6000  # characters of a part's output that are kept
WHEELS = ("diffusers==0.42.1", "DeepCache==0.1.1")
CALL = "python scripts/gpu_suite.py --carried carry --results out --seconds 540"


@dataclasses.dataclass(frozen=True)
class Part:
    """One process of the suite.

    Attributes:
        name: In results.
        command: Run in the repository's root; `{out}` stands for a file it may write JSON to,
            `{work}` for a folder that all parts share, `{left}` for the seconds it has.
        cap: Seconds it may take.
        beside: It checks and does not time: it runs beside its neighbours that do the same.
        needed: Where it fails the suite ends.
    """

    name: str
    command: tuple[str, ...]
    cap: float
    beside: bool = False
    needed: bool = False


def tests(name: str, cap: float, *arguments: str) -> Part:
    command = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider")
    return Part(name, (*command, *arguments), cap, beside=True)


def gpu_parts(chosen: str = "") -> list[Part]:
    memcheck = (
        "env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", "memcheck",
        "--error-exitcode", "9", "--target-processes", "all", sys.executable, "-m", "pytest", "-q",
        "-m", "gpu", "-p", "no:cacheprovider", "tests/kernels/test_gpu.py", "-k",
        "(gather and (odd or mixed)) or (attention and primes and float16)",
    )  # fmt: skip
    pipelines = (
        "benchmarks/gpu.py", "--macs", "{work}/macs.json", "--json", "{out}",
        "--peers", "deepcache-3", "--parts", chosen,
    )  # fmt: skip
    goals = ("benchmarks/ops/gpu_goals.py",)
    python = sys.executable
    return [
        Part("info", (python, *goals, "--ceilings", "{out}"), 60, needed=True),
        tests("tests-ops", 110, "-n", "8", "tests/kernels"),
        tests("tests-engine", 110, "-n", "3", "tests/test_engine_gpu.py", "-k", "not compiled"),
        Part("memcheck", memcheck, 110, beside=True),
        tests("tests-compiled", 150, "-n", "3", "tests/test_engine_gpu.py", "-k",
              "compiled and float16"),
        Part("macs", (python, pipelines[0], "--count", "{work}/macs.json"), 110, beside=True),
        Part("ops", (python, *goals, "--json", "{out}"), 60),
        Part("pipelines", (python, *pipelines, "--seconds", "{left}"), 330),
    ]  # fmt: skip


def tiny_parts() -> list[Part]:
    python = sys.executable
    bench = ("-c", "from hgc.cli import main; main()", "bench", "--model", "testbed", "--size",
             "64", "--steps", "2", "--repeats", "1", "--presets", "exact")  # fmt: skip
    return [
        tests("tests-collected", 300, "--collect-only", "tests/kernels/test_gpu.py",
              "tests/test_engine_gpu.py"),
        Part("bench-testbed", (python, *bench, "--json", "{out}"), 300),
    ]  # fmt: skip


def prepare(folder: Path) -> None:
    """Build the kernels for the GPU and fetch wheels, into `folder`."""
    pip = (sys.executable, "-m", "pip")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "wheels").mkdir(parents=True)
    environment = {"HGC_CUDA_ARCHITECTURES": "90", "HGC_REQUIRE_EXT": "1", **os.environ}
    with tempfile.TemporaryDirectory() as temporary:
        build = (*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", temporary, str(ROOT))
        subprocess.run(build, check=True, env=environment)
        shutil.unpack_archive(next(Path(temporary).glob("*.whl")), temporary, "zip")
        kernels = Path(temporary) / "hgc_kernels"
        shutil.copytree(kernels / "lib", folder / "hgc_kernels" / "lib")
        for native in kernels.glob("_native*"):
            shutil.copy(native, folder / "hgc_kernels")
    fetch = (*pip, "download", "-q", "--no-deps", "--only-binary=:all:", "-d")
    subprocess.run((*fetch, str(folder / "wheels"), *WHEELS), check=True)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"carry the tracked files and {folder} ({size / 2**20:.1f} MiB), then run there:\n{CALL}")


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
        "import json, torch; cuda = torch.cuda.is_available(); "
        "print(json.dumps({'torch': torch.__version__, 'cuda': torch.version.cuda, "
        "'device': torch.cuda.get_device_name(0) if cuda else None}))"
    )
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(asked.stdout.splitlines()[-1])
    if found["device"] is None:
        if not tiny:
            raise SystemExit("gpu_suite: torch sees no CUDA GPU; --dry-run and --tiny need none")
        found["device"] = f"cpu {platform.machine()} tiny"
    head = ("git", "rev-parse", "--short=12", "HEAD")
    done = subprocess.run(head, cwd=ROOT, capture_output=True, text=True)
    found["commit"] = done.stdout.strip() or os.environ.get("HGC_COMMIT", "unknown")
    found["python"] = platform.python_version()
    return found


class Running:
    """A part that was started."""

    def __init__(self, part: Part, work: Path, left: float) -> None:
        self.part, self._out = part, work / f"{part.name}.json"
        self._log = (work / f"{part.name}.log").open("w+", errors="replace")
        self._cap, self._start = min(part.cap, left), time.monotonic()
        # a part that has an eye on its time begins nothing in its last quarter
        places = {"{out}": str(self._out), "{left}": f"{0.75 * self._cap:.0f}"}
        command = [places.get(a, a.replace("{work}", str(work))) for a in part.command]
        self.command = " ".join(part.command)
        # a session of its own, so that a part that hangs is ended with all it started
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def wait(self) -> dict[str, object]:
        """What became of it, with the JSON it wrote."""
        try:
            code = self._process.wait(max(0.1, self._start + self._cap - time.monotonic()))
            status = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._log.seek(0)
        found: dict[str, object] = {
            "status": status,
            "seconds": round(time.monotonic() - self._start, 1),
            "command": self.command,
            "output": self._log.read()[-TAIL:],
        }
        self._log.close()
        if self._out.exists():  # of a part that was ended too: it writes as it goes
            found["data"] = json.loads(self._out.read_text())
        return found


def markdown(results: dict) -> str:
    """The results as a page: what ran, then each part's tables."""
    known = results["about"]
    lines = [
        f"# {known['device']}", "",
        f"torch {known['torch']}, CUDA {known['cuda']}, Python {known['python']}, commit "
        f"{known['commit']}. Written by `python scripts/gpu_suite.py`.", "",
        "| part | result | seconds |", "|---|---|---:|",
    ]  # fmt: skip
    for name, part in results["parts"].items():
        lines.append(f"| {name} | {part['status']} | {part['seconds']} |")
    for name, part in results["parts"].items():
        data = part.get("data", {})
        tables = data.get("pipelines", {name: data})
        for title, one in tables.items():
            if "markdown" in one:
                lines += ["", f"## {title}", "", one["markdown"].rstrip()]
            elif "error" in one:
                lines += ["", f"## {title}", "", one["error"]]
    return "\n".join(lines) + "\n"


def save(results: dict, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", str(results["about"]["device"]).lower()).strip("-")
    texts = {".json": json.dumps(results, indent=1) + "\n", ".md": markdown(results)}
    for suffix, text in texts.items():
        temporary = folder / f"{name}{suffix}.part"
        temporary.write_text(text)
        temporary.replace(folder / f"{name}{suffix}")  # whole or not at all
    return folder / f"{name}.md"


def groups(parts: list[Part]) -> Iterator[list[Part]]:
    """Neighbours that may run side by side, together; the others alone."""
    group: list[Part] = []
    for part in parts:
        if group and not (part.beside and group[-1].beside):
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="build what is carried")
    parser.add_argument("--carried", type=Path, metavar="FOLDER", help="what --prepare built")
    parser.add_argument("--results", type=Path, help="the folder results are written to")
    parser.add_argument("--parts", default="", help="names, with commas between; default: all")
    parser.add_argument("--pipelines", default="", help="parts of benchmarks/gpu.py; default: all")
    parser.add_argument("--seconds", type=float, default=540.0, help="the end of the suite")
    parser.add_argument("--dry-run", action="store_true", help="print the parts' commands")
    parser.add_argument("--tiny", action="store_true", help="small parts that run on a CPU")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    if options.prepare:
        prepare(options.prepare)
        return 0
    parts = tiny_parts() if options.tiny else gpu_parts(options.pipelines)
    names = [part.name for part in parts]
    chosen = options.parts.split(",") if options.parts else names
    if unknown := set(chosen) - set(names):
        parser.error(f"--parts: no {', '.join(sorted(unknown))}; parts: {', '.join(names)}")
    parts = [part for part in parts if part.name in chosen]
    if options.dry_run:
        print(f"carry the tracked files and what --prepare wrote; there: {CALL}")
        for part in parts:
            print(f"{part.name} (at most {part.cap:.0f} s): {' '.join(part.command)}")
        return 0
    if options.results is None:
        parser.error("--results: name the folder that results are written to")
    if options.carried:
        unpack(options.carried)
    results = {"about": about(options.tiny), "parts": {}}
    failed = False
    with tempfile.TemporaryDirectory() as work:
        for group in groups(parts):
            left = end - time.monotonic()
            if left < 5:
                print(f"{group[0].name}: no time is left")
                break
            for running in [Running(part, Path(work), left) for part in group]:
                found = running.wait()
                name = running.part.name
                results["parts"][name] = found
                page = save(results, options.results)
                print(f"{name}: {found['status']}, {found['seconds']} s", flush=True)
                if found["status"] != "passed":
                    failed = True
                    print(found["output"], flush=True)
                    if running.part.needed:
                        return 1
    print(f"results: {page}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
