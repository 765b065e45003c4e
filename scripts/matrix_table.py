"""Writes one row of scripts/check_matrix.sh into "Releases" of docs/compatibility.md.

    python scripts/matrix_table.py FOLDER

Run with the Python of the row's environment. The folder's name is TORCH-DIFFUSERS, and it holds one
JUnit file for each part that was run.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from measured import section, table, write_section

PAGE = Path(__file__).resolve().parent.parent / "docs" / "compatibility.md"
NAME = "releases"
PARTS = ("ops", "compile", "exact", "preset")
HEADER = ("torch", "diffusers", "Python", "Triton", "transformers", *PARTS)
TEXT = """## Releases

Installed from this checkout beside these releases, and tested: the **ops** (CPU, and Triton's
kernels in its interpreter), the **compile**d evaluations, **exact** and uninstall bit for bit, and
the **preset** `paper` on the testbed. `scripts/check_matrix.sh` names the rows; one that is not
here was not run to its end. With a release outside of {ranges} `hgc.install` warns.
"""


def outcome(path: Path) -> str:
    """What a JUnit file says: how many tests passed, and were skipped."""
    if not path.exists():
        return "**fails**"
    suite = ElementTree.parse(path).getroot().find("testsuite")
    assert suite is not None
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    if count["failures"] or count["errors"] or not count["tests"]:
        return "**fails**"
    skipped = count["skipped"]
    passed = f"{count['tests'] - skipped} pass"
    return f"{passed}, {skipped} skipped" if skipped else passed


def version(name: str) -> str:
    """Of an installed package, without the local part."""
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "-"


def main(folder: Path) -> None:
    """Put the row into its place between those that are there."""
    torch, _, diffusers = folder.name.partition("-")
    rows = {}
    for line in section(NAME, PAGE).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and cells[0][0].isdigit():
            rows[cells[0], cells[1]] = cells
    rows[torch, diffusers] = [
        torch, diffusers, ".".join(platform.python_version_tuple()[:2]), version("triton"),
        version("transformers"), *(outcome(folder / f"{part}.xml") for part in PARTS),
    ]  # fmt: skip
    order = sorted(rows, key=lambda key: [int(n) for v in key for n in re.findall(r"\d+", v)])
    ranges = re.findall(
        r'"((?:torch|diffusers)[<>].*?)"', (PAGE.parent.parent / "pyproject.toml").read_text()
    )
    text = TEXT.format(ranges=" and ".join(f"`{r}`" for r in ranges))
    text += "\n" + table(HEADER, [rows[key] for key in order])
    write_section(NAME, "scripts/check_matrix.sh", text, PAGE)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
