"""What an evaluation is made on: a pipeline, inputs for it, and a judge of what it makes.

:class:`Testbed` is a model of the testbed, the shipped one or another, on rendered scenes.
:class:`hgc.evaluation.folder.Folder` is a checkpoint with a folder of pictures.
"""

from __future__ import annotations

import abc
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hgc.evaluation.models import ModelShapes, load_shapes
from hgc.evaluation.peers import grid
from hgc.evaluation.record import fingerprint
from hgc.planning.config import ConfigError

if TYPE_CHECKING:
    from hgc.planning.config import Config
    from hgc.report.macs import Macs

__all__ = [
    "SCHEDULERS",
    "Input",
    "Judged",
    "Subject",
    "Testbed",
    "check_scheduler",
    "make_scheduler",
    "saved_scheduler",
]

# One evaluation a step each, so that a plan's length is the number of steps.
SCHEDULERS = {
    "unipc": "UniPCMultistepScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "ddim": "DDIMScheduler",
    "deis": "DEISMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}
# With its timesteps spaced from the end of training on, as "dpm++2m-trailing".
_TRAILING = "-trailing"
# With fewer steps at timesteps of the uncached run, as "dpm++2m-grid": of those that go by sigmas.
_GRID = "-grid"
_WITH_GRID = ("unipc", "dpm++2m", "deis", "euler")
# DPM++ 2M at the timesteps of "Align your steps" (arXiv 2404.14507), as diffusers ships them.
_AYS = {"dpm++2m-ays": "StableDiffusionTimesteps", "dpm++2m-ays-xl": "StableDiffusionXLTimesteps"}
# The training that they were found for.
_AYS_TRAINING = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "num_train_timesteps": 1000,
}  # fmt: skip
# What a configuration of another class does not say, as SD1.5's own DDIM has it.
_EXTRA = {"ddim": {"clip_sample": False, "set_alpha_to_one": False}}


def check_scheduler(name: str) -> str:
    """``name`` where it is a scheduler's; ConfigError where it is not."""
    on_grid = name.endswith(_GRID)
    base = name.removesuffix(_GRID).removesuffix(_TRAILING)
    if base not in (_WITH_GRID if on_grid else SCHEDULERS):
        raise ConfigError(
            f"no scheduler named {name!r}; schedulers: {', '.join(SCHEDULERS)}, each also with "
            f"{_TRAILING!r}, and {', '.join(_WITH_GRID)} with {_GRID!r} at the end"
        )
    return name


def make_scheduler(name: str, config: Any, steps: int | None = None) -> Any:
    """The scheduler ``name`` with the noise schedule of ``config``, another scheduler's.

    steps: of the uncached run, whose timesteps one "-grid" keeps to.
    """
    import diffusers

    if name in _AYS:
        from diffusers.schedulers import AysSchedules

        kind = diffusers.DPMSolverMultistepScheduler
        return _at_timesteps(kind, AysSchedules[_AYS[name]]).from_config(config)
    base = check_scheduler(name).removesuffix(_GRID).removesuffix(_TRAILING)
    changes: dict[str, Any] = dict(_EXTRA.get(base, {}))
    if config.get("_class_name") == SCHEDULERS[base]:
        changes = {}
    if name.removesuffix(_GRID).endswith(_TRAILING):
        changes["timestep_spacing"] = "trailing"
    kind = getattr(diffusers, SCHEDULERS[base])
    if name.endswith(_GRID):
        if steps is None:
            raise ValueError(f"steps of the uncached run must be given for {name!r}; got None")
        kind = _on_grid(kind, steps)
    return kind.from_config(config, **changes)


def _on_grid(kind: Any, steps: int) -> Any:
    """The scheduler class ``kind`` whose timesteps are some of those it makes for ``steps``."""

    def set_timesteps(self: Any, num_inference_steps: int, *args: Any, **kwargs: Any) -> None:
        kind.set_timesteps(self, steps, *args, **kwargs)
        kept = list(grid(num_inference_steps, steps))
        self.timesteps = self.timesteps[kept]
        self.sigmas = self.sigmas[[*kept, steps]]
        self.num_inference_steps = num_inference_steps

    return type(kind.__name__, (kind,), {"set_timesteps": set_timesteps})


def _at_timesteps(kind: Any, timesteps: Sequence[int]) -> Any:
    """The scheduler class ``kind`` whose runs are at ``timesteps``."""

    def set_timesteps(self: Any, num_inference_steps: int, *args: Any, **kwargs: Any) -> None:
        kind.set_timesteps(self, None, *args, timesteps=list(timesteps), **kwargs)

    return type(kind.__name__, (kind,), {"set_timesteps": set_timesteps})


