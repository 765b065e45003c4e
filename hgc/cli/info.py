"""``hgc info``."""

from __future__ import annotations

import importlib.metadata
import platform

from rich.table import Table
from rich.text import Text

from hgc.cli.console import console

__all__ = ["run"]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def run() -> None:
    """Print versions, the state of diffusers' sources, and the ops with their backends."""
    import torch

    import hgc
    import hgc_kernels
    from hgc.models.supported import untested

    out = console()
    versions = Table(title="versions", title_justify="left", show_header=False)
    versions.add_row("hgc", hgc.__version__)
    versions.add_row("python", platform.python_version())
    versions.add_row("platform", f"{platform.system()} {platform.release()} {platform.machine()}")
    versions.add_row("torch", torch.__version__)
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions.add_row("GPUs", ", ".join(devices) or "none")
    for name in ("diffusers", "transformers", "triton"):
        versions.add_row(name, _version(name))
    out.print(versions)
    said = untested()
    for what in said.values():
        out.print(Text(what), style="yellow")
    if not said:
        out.print("torch and diffusers are releases that hgc was tested with")

    ops = Table(title="ops", title_justify="left")
    for head in ("op", "device", "backend", "why"):
        ops.add_column(head)
    for name, chosen in hgc_kernels.backends().items():
        for device, (backend, why) in chosen.items():
            ops.add_row(name, device, backend, Text(why))
    out.print(ops)

    build = hgc_kernels.build_info()
    built = Table(title="build", title_justify="left", show_header=False)
    for device, state in build["libraries"].items():
        built.add_row(f"{device} library", Text(str(state)))
    built.add_row("CPU vectors", Text(str(build["vector_set"])))
    for name, value in build["native"].items():
        built.add_row(str(name), Text(str(value)))
    kernels = build["kernels"]
    if isinstance(kernels, str):
        built.add_row("CUDA kernels", Text(kernels))
    out.print(built)
    if isinstance(kernels, str):
        return
    table = Table(title="CUDA kernels", title_justify="left")
    for head in ("kernel", "registers", "shared bytes", "local bytes", "max threads"):
        table.add_column(head)
    for kernel in kernels:
        table.add_row(Text(kernel["name"]), *(str(value) for value in list(kernel.values())[1:]))
    out.print(table)
