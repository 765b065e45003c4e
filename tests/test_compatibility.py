"""Every row of docs/compatibility.md, and that the page is what the rows gave.

All rows take about four minutes on one core; `pytest -m "slow or not slow"
tests/test_compatibility.py` runs them, and `python scripts/write_compatibility.py` writes the page.
"""

from __future__ import annotations

import re
from pathlib import Path

import diffusers
import pytest

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
if f"diffusers {diffusers.__version__}\n" not in PAGE.read_text():
    # others lack some of these classes; scripts/check_matrix.sh tests them
    pytest.skip(
        f"the rows of docs/compatibility.md are not of diffusers {diffusers.__version__}",
        allow_module_level=True,
    )

import compatibility  # noqa: E402


def _parameters():
    for row in compatibility.ROWS:
        marks = [pytest.mark.slow] if row.slow else []
        yield pytest.param(row, id=f"{row.group}: {row.name}", marks=marks)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", _parameters())
def test_row(row):
    found = compatibility.outcome(row)
    assert found.good, found
    cells = compatibility.cells(row, found)
    written = _written()[row.group, row.name]
    # the measured distance may differ in its last digits between processors
    number = re.compile(r"\d+\.\d+ (?=without|\()")
    assert [number.sub("#", c) for c in cells] == [number.sub("#", c) for c in written]


def _written() -> dict[tuple[str, str], list[str]]:
    """The lines of the page: the cells after the first, by heading and first cell."""
    found, group = {}, ""
    # scripts/check_matrix.sh writes what follows
    for line in PAGE.read_text().partition("<!-- begin releases -->")[0].splitlines():
        if line.startswith("## "):
            group = line.removeprefix("## ")
        elif line.startswith("| ") and not line.startswith(("| pipeline", "|--")):
            first, *cells = [c.strip() for c in line.strip("|").split(" | ")]
            found[group, first] = cells
    return found


def test_the_page_has_the_rows_of_the_table():
    """No line by hand, none left out, in their order."""
    assert list(_written()) == [(row.group, row.name) for row in compatibility.ROWS]


def test_no_cell_of_the_page_says_that_something_failed():
    assert not [line for line in PAGE.read_text().splitlines() if compatibility.FAILED in line]


def test_an_outcome_can_fail():
    """A row whose request ignores what it says must not pass: the table is no rubber stamp."""
    row = compatibility.Row(
        "", "", compatibility.sd,
        plain=lambda pipe, seed: compatibility.call(pipe, seed) * 1.001,
    )  # fmt: skip
    assert not compatibility.outcome(row).shallow
    row = compatibility.Row("", "", compatibility.sd, refuses="no such words")
    assert not compatibility.outcome(row).good