def ays(subject: Subject) -> tuple[str, int]:
    """The scheduler of the row "ays" and its number of steps.

    Raises ConfigError where the model's training is not the one that the timesteps are for.
    """
    from diffusers.schedulers import AysSchedules

    config = subject.scheduler_config()
    found = {name: config.get(name) for name in _AYS_TRAINING}
    if found != _AYS_TRAINING:
        raise ConfigError(
            f"row 'ays': its timesteps are for models of Stable Diffusion's training, "
            f"{_AYS_TRAINING}; this one's scheduler has {found}"
        )
    is_xl = subject.shapes().unet.config.addition_embed_type == "text_time"
    name = "dpm++2m-ays-xl" if is_xl else "dpm++2m-ays"
    return name, len(AysSchedules[_AYS[name]])


def saved_config(folder: Path) -> dict[str, Any]:
    """The configuration of the scheduler in a pipeline's folder."""
    found: dict[str, Any] = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return found


def saved_scheduler(folder: Path) -> str:
    """The short name of the scheduler in a pipeline's folder, or its class's name."""
    name = str(saved_config(folder)["_class_name"])
    return next((short for short, full in SCHEDULERS.items() if full == name), name)


@dataclasses.dataclass(frozen=True, eq=False)
class Input:
    """One picture to make.

    Attributes:
        index: Among all there are.
        name: For people: a scene's number or a file's name.
        prompt: What the pipeline is asked for.
        condition: uint8 [H, W, 3], what the ControlNet sees.
        seed: Of its noise, before the evaluation's own seed is added.
        truth: What the judge compares with; its type is the subject's own affair.
    """

    index: int
    name: str
    prompt: str
    condition: np.ndarray
    seed: int
    truth: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Judged:
    """What the judge says of a batch of pictures.

    Attributes:
        scores: Fidelity to the condition, float64 [B], higher is better.
        counts: For segmentation pixels hit, true and judged a class, int64 [B, K, 3]; else None.
        features: The judge's, float32 [B, F]; None without a judge.
        agreement: With the prompt, float64 [B], higher is better; None where nothing reads it.
    """

    scores: np.ndarray
    counts: np.ndarray | None
    features: np.ndarray | None
    agreement: np.ndarray | None


class Subject(abc.ABC):
    """What an evaluation is made on.

    Attributes:
        title: For headings.
        conditions: Names of the conditions it can be evaluated on.
        measures: Name of the measure of fidelity of each condition.
        agreement: What the agreement with the prompt is; empty where nothing reads it.
        count: Number of inputs; None: no end.
        images: Pictures of each input.
        guidance: Guidance scale where the settings name none.
        classes: Number of classes of the judge of segmentation.
        stands_for_sd15: Whether its figures are quoted with MACs of SD1.5.
        plans: Folder of the rivals whose coefficients were refined on it; None: there is none.
    """

    title: str
    conditions: tuple[str, ...]
    measures: dict[str, str]
    agreement: str = ""
    count: int | None = None
    images: int = 1
    guidance: float
    classes: int = 0
    stands_for_sd15: bool = False
    plans: Path | None = None

    def __init__(self) -> None:
        self._shapes: ModelShapes | None = None

    @abc.abstractmethod
    def inputs(self, condition: str, first: int, count: int) -> list[Input]:
        """``count`` pictures to make, from the one with index ``first``."""

    def check(self, first: int, count: int) -> None:
        """Raise ValueError, naming what is wrong, where one of ``count`` inputs cannot be used.

        first, count: in scenes, not pictures.
        """
        return None

    @abc.abstractmethod
    def load(self, condition: str, device: str) -> Any:
        """The pipeline of a condition, on ``device``."""

    @abc.abstractmethod
    def judge(self, condition: str, images: np.ndarray, inputs: Sequence[Input]) -> Judged:
        """Judge float32 [B, H, W, 3] pictures in [0, 1] of ``inputs``."""

    @abc.abstractmethod
    def truths(self, condition: str, inputs: Sequence[Input]) -> np.ndarray | None:
        """The judge's features of the true pictures, float32 [B, F]; None where there are none."""

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """What its numbers depend on, as JSON: hashes of weights and data."""

    @abc.abstractmethod
    def load_shapes(self) -> ModelShapes:
        """The UNet and the ControlNets on the meta device."""

    @abc.abstractmethod
    def scheduler_config(self) -> dict[str, Any]:
        """The configuration that the model's own scheduler was saved with."""

    @abc.abstractmethod
    def scheduler(self) -> str:
        """Short name of the scheduler that is used where the settings name none."""

    def size(self) -> tuple[int | None, int | None]:
        """Height and width of the pictures in pixels; None: the model's."""
        return None, None

    def about(self) -> dict[str, Any]:
        """What is worth saying of it in a file."""
        return {"subject": self.title}

    def shapes(self) -> ModelShapes:
        """:meth:`load_shapes`, once."""
        if self._shapes is None:
            self._shapes = self.load_shapes()
        return self._shapes

    def decoder_layers(self) -> int:
        """Decoder layers of the UNet: 12 on SD1.5."""
        return sum(len(block.resnets) for block in self.shapes().unet.up_blocks)

    def macs(self, config: Config | None, steps: int) -> Macs:
        """MACs of one picture under classifier-free guidance, with ``config`` or without hgc.

        Raises ConfigError where ``config`` does not fit the model.
        """
        height, width = self.size()
        return self.shapes().macs(config, steps, height=height, width=width)


