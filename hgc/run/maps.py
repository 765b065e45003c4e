"""Where each token of a prompt looks: cross-attention maps averaged over a run, and a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["MapSums", "plot_maps"]

Tensor = torch.Tensor


class MapSums:
    """Sums of the cross-attention maps of a run, over its heads, layers and key evaluations.

    Layers of one resolution are summed into one tensor of float32, so that a run holds one a
    resolution.

    Args:
        reserve: Asked before a tensor of so many bytes is held; False: it is not.
    """

    def __init__(self, reserve: Callable[[int], bool]) -> None:
        self._reserve = reserve
        self._sums: dict[tuple[int, int, int], list[Any]] = {}  # (rows, S_q, S_kv): sum, layers
        self._closed = False

    def close(self) -> None:
        """The text changed: what comes are not the maps of the first, where those were seen."""
        self._closed = bool(self._sums)

    def add(self, query: Tensor, key: Tensor, heads: int) -> None:
        """Add the map of one layer.

        Args:
            query: [B, S_q, C].
            key: [B, S_kv, C].
            heads: Of the attention.
        """
        if self._closed:
            return
        rows, length, width = query.shape
        query = query.detach().float().view(rows, length, heads, -1).transpose(1, 2)
        key = key.detach().float().view(rows, key.shape[1], heads, -1).transpose(1, 2)
        scores = query @ key.transpose(-1, -2) / math.sqrt(width // heads)
        mean = scores.softmax(dim=-1).mean(dim=1)  # [B, S_q, S_kv]
        entry = (rows, length, mean.shape[-1])
        held = self._sums.get(entry)
        if held is not None:
            held[0] = held[0] + mean
            held[1] += 1
        elif self._reserve(mean.nbytes):
            self._sums[entry] = [mean, 1]

    def mean(self, size: tuple[int, int], is_pair: bool) -> Tensor | None:
        """The mean map of each token.

        Args:
            size: Height and width of the latents.
            is_pair: The batch was one of classifier-free guidance: the conditional half is meant.

        Returns:
            [images, tokens, height, width] in float32, at the finest resolution that was seen;
            None where no map was.
        """
        if not self._sums:
            return None
        most = max(rows for rows, _, _ in self._sums)
        images = most // 2 if is_pair else most
        found: list[tuple[Tensor, int]] = []
        for (rows, length, tokens), (total, layers) in self._sums.items():
            shape = _level(size, length)
            if shape is None or (rows != images and not (is_pair and rows == most)):
                continue
            total = total[rows - images :]
            grid = total.transpose(1, 2).reshape(images, tokens, *shape)
            found.append((grid, layers))
        if not found:
            return None
        finest = max((tuple(g.shape[-2:]) for g, _ in found), key=math.prod)
        layers = sum(count for _, count in found)
        return torch.stack([_resized(grid, finest) for grid, _ in found]).sum(dim=0) / layers


def _level(size: tuple[int, int], length: int) -> tuple[int, int] | None:
    """The height and width of the level of a UNet that has ``length`` positions."""
    height, width = size
    while height * width > length:
        height, width = (height + 1) // 2, (width + 1) // 2
    return (height, width) if height * width == length else None


def _resized(grid: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(grid.shape[-2:]) == size:
        return grid
    return F.interpolate(grid, size=size, mode="bilinear", align_corners=False)


def plot_maps(
    maps: Tensor,
    image: Any = None,
    words: Sequence[str] | Mapping[str, int | Sequence[int]] | None = None,
    *,
    path: str | Path | None = None,
    columns: int = 4,
) -> Any:
    """Draw attention maps over the image, one panel a word. Needs matplotlib.

    Args:
        maps: [tokens, h, w], or [1, tokens, h, w] as :meth:`hgc.Installation.maps` gives it for
            one image.
        image: A PIL image, an array or tensor [H, W, 3], of uint8 or in [0, 1]; None: maps alone.
        words: The word of each token from the first on; or a word's token or tokens by the word
            (the maps of several are added). Default: the number of each token.
        path: Where to save the figure, in the format that its suffix names.
        columns: Panels a row.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: ``maps`` has another shape, or a word names a token that there is not.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "hgc.plot_maps needs matplotlib: pip install 'hybrid-grained-cache[plot]'"
        ) from error

    if maps.dim() == 4 and maps.shape[0] == 1:
        maps = maps[0]
    if maps.dim() != 3:
        raise ValueError(
            "maps must be [tokens, h, w] of one image (maps[i] of several); "
            f"got {tuple(maps.shape)}"
        )
    panels = _panels(maps.detach().float().cpu(), words)
    columns = max(1, min(columns, len(panels)))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(2.4 * columns, 2.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    picture = None if image is None else _picture(image)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (word, grid) in zip(axes.flat, panels, strict=False):
        height, width = grid.shape if picture is None else picture.shape[:2]
        extent = (0, width, height, 0)
        if picture is not None:
            axis.imshow(picture, extent=extent)
        axis.imshow(
            grid.numpy(), cmap="magma", extent=extent, interpolation="bilinear",
            alpha=1.0 if picture is None else 0.6,
        )  # fmt: skip
        axis.set_title(word)
    if path is not None:
        figure.savefig(path)
    return figure


def _panels(
    maps: Tensor, words: Sequence[str] | Mapping[str, int | Sequence[int]] | None
) -> list[tuple[str, Tensor]]:
    """The title and the map, [h, w], of each panel."""
    tokens = maps.shape[0]
    if words is None:
        words = [str(i) for i in range(tokens)]
    if not isinstance(words, Mapping):
        if isinstance(words, str) or len(words) > tokens:
            raise ValueError(
                f"words must be a list of at most {tokens} words, one a token, or a dict; "
                f"got {words!r}"
            )
        words = {f"{word}\0{i}": i for i, word in enumerate(words)}
    panels = []
    for word, index in words.items():
        chosen = [index] if isinstance(index, int) else list(index)
        if not chosen or any(not 0 <= i < tokens for i in chosen):
            raise ValueError(f"words[{word!r}] must name tokens below {tokens}; got {index!r}")
        panels.append((word.partition("\0")[0], maps[chosen].sum(dim=0)))
    return panels


def _picture(image: Any) -> Any:
    """``image`` as an array [H, W, 3] that matplotlib draws."""
    import numpy as np

    if isinstance(image, Tensor):
        image = image.detach().float().cpu().numpy() if image.is_floating_point() else image.cpu()
    picture = np.asarray(image)
    if picture.ndim != 3 or picture.shape[-1] not in (3, 4):
        raise ValueError(f"image must be [H, W, 3]; got {picture.shape}")
    return picture
