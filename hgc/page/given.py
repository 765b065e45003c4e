"""What a person gave the page, checked. Nothing of it is written to a file or read from a path."""

from __future__ import annotations

import base64
import binascii
import io
import math
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

import hgc
from hgc.testbed.scenes import PALETTE

__all__ = ["MOST_BYTES", "Refused", "config_of", "number", "picture_of", "prompt_of", "uploaded"]

MOST_BYTES = 4 * 2**20
_MOST_SIDE = 4096
_FORMATS = ("PNG", "JPEG", "WEBP")
_LONGEST = 500
_LONGEST_CONFIG = 2**18


class Refused(ValueError):
    """What was given cannot be used; the message says what would be."""


def _decoded(link: Any) -> bytes:
    head, comma, data = link.partition(",") if isinstance(link, str) else ("", "", "")
    if not (comma and head.startswith("data:") and head.endswith(";base64")):
        raise Refused("the picture did not arrive as a picture: load or draw it again")
    if len(data) > MOST_BYTES * 4 // 3 + 4:
        raise Refused(f"a picture may have at most {MOST_BYTES // 2**20} MiB")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error:
        raise Refused("the picture did not arrive whole: load or draw it again") from None


def uploaded(link: Any) -> Image.Image:
    """The picture that a ``data:`` link holds, as RGB.

    Raises Refused where it is too large, or no PNG, JPEG or WebP.
    """
    data = _decoded(link)
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
        # known from its head, before a pixel is unpacked
        if max(image.size) > _MOST_SIDE:
            raise Refused(
                f"a picture may have at most {_MOST_SIDE} x {_MOST_SIDE} pixels; this one has "
                f"{image.width} x {image.height}"
            )
        image.load()
    except UnidentifiedImageError:
        raise Refused(f"a picture must be one of {', '.join(_FORMATS)}; this file is not") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused("the file begins as a picture and cannot be read to its end") from None
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    return image.convert("RGB")


def picture_of(link: Any, size: tuple[int, int], condition: str) -> Image.Image:
    """An uploaded or drawn condition at ``size``, width and height: its middle, scaled.

    Of a segmentation each pixel becomes the nearest class's colour.
    """
    image = uploaded(link)
    exact = condition == "segmentation"
    if image.size != size:
        how = Image.Resampling.NEAREST if exact else Image.Resampling.LANCZOS
        image = ImageOps.fit(image, size, how)
    if exact:
        near = np.asarray(image, np.int64)[:, :, None, :] - PALETTE.astype(np.int64)
        image = Image.fromarray(PALETTE[(near**2).sum(axis=-1).argmin(axis=-1)])
    return image


def prompt_of(text: Any) -> str:
    """A prompt."""
    text = " ".join(text.split()) if isinstance(text, str) else ""
    if not text or len(text) > _LONGEST:
        raise Refused(f"a prompt must have 1 to {_LONGEST} characters; got {len(text)}")
    return text


def number(name: str, value: Any, low: float, high: float, *, whole: bool = True) -> Any:
    """A number within bounds, an int where ``whole``."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        raise Refused(f"{name} must be {kind} from {low} to {high}; got {value!r}")
    return int(value) if whole else float(value)


def config_of(text: Any) -> hgc.Config:
    """A configuration from its JSON text; never from a path."""
    if not isinstance(text, str) or not text.strip() or len(text) > _LONGEST_CONFIG:
        raise Refused(
            f"a configuration must be JSON text of at most {_LONGEST_CONFIG // 1024} KiB, as "
            "Config.to_json writes it"
        )
    return hgc.Config.from_json(text)
