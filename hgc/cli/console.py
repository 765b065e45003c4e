"""How the commands talk: tables to stdout, progress and errors to stderr, one line an error."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from hgc.planning.config import Config

__all__ = [
    "CliError",
    "as_usage",
    "console",
    "needs",
    "parse_size",
    "progress",
    "quiet_libraries",
    "read_config",
    "reports_errors",
    "split",
    "tera",
    "writable",
]

# Wide enough for every table of the commands, where no terminal says how wide it is.
_PIPED_WIDTH = 200
_MODULES = {
    "transformers": "transformers",
    "PIL": "Pillow",
    "skimage": "scikit-image",
    "torchmetrics": "torchmetrics",
    "matplotlib": "matplotlib",
}


class CliError(Exception):
    """What a command was asked cannot be done; the message is one line."""


def console() -> Console:
    """The console of stdout."""
    made = Console(highlight=False, markup=False)
    if made.is_terminal:
        return made
    return Console(highlight=False, markup=False, width=_PIPED_WIDTH)


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with what a user can put right said in one line, and exit code 2."""
    from hgc.evaluation.models import ModelError
    from hgc.planning.config import ConfigError

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (CliError, ConfigError, ModelError) as error:
            typer.echo(f"hgc: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("hgc: interrupted", err=True)
            raise typer.Exit(130) from None

    return run


@contextlib.contextmanager
def as_usage(*errors: type[Exception]) -> Iterator[None]:
    """Errors of these classes, raised within, are the user's to put right."""
    try:
        yield
    except errors as error:
        raise CliError(str(error)) from error


def needs(command: str, *modules: str) -> None:
    """Raise CliError naming the extra where one of ``modules`` is not installed."""
    missing = [_MODULES[m] for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        raise CliError(
            f"hgc {command} needs {', '.join(missing)}, which the demo extra installs: "
            'pip install "hybrid-grained-cache[demo]" (in a checkout: pip install ".[demo]")'
        )


def writable(path: Path, *, folder: bool = False) -> Path:
    """``path`` as a place to write to, checked before the work is done that ends up there."""
    try:
        if folder:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / ".hgc-writable"
            probe.touch()
            probe.unlink()
            return path
        existed = path.exists()
        with path.open("a"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise CliError(f"cannot write to {path}: {error.strerror}") from None
    return path


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """(height, width) of "512" or "512x768"; (None, None) of None."""
    if text is None:
        return None, None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise CliError(f"--size must be pixels like 512 or 512x768 (height x width); got {text!r}")
    return int(parts[0]), int(parts[-1])


def read_config(name: str) -> Config:
    """The preset ``name``, or the configuration in a JSON file."""
    from hgc.planning.config import Config, ConfigError

    try:
        return Config.of(name)
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror}") from None


def tera(macs: int) -> str:
    """MACs in T, or in G where they are few."""
    return f"{macs / 1e12:.2f}T" if macs >= 1e11 else f"{macs / 1e9:.2f}G"


def split(values: Sequence[str] | str) -> list[str]:
    """Names given one by one, or with commas between them."""
    texts = [values] if isinstance(values, str) else values
    return [name.strip() for text in texts for name in text.split(",") if name.strip()]


def quiet_libraries() -> None:
    """Keep the notices of the libraries underneath, which are not about hgc, off the screen."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    if importlib.util.find_spec("transformers") is not None:
        from transformers.utils import logging

        logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, as a function of (label, done, total)."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(file=sys.stderr),
        transient=True,
    )
    with bar:
        task = bar.add_task("starting", total=None)

        def show(label: str, done: int, total: int) -> None:
            bar.update(task, description=label, completed=done, total=total)

        yield show