class Testbed(Subject):
    """The shipped model on held-out rendered scenes, or another one trained on such scenes.

    The judge is the shipped one, whichever the model.
    """

    agreement = (
        "share of the light, the ground and the materials that the prompt names which the judge "
        "sees in the picture"
    )
    # A solid is named where it covers 40 pixels or more; half of them must be judged its material.
    _SEEN = 20
    stands_for_sd15 = True

    def __init__(self, folder: Path | None = None) -> None:
        """folder: of a model that benchmarks/train_testbed.py wrote; None: the shipped one.

        Raises FileNotFoundError where the folder holds no such model.
        """
        super().__init__()
        from hgc import testbed

        self._folder = folder
        # not in the folder of another model, whose files tell it from others
        self.plans, self.title = Path(testbed.__file__).parent / "plans", "Testbed"
        if folder is not None:
            name = folder.resolve().name
            self.plans, self.title = folder.resolve().with_name(f"{name}-plans"), f"Testbed, {name}"
        self.conditions = testbed.CONDITIONS if folder is None else testbed.conditions_in(folder)
        self.measures = testbed.MEASURES
        self.guidance = testbed.GUIDANCE_SCALE
        self.classes = len(testbed.CLASSES)
        self._judge: Any = None

    def inputs(self, condition: str, first: int, count: int) -> list[Input]:
        from hgc import testbed

        return [
            Input(
                index=first + i,
                name=f"scene {first + i}",
                prompt=scene.caption,
                condition=np.asarray(testbed.condition_image(scene, condition)),
                seed=scene.seed,
                truth=scene,
            )
            for i, scene in enumerate(testbed.held_out(count, first))
        ]

    def load(self, condition: str, device: str) -> Any:
        from hgc import testbed

        pipe: Any = testbed.load_pipeline(condition, folder=self._folder)
        return pipe.to(device)

    def judge(self, condition: str, images: np.ndarray, inputs: Sequence[Input]) -> Judged:
        from hgc import testbed
        from hgc.evaluation.metrics import class_counts, iou_of_counts
        from hgc.testbed import judges

        scenes = [one.truth for one in inputs]
        classes, lights, features = self._read(images)
        if condition == "segmentation":
            counts = class_counts(
                np.stack([judges.confusion(images[i : i + 1], [s]) for i, s in enumerate(scenes)])
            )
            scores = iou_of_counts(counts)
        else:
            counts, scores = None, testbed.fidelity(condition, images, scenes)
        agreement = [
            self._agrees(scene, seen, light)
            for scene, seen, light in zip(scenes, classes, lights, strict=True)
        ]
        return Judged(scores, counts, features, np.array(agreement))

    def truths(self, condition: str, inputs: Sequence[Input]) -> np.ndarray | None:
        return self._read(np.stack([one.truth.image for one in inputs]))[2]

    def _agrees(self, scene: Any, classes: np.ndarray, light: int) -> float:
        from hgc.testbed.scenes import CLASSES, LIGHTS

        named = [scene.ground, *dict.fromkeys(material for material, _ in scene.solids)]
        pixels = np.bincount(classes.ravel(), minlength=len(CLASSES))
        seen = [bool(pixels[CLASSES.index(name)] >= self._SEEN) for name in named]
        return float(np.mean([*seen, LIGHTS[light] == scene.light]))

    def _read(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Classes, lights, and the mean over the picture of the deepest features [B, 96]."""
        from hgc import testbed
        from hgc.testbed import judges

        if self._judge is None:
            self._judge = judges.load_judge(testbed.path() / "judge")
        caught: list[np.ndarray] = []
        handle = self._judge.down[-1].register_forward_hook(
            lambda module, args, out: caught.append(out.mean(dim=(2, 3)).numpy())
        )
        try:
            classes, _, lights = judges.read(images, self._judge)
        finally:
            handle.remove()
        return classes, lights, np.concatenate(caught)

    def identity(self) -> dict[str, Any]:
        from hgc import testbed

        found = {"model": fingerprint(testbed.path(), "**/*")}  # its VAE and its judge, at least
        if self._folder is not None:
            found["other_model"] = fingerprint(self._folder, "**/*")
        return found

    def load_shapes(self) -> ModelShapes:
        if self._folder is None:
            return load_shapes("testbed")
        net = self._folder / f"controlnet_{self.conditions[0]}"
        return load_shapes(str(self._folder), [net])

    def scheduler_config(self) -> dict[str, Any]:
        return saved_config(self._path())

    def scheduler(self) -> str:
        return saved_scheduler(self._path())

    def _path(self) -> Path:
        from hgc import testbed

        return testbed.path() if self._folder is None else self._folder
