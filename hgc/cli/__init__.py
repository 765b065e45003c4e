"""The command line ``hgc``."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Entry point of the ``hgc`` command."""
    from hgc.cli.app import app

    app(prog_name="hgc")
