"""``hgc page``."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from hgc.cli.console import CliError, as_usage, console, needs, quiet_libraries
from hgc.cli.evaluate import check_device

__all__ = ["run"]


def run(model: str, controlnet: Sequence[Path], host: str, port: int | None, device: str) -> None:
    """Serve the page until it is interrupted."""
    if importlib.util.find_spec("gradio") is None:
        raise CliError(
            "hgc page needs Gradio, which the page extra installs: "
            'pip install "hybrid-grained-cache[page]" (in a checkout: '
            'pip install -c constraints-page.txt ".[page]")'
        )
    needs("page", "transformers", "PIL", "skimage", "torchmetrics", "matplotlib")
    if controlnet and model == "testbed":
        raise CliError("--controlnet is for --model: the testbed has its own")
    quiet_libraries()
    check_device(device)

    from hgc.page.app import serve
    from hgc.page.studio import Studio

    with as_usage(FileNotFoundError):
        studio = Studio(None if model == "testbed" else Path(model), controlnet, device)
    out = console()
    try:
        serve(studio, host, port, lambda address: out.print(f"hgc page: {address}  (Ctrl+C ends)"))
    except OSError:
        where = "a port from 7860 on" if port is None else f"port {port}"
        raise CliError(f"cannot serve at {host}, {where}: taken, or not to be had") from None
