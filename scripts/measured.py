"""Generated sections of docs/measured.md and of other pages: each between two markers, with the
command that writes it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

MEASURED = Path(__file__).resolve().parent.parent / "docs" / "measured.md"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)


def commit() -> str:
    """The short hash of the checkout's commit, or "unknown" outside one."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=MEASURED.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def section(name: str, page: Path = MEASURED) -> str:
    """The section `name` of a page with its markers; empty where there is none."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    _, found, rest = (page.read_text() if page.exists() else "").partition(begin)
    return found and found + rest.partition(end)[0] + end


def write_section(name: str, command: str, text: str, page: Path = MEASURED) -> None:
    """Put `text` into the section `name` of a page, at the end if there is none yet."""
    block = f"<!-- begin {name} -->\n{text.strip()}\n\nWritten by `{command}`.\n<!-- end {name} -->"
    text = page.read_text() if page.exists() else "# Measured\n"
    old = section(name, page)
    page.parent.mkdir(exist_ok=True)
    page.write_text(text.replace(old, block) if old else text.rstrip() + "\n\n" + block + "\n")
