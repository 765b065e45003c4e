"""What a picture is made from, checked: an item of the input is good, or has a reason why not."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import math
import os
import reprlib
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "FIELDS",
    "GO_ON",
    "RESIZE",
    "Bad",
    "BadItem",
    "GenerateError",
    "Item",
    "Picture",
    "id_of",
    "item_of",
    "noise_seed",
    "opened",
]

FIELDS = ("id", "text", "condition", "negative_prompt", "scale", "seed")
RESIZE = ("nearest", "bicubic")
# What errors in the middle of a run end with.
GO_ON = "What is finished is kept: the same command goes on"
_LARGEST_SEED = 2**63 - 1
_SAID = 200  # characters of what others wrote
# Of one item; any other error of the system (a share that went away) is no item's fault.
_NOT_THERE = (
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG,
    errno.ELOOP, errno.EINVAL,
)  # fmt: skip
# Pillow converts these to RGB by cutting off what lies above 255.
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


class GenerateError(ValueError):
    """A run cannot begin or go on; the message says what to put right."""


class BadItem(Exception):
    """No picture can be made of one item; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Item:
    """A condition and a text.

    Attributes:
        number: Place in the input, from 0.
        id: The user's name for it; unique.
        text: The prompt.
        condition: What the ControlNet sees: a file, or a picture file's bytes.
        negative_prompt: None: empty.
        scale: Of the ControlNet.
        seed: In place of the run's; None: the run's.
    """

    number: int
    id: str
    text: str
    condition: Path | bytes
    negative_prompt: str | None = None
    scale: float = 1.0
    seed: int | None = None


@dataclasses.dataclass(frozen=True)
class Bad:
    """An item of which no picture can be made. ``id``: None where it has none."""

    number: int
    id: str | None
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """One picture to make. ``seed``: for ``torch.Generator().manual_seed``."""

    item: Item
    index: int
    condition: Image.Image
    seed: int

    @property
    def key(self) -> str:
        """Its name in files: never the id, which may be any text."""
        return f"{self.item.number:09d}_{self.index}"


def noise_seed(run_seed: int, item: Item, index: int) -> int:
    """Seed of the noise of picture ``index`` of ``item``: wherever it stands, whatever is made
    beside it."""
    seed = run_seed if item.seed is None else item.seed
    digest = hashlib.sha256(f"{seed} {index} {item.id}".encode()).digest()
    return int.from_bytes(digest[:8], "little") & _LARGEST_SEED


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _said(value: Any) -> str:
    return f"{type(value).__name__} {reprlib.repr(value)}"


def id_of(row: Mapping[str, Any]) -> str | None:
    """The id of a row: text or a whole number; left out, the condition's path, also where its
    bytes are beside that. None: neither."""
    given = row.get("id")
    if given is None:
        given = row.get("condition")
        if isinstance(given, Mapping):
            given = given.get("path")
    elif isinstance(given, int) and not isinstance(given, bool):
        return str(given)
    return given if isinstance(given, str) and given else None


def item_of(number: int, row: Mapping[str, Any], root: Path) -> Item | Bad:
    """The item in row ``number``, whose condition lies under ``root`` where it is a path."""
    name = id_of(row)
    try:
        if name is None and row.get("id") is None and _holds_bytes(row.get("condition")):
            raise BadItem("id is missing, and the condition has no path that could stand for it")
        if name is None:
            raise BadItem(f"id must be text or a whole number; got {_said(row.get('id'))}")
        if not _is_unicode(name):
            raise BadItem("id is not valid Unicode")
        return Item(
            number,
            name,
            _text(row.get("text")),
            _condition(row.get("condition"), root),
            _negative(row.get("negative_prompt")),
            _scale(row.get("scale")),
            _seed(row.get("seed")),
        )
    except BadItem as error:
        return Bad(number, name, str(error))


def _holds_bytes(condition: Any) -> bool:
    if isinstance(condition, Mapping):
        condition = condition.get("bytes")
    return isinstance(condition, bytes)


def _text(given: Any) -> str:
    if not isinstance(given, str):
        raise BadItem(f"text must be text; got {_said(given)}")
    if not given.strip():
        raise BadItem("text is empty")
    if not _is_unicode(given):
        raise BadItem("text is not valid Unicode")
    return given


def _negative(given: Any) -> str | None:
    if given is None:
        return None
    if not isinstance(given, str) or not _is_unicode(given):
        raise BadItem(f"negative_prompt must be text; got {_said(given)}")
    return given


def _scale(given: Any) -> float:
    if given is None:
        return 1.0
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise BadItem(f"scale must be a number; got {_said(given)}")
    try:
        scale = float(given)
    except OverflowError:
        scale = math.inf
    if not 0.0 <= scale <= 1000.0:
        raise BadItem(f"scale must be 0 to 1000; got {_said(given)}")
    return scale


def _seed(given: Any) -> int | None:
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int):
        raise BadItem(f"seed must be a whole number; got {_said(given)}")
    if not 0 <= given <= _LARGEST_SEED:
        raise BadItem(f"seed must be 0 to {_LARGEST_SEED}; got {_said(given)}")
    return given


def _condition(given: Any, root: Path) -> Path | bytes:
    if isinstance(given, Mapping):  # as Hugging Face's Image feature is stored
        given = given.get("path") if given.get("bytes") is None else given["bytes"]
    if isinstance(given, bytes):
        return given
    if not isinstance(given, str) or not given:
        raise BadItem(f"condition must be a path or the bytes of a picture; got {_said(given)}")
    if "\0" in given or not _is_unicode(given):
        raise BadItem(f"condition {_said(given)} is no path")
    # by the path as it is written: where the user's own links lead is the user's affair
    inside, place = os.path.abspath(root), os.path.abspath(os.path.join(root, given))
    if os.path.commonpath([inside, place]) != inside:
        raise BadItem(f"condition {reprlib.repr(given)} lies outside of the folder of the data")
    return Path(place)


def opened(condition: Path | bytes, size: tuple[int, int], resize: str | None) -> Image.Image:
    """The condition as RGB of ``size`` (height, width).

    Raises BadItem where it is no such picture, and OSError where the system cannot read.
    """
    from PIL import Image

    if isinstance(condition, Path):
        named = f"cannot read the condition {str(condition)[-_SAID:]!r}"
        try:
            if not stat.S_ISREG(condition.stat().st_mode):  # to open a pipe would wait for ever
                raise BadItem(f"{named}: it is no regular file")
            condition = condition.read_bytes()
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise
            raise BadItem(f"{named}: {error.strerror}") from None
    file = io.BytesIO(condition)
    try:
        picture: Image.Image = Image.open(file)
        picture.load()
        if picture.mode in _DEEP_MODES:
            raise BadItem(f"the condition has the mode {picture.mode}; expected 8 bits a channel")
        picture = picture.convert("RGB")
    except (BadItem, MemoryError):
        raise
    except Exception as error:  # readers of a dozen formats, on bytes of any kind
        said = " ".join(str(error).replace(f" {file!r}", "").split())
        raise BadItem(f"the condition is no readable picture: {said[:_SAID]}") from None
    if picture.size != size[::-1]:
        if resize is None:
            found = f"{picture.height}x{picture.width}"
            raise BadItem(
                f"the condition is {found}, height x width; expected {size[0]}x{size[1]}: resize "
                "it, or give --resize nearest (classes) or bicubic (depth)"
            )
        kind = Image.Resampling.NEAREST if resize == "nearest" else Image.Resampling.BICUBIC
        picture = picture.resize(size[::-1], kind)
    return picture
