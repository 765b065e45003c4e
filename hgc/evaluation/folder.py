"""A checkpoint and a folder of pictures, evaluated as ControlNet++ evaluates (arXiv 2404.07987).

The folder has a ``metadata.jsonl`` in the convention of Hugging Face's ImageFolder, one line a
picture::

    {"file_name": "images/0.png", "text": "a red house", "condition_file_name": "seg/0.png",
     "label_file_name": "labels/0.png"}

Paths are relative to the folder. ``text`` is the prompt. ``file_name`` is the true picture: canny
and soft edges are taken from it, and the Fréchet distance to the truth. ``condition_file_name`` is
what the ControlNet sees: needed for segmentation and depth. ``label_file_name`` is a picture of one
channel whose pixels are the judge's class numbers, 255 for none: needed for segmentation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hgc.evaluation import judging
from hgc.evaluation.metrics import iou_of_counts
from hgc.evaluation.models import DTYPES, ModelError, ModelShapes, load_folder, load_shapes
from hgc.evaluation.record import fingerprint
from hgc.evaluation.subject import (
    SCHEDULERS,
    Input,
    Judged,
    Subject,
    make_scheduler,
    saved_config,
)

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["CONDITIONS", "DataError", "Folder", "Line", "read_metadata", "rgb"]

CONDITIONS = ("segmentation", "canny", "softedge", "depth")
_METADATA = "metadata.jsonl"
_FIELDS = ("file_name", "condition_file_name", "label_file_name")
_NEEDED = {
    "segmentation": ("condition_file_name", "label_file_name"),
    "depth": ("condition_file_name",),
    "canny": (),
    "softedge": (),
}
_MEASURES = {
    "segmentation": "mean IoU",
    "canny": "edge F1",
    "softedge": "MS-SSIM",
    "depth": "-RMSE",
}
_NO_CLASS = 255
# The protocol's.
IMAGES = 4
_SEED = 42
_GUIDANCE = 7.5
_SCHEDULER = "unipc"


class DataError(ValueError):
    """A folder of pictures cannot be used; the message names the file or the field."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of ``metadata.jsonl``.

    Attributes:
        number: In the file, from 1.
        text: The prompt.
        file_name: The true picture, or None.
        condition_file_name: The condition, or None.
        label_file_name: The classes, or None.
    """

    number: int
    text: str
    file_name: Path | None
    condition_file_name: Path | None
    label_file_name: Path | None


def read_metadata(folder: Path, condition: str) -> list[Line]:
    """The lines of a folder's ``metadata.jsonl``, with every file that ``condition`` needs there.

    Raises DataError naming the file and the line or field that is wrong.
    """
    path = folder / _METADATA
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from None
    lines = []
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        at = f"{path}, line {number}"
        try:
            given = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{at} is not JSON: {error}") from None
        if not isinstance(given, dict):
            raise DataError(f"{at} is not an object of fields")
        if not isinstance(given.get("text"), str):
            raise DataError(f"{at} has no field 'text', the prompt")
        files: dict[str, Path | None] = {}
        for field in _FIELDS:
            value = given.get(field)
            if value is None:
                if field in _NEEDED[condition]:
                    raise DataError(f"{at} has no field {field!r}, which {condition} needs")
                files[field] = None
                continue
            if not isinstance(value, str):
                raise DataError(f"{at}: {field} must be a path; got {value!r}")
            if not (folder / value).is_file():
                raise DataError(f"{at}: {field} {value!r} is not there")
            files[field] = folder / value
        if files["file_name"] is None and files["condition_file_name"] is None:
            raise DataError(f"{at} has neither 'file_name' nor 'condition_file_name'")
        lines.append(Line(number, given["text"], **files))
    if not lines:
        raise DataError(f"{path} has no line")
    return lines


def _opened(path: Path) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(path)
        picture.load()
    except UnidentifiedImageError:
        raise DataError(f"{path} is not a picture") from None
    except (OSError, SyntaxError) as error:
        raise DataError(f"cannot read the picture {path}: {error}") from None
    return picture


def rgb(path: Path) -> Image.Image:
    """A picture of 8 bits a channel, as RGB.

    Raises DataError naming the file where it is none: conversion would cut deeper ones off at 255.
    """
    picture = _opened(path)
    if picture.mode.startswith(("I", "F")):
        raise DataError(f"{path} has the mode {picture.mode}; expected 8 bits a channel")
    return picture.convert("RGB")


def _pixels(path: Path, size: tuple[int, int], *, smooth: bool) -> np.ndarray:
    """uint8 [H, W, 3] at ``size`` (height, width)."""
    from PIL import Image

    picture = rgb(path)
    if picture.size != size[::-1]:
        kind = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
        picture = picture.resize(size[::-1], kind)
    return np.asarray(picture)


def _labels(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Class numbers int64 [H, W] at ``size``."""
    from PIL import Image

    picture = _opened(path)
    if picture.mode not in ("L", "P", "I", "I;16", "1"):
        raise DataError(
            f"{path} has the mode {picture.mode}; expected one channel of class numbers (L or P)"
        )
    if picture.size != size[::-1]:
        picture = picture.resize(size[::-1], Image.Resampling.NEAREST)
    return np.asarray(picture).astype(np.int64)


