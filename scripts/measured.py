"""Generated sections of docs/measured.md: each between two markers, with the command that writes
it.
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


def write_section(name: str, command: str, text: str) -> None:
    """Put `text` into the section `name` of docs/measured.md, at the end if there is none yet."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    block = f"{begin}\n{text.strip()}\n\nWritten by `{command}`.\n{end}"
    old = MEASURED.read_text() if MEASURED.exists() else "# Measured\n"
    if begin in old:
        head, _, rest = old.partition(begin)
        _, _, tail = rest.partition(end)
        new = head + block + tail
    else:
        new = old.rstrip() + "\n\n" + block + "\n"
    MEASURED.parent.mkdir(exist_ok=True)
    MEASURED.write_text(new)