class Folder(Subject):
    """A checkpoint on a folder of pictures.

    model: folder of a diffusers pipeline. data: see the module. condition: one of `CONDITIONS`.
    controlnet: folder of a ControlNet; None: the pipeline's own. judge: folder of a transformers
    model, ForSemanticSegmentation for segmentation and ForDepthEstimation for depth; the edges need
    none. clip: folder of a CLIPModel, for the agreement with the prompt. size: height and width;
    None: the model's. images: pictures of each line. dtype: one of `hgc.evaluation.models.DTYPES`.

    Raises DataError or ModelError naming the file or field that is wrong.
    """

    def __init__(
        self,
        model: Path,
        data: Path,
        condition: str,
        *,
        controlnet: Path | None = None,
        judge: Path | None = None,
        clip: Path | None = None,
        size: tuple[int, int] | None = None,
        images: int = IMAGES,
        dtype: str = "fp32",
        device: str = "cpu",
    ) -> None:
        super().__init__()
        if condition not in CONDITIONS:
            raise DataError(
                f"condition: expected one of {', '.join(CONDITIONS)}; got {condition!r}"
            )
        if not (model / "model_index.json").exists():
            raise ModelError(f"{model} holds no model_index.json, so no diffusers pipeline")
        if dtype not in DTYPES:
            raise ModelError(f"dtype: expected one of {', '.join(DTYPES)}; got {dtype!r}")
        if images < 1:
            raise DataError(f"images: expected 1 or more, got {images}")
        if judge is None and condition in ("segmentation", "depth"):
            raise ModelError(f"{condition} needs a judge: the folder of a transformers model")
        if judge is not None and condition in ("canny", "softedge"):
            raise ModelError(f"{condition} is measured without a judge; leave it out")
        self._model, self._data = model, data
        self._controlnets = [] if controlnet is None else [controlnet]
        self._condition, self._dtype, self._device = condition, dtype, device
        self._judge_folder, self._clip_folder = judge, clip
        self._lines = read_metadata(data, condition)
        self.title = f"{model.resolve().name} on {data.resolve().name}"
        self.conditions = (condition,)
        self.measures = {condition: _MEASURES[condition]}
        self.count = len(self._lines)
        self.images = images
        self.guidance = _GUIDANCE
        shapes = self.shapes()
        if not shapes.controlnets:
            raise ModelError(f"{model} has no ControlNet; give one")
        self._size = size or (shapes.size, shapes.size)
        self._reader: Any = None
        if judge is not None and condition == "segmentation":
            self._reader = judging.SegmentationReader(judge, device)
            self.classes = self._reader.classes
        elif judge is not None:
            self._reader = judging.DepthReader(judge, device)
        self._clip = None if clip is None else judging.PromptReader(clip, device)
        if clip is not None:
            self.agreement = "CLIP score, the cosine between picture and prompt times 100"

    def check(self, first: int, count: int) -> None:
        for line in self._lines[first : first + count]:
            sizes = {}
            for field in _FIELDS:
                path = getattr(line, field)
                if path is not None:
                    sizes[path] = _opened(path).size
            if len(set(sizes.values())) > 1:
                said = ", ".join(f"{path} is {w} x {h}" for path, (w, h) in sizes.items())
                raise DataError(f"{self._data / _METADATA}, line {line.number}: {said}; they must "
                                "be of one size")  # fmt: skip
            if self._condition == "segmentation":
                assert line.label_file_name is not None
                found = np.unique(_labels(line.label_file_name, self._size))
                wrong = [k for k in found if k != _NO_CLASS and not 0 <= k < self.classes]
                if wrong:
                    raise DataError(
                        f"{line.label_file_name} has the class {wrong[0]}, and the judge "
                        f"{self._judge_folder} knows 0 to {self.classes - 1} (its num_labels)"
                    )

    def inputs(self, condition: str, first: int, count: int) -> list[Input]:
        read: dict[int, tuple[np.ndarray, Any]] = {}
        found = []
        for index in range(first, first + count):
            number, image = divmod(index, self.images)
            line = self._lines[number]
            if number not in read:
                read[number] = self._read(line)
            shown, truth = read[number]
            path = line.file_name or line.condition_file_name
            assert path is not None
            name = path.name if self.images == 1 else f"{path.name}, {image + 1}"
            found.append(Input(index, name, line.text, shown, _SEED + index, (line, truth)))
        return found

    def _read(self, line: Line) -> tuple[np.ndarray, Any]:
        """The condition uint8 [H, W, 3], and what a picture is compared with."""
        condition, size = self._condition, self._size
        given = line.condition_file_name
        if condition == "segmentation":
            assert given is not None and line.label_file_name is not None
            return _pixels(given, size, smooth=False), _labels(line.label_file_name, size)
        if condition == "depth":
            assert given is not None
            shown = _pixels(given, size, smooth=True)
            return shown, judging.normalised(shown[None, ..., 0])[0]
        source = None if line.file_name is None else _pixels(line.file_name, size, smooth=True)
        if condition == "canny":
            if given is not None:
                shown = _pixels(given, size, smooth=False)
                return shown, shown[..., 0] > 127
            assert source is not None
            edges = judging.canny(source)
            return np.repeat(edges[..., None], 3, axis=-1).astype(np.uint8) * 255, edges
        # Of the true picture where there is one: another detector's edges may be what is shown.
        from hgc.testbed.conditions import softedge

        if given is None:
            assert source is not None
            soft = softedge(source)
            return np.repeat(soft[..., None], 3, axis=-1), soft
        shown = _pixels(given, size, smooth=True)
        return shown, shown[..., 0] if source is None else softedge(source)

    def load(self, condition: str, device: str) -> Any:
        import torch

        dtype = getattr(torch, DTYPES[self._dtype])
        pipe = load_folder(self._model, self._controlnets, dtype)
        if not type(pipe).__name__.endswith("ControlNetPipeline"):
            raise ModelError(
                f"{self._model} is a {type(pipe).__name__}; expected a pipeline from text with a "
                "ControlNet, such as StableDiffusionControlNetPipeline"
            )
        if type(pipe.scheduler).__name__ != SCHEDULERS[_SCHEDULER]:
            pipe.scheduler = make_scheduler(_SCHEDULER, pipe.scheduler.config)
        return pipe.to(device)

    def judge(self, condition: str, images: np.ndarray, inputs: Sequence[Input]) -> Judged:
        # as a PNG would hold them
        pixels = (np.clip(images, 0, 1) * 255 + 0.5).astype(np.uint8)
        truths = [one.truth[1] for one in inputs]
        counts = features = None
        if condition == "segmentation":
            seen, features = self._reader.read(pixels)
            counts = np.stack([self._counts(s, t) for s, t in zip(seen, truths, strict=True)])
            scores = iou_of_counts(counts)
        elif condition == "depth":
            depth, features = self._reader.read(pixels)
            error = depth - np.stack(truths)
            scores = -np.sqrt(np.square(error).mean(axis=(1, 2)))
        elif condition == "canny":
            pairs = zip(pixels, truths, strict=True)
            scores = np.array([judging.edge_f1(judging.canny(p), t) for p, t in pairs])
        else:
            from hgc.testbed.conditions import softedge

            found = np.stack([softedge(p) for p in pixels])
            scores = judging.softedge_ssim(found, np.stack(truths))
        agreement = None
        if self._clip is not None:
            agreement = self._clip.read(pixels, [one.prompt for one in inputs])
        return Judged(scores, counts, features, agreement)

    def _counts(self, seen: np.ndarray, true: np.ndarray) -> np.ndarray:
        """Pixels hit, true and judged a class, where there is a class: int64 [K, 3]."""
        known = true != _NO_CLASS
        seen, true = seen[known], true[known]
        return np.stack(
            [np.bincount(v, minlength=self.classes) for v in (true[seen == true], true, seen)],
            axis=-1,
        )

    def truths(self, condition: str, inputs: Sequence[Input]) -> np.ndarray | None:
        lines = [one.truth[0] for one in inputs]
        if self._reader is None or any(line.file_name is None for line in lines):
            return None
        return self._reader.read(
            np.stack([_pixels(line.file_name, self._size, smooth=True) for line in lines])
        )[1]

    def identity(self) -> dict[str, Any]:
        def of(folder: Path | None) -> str | None:
            return None if folder is None else fingerprint(folder, "**/*")

        net = self._controlnets[0] if self._controlnets else None

        digest = hashlib.sha256()
        for line in self._lines:
            digest.update(line.text.encode())
            for field in _FIELDS:
                path = getattr(line, field)
                with_size = "" if path is None else f"{path.name} {path.stat().st_size}"
                digest.update(f"\n{with_size}\n".encode())
        return {
            "model": of(self._model),
            "controlnet": of(net),
            "judge": of(self._judge_folder),
            "clip": of(self._clip_folder),
            "data": digest.hexdigest()[:16],
            "size": list(self._size),
            "images": self.images,
            "dtype": self._dtype,
        }

    def load_shapes(self) -> ModelShapes:
        return load_shapes(str(self._model), self._controlnets)

    def scheduler_config(self) -> dict[str, Any]:
        return saved_config(self._model)

    def scheduler(self) -> str:
        return _SCHEDULER

    def size(self) -> tuple[int | None, int | None]:
        return self._size

    def about(self) -> dict[str, Any]:
        def name(folder: Path | None) -> str | None:
            return None if folder is None else folder.resolve().name

        return {
            "subject": self.title,
            "controlnet": name(self._controlnets[0] if self._controlnets else None),
            "judge": name(self._judge_folder),
            "clip": name(self._clip_folder),
            "size": list(self._size),
            "images": self.images,
            "dtype": self._dtype,
            "protocol": "ControlNet++",
        }
