"""What the page does with what a person asks: pictures in, HTML out. Knows no Gradio."""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

import hgc
from hgc import testbed
from hgc.evaluation import SCHEDULERS, load_folder, make_scheduler
from hgc.page import markup
from hgc.page.drawing import Asked, Drawn, draw, fewer_steps
from hgc.page.given import Refused, config_of, number, picture_of, prompt_of
from hgc.page.work import Say

__all__ = ["JSON", "MOST_STEPS", "OWN", "ROUNDS", "Blind", "Form", "Studio"]

JSON = "the JSON below"
OWN = "the model's own"
_FEWER = "fewer steps at the MACs of "
MOST_STEPS = 100
ROUNDS = 10
_SCENES = 10_000


@dataclasses.dataclass(frozen=True)
class Form:
    """What the screen says, unchecked."""

    condition: Any
    scene: Any
    picture: Any
    prompt: Any
    seed: Any
    steps: Any
    guidance: Any
    scheduler: Any
    plan: Any
    json: Any


@dataclasses.dataclass(frozen=True)
class Blind:
    """A blind test: rounds played, how many were right, and which picture is the uncached one."""

    played: int = 0
    right: int = 0
    answer: str = ""


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A way to make the other picture. config: None: without hgc. equal_to: then the configuration
    whose MACs its steps cost; None: as many steps as the uncached picture."""

    name: str
    config: hgc.Config | None
    equal_to: hgc.Config | None = None


class Studio:
    """The model of a page.

    model, controlnets: folders; None: the shipped one with its four conditions and its scenes.
    """

    def __init__(
        self, model: Path | None = None, controlnets: Sequence[Path] = (), device: str = "cpu"
    ) -> None:
        self._folder, self._controlnets, self._device = model, controlnets, device
        self.has_scenes = model is None
        self.conditions = list(testbed.CONDITIONS) if self.has_scenes else ["picture"]
        self.plans = dict(hgc.presets())
        if self.has_scenes:
            for name, file in testbed.plans().items():
                self.plans[name] = hgc.Config.from_json(file)
        self.pipe = functools.cache(self._load)
        pipe = self.pipe(self.conditions[0])
        side = pipe.unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        factor = pipe.vae_scale_factor
        self.size = (width * factor, height * factor)
        # a first call is slower than those that follow
        draw(pipe, Asked("warm", Image.new("RGB", self.size), 0, testbed.GUIDANCE_SCALE), 2)

    @property
    def choices(self) -> list[str]:
        """What may be compared with the uncached picture."""
        fewer = [_FEWER + name for name, one in hgc.presets().items() if not one.is_exact]
        return [*self.plans, JSON, *fewer]

    @property
    def schedulers(self) -> list[str]:
        """Their names."""
        return [OWN, *SCHEDULERS]

    def _load(self, condition: str) -> Any:
        if self._folder is None:
            pipe: Any = testbed.load_pipeline(condition)
        else:
            pipe = load_folder(self._folder, self._controlnets)
        return pipe.to(self._device)

    def scene(self, condition: str, index: Any) -> tuple[Image.Image, str]:
        """A held-out scene's condition, and its prompt."""
        (scene,) = testbed.held_out(1, number("scene", index, 0, _SCENES - 1))
        return testbed.condition_image(scene, self._condition(condition)), scene.caption

    def palette(self, condition: str) -> list[tuple[str, str]]:
        """Names and colours to draw a condition with."""
        if condition == "segmentation":
            from hgc.testbed.scenes import PALETTE

            pairs = zip(testbed.CLASSES, PALETTE.tolist(), strict=True)
            return [(name, "#{:02x}{:02x}{:02x}".format(*colour)) for name, colour in pairs]
        if condition == "canny":
            return [("line", "#ffffff"), ("nothing", "#000000")]
        names = ("near", "middle", "far") if condition == "depth" else ("strong", "soft", "faint")
        greys = zip(names, ("#ffffff", "#a0a0a0", "#505050"), strict=True)
        return [*greys, ("sky" if condition == "depth" else "nothing", "#000000")]

    def _condition(self, name: Any) -> str:
        if name not in self.conditions:
            raise Refused(f"condition must be one of {', '.join(self.conditions)}; got {name!r}")
        return str(name)

    def read(self, form: Form) -> tuple[Any, Asked, int]:
        """The pipeline, what is asked of it, and the steps, checked."""
        condition = self._condition(form.condition)
        pipe = self.pipe(condition)
        if form.scheduler not in self.schedulers:
            raise Refused(
                f"scheduler must be one of {', '.join(self.schedulers)}; got {form.scheduler!r}"
            )
        asked = Asked(
            prompt=prompt_of(form.prompt),
            condition=picture_of(form.picture, self.size, condition),
            seed=number("seed", form.seed, 0, 2**53 - 1),
            guidance=number("guidance", form.guidance, 1, 30, whole=False),
            scheduler=(
                None
                if form.scheduler == OWN
                else make_scheduler(form.scheduler, pipe.scheduler.config)
            ),
        )
        return pipe, asked, number("steps", form.steps, 2, MOST_STEPS)

    def plan(self, form: Form) -> _Plan:
        """What is to be compared with the uncached picture."""
        if form.plan not in self.choices:
            raise Refused(f"plan must be one of {', '.join(self.choices)}; got {form.plan!r}")
        name = str(form.plan)
        if name == JSON:
            config = config_of(form.json)
            return _Plan(config.name, config)
        if name.startswith(_FEWER):
            return _Plan("fewer steps", None, self.plans[name.removeprefix(_FEWER)])
        return _Plan(name, self.plans[name])

    def _draw(
        self, say: Say, form: Form, plan: _Plan, around: tuple[int, int] = (0, 1), **more: Any
    ) -> Drawn:
        """A picture; ``around``: runs done before, and runs in all."""
        pipe, asked, steps = self.read(form)
        if plan.equal_to is not None:
            steps = fewer_steps(pipe, asked, plan.equal_to, steps)
        name = plan.name if plan.name == "uncached" else f"{plan.name}, {steps} steps"
        of = f" ({around[0] + 1} of {around[1]} pictures)" if around[1] > 1 else ""

        def on_step(done: int, total: int) -> None:
            say(f"{name}{of}", done, total)

        on_step(0, steps)
        return draw(pipe, asked, steps, plan.config, name=name, on_step=on_step, **more)

    def compare(self, form: Form, say: Say) -> str:
        """The uncached picture and the chosen one."""
        plan = self.plan(form)
        uncached = self._draw(say, form, _UNCACHED, (0, 2))
        alone = markup.picture(uncached.image, "The uncached picture", "uncached; next the other")
        say("uncached", uncached.steps, uncached.steps, f'<div class="hgc-cards">{alone}</div>')
        other = self._draw(say, form, plan, (1, 2))
        return (
            f'<div class="hgc-cards">{markup.slider(uncached, other)}'
            f"{markup.difference_map(other, uncached)}</div>{markup.warned(other)}"
            f"{markup.strip(other)}{markup.figures(uncached, [other])}"
            f"{self._code(form, plan, other)}"
        )

    def gallery(self, form: Form, say: Say) -> str:
        """All presets, each beside the run with fewer steps that costs as many MACs."""
        presets = hgc.presets()
        plans = [_UNCACHED]
        for name, config in presets.items():
            plans.append(_Plan(name, config))
            if not config.is_exact:
                plans.append(_Plan(f"fewer steps ({name})", None, config))
        drawn: list[Drawn] = []
        for i, plan in enumerate(plans):
            drawn.append(self._draw(say, form, plan, (i, len(plans))))
            say("gallery", i + 1, len(plans), markup.gallery(drawn))
        return markup.gallery(drawn) + markup.figures(drawn[0], drawn[1:])

    def begin(self, form: Form, blind: Blind, say: Say) -> tuple[str, Blind]:
        """Two pictures, A and B, one of them uncached, of another scene or other noise."""
        plan = self.plan(form)
        chance = random.SystemRandom()
        if self.has_scenes:
            image, prompt = self.scene(form.condition, chance.randrange(_SCENES))
            form = dataclasses.replace(form, picture=markup.picture_link(image), prompt=prompt)
        form = dataclasses.replace(form, seed=chance.randrange(2**32))
        pair = [self._draw(say, form, one, (i, 2)) for i, one in enumerate((_UNCACHED, plan))]
        if pair[0].image.tobytes() == pair[1].image.tobytes():
            raise Refused(f"{plan.name} gives the uncached picture bit for bit: choose another one")
        answer = chance.choice("AB")
        shown = dict(zip((answer, "BA"["AB".index(answer)]), pair, strict=True))
        cards = "".join(
            markup.picture(shown[which].image, f"Picture {which}", f"picture {which}")
            for which in "AB"
        )
        head = (
            f"<p>Round {blind.played + 1} of {ROUNDS}: “{markup.escape(form.prompt)}”. Which one "
            "is uncached?</p>"
        )
        return (
            f'{head}<div class="hgc-cards hgc-pair">{cards}</div>',
            dataclasses.replace(blind, answer=answer),
        )

    def guess(self, blind: Blind, which: str) -> tuple[str, Blind]:
        """What a guess was worth, and the test after it."""
        if not blind.answer:
            raise Refused("start the test first")
        right = which == blind.answer
        now = Blind(blind.played + 1, blind.right + right)
        said = f"{'Right' if right else 'Wrong'}: the uncached one was {blind.answer}. "
        said += f"{now.right} of {now.played} so far."
        if now.played == ROUNDS:
            chance = sum(math.comb(ROUNDS, k) for k in range(now.right, ROUNDS + 1)) / 2**ROUNDS
            said += (
                f" That was the last round: {now.right} of {ROUNDS}. Guessing gets as many or more "
                f"in {chance:.0%} of tests."
            )
        return f'<p class="hgc-score" role="status">{said}</p>', now

    def words(self, form: Form, say: Say) -> str:
        """A panel a word: where it looked, averaged over heads, layers and key evaluations."""
        plan = self.plan(form)
        config = (plan.config or self.plans["exact"]).replace(fresh_values=True)
        drawn = self._draw(say, form, _Plan(plan.name, config))
        pipe, asked, _ = self.read(form)
        return (
            f"<p>{markup.escape(drawn.name)}: lighter is where a word looked more.</p>"
            f'<div class="hgc-cards hgc-words">{_panels(pipe.tokenizer, asked.prompt, drawn)}</div>'
        )

    def edited(self, form: Form, prompt: Any, step: Any, say: Say) -> str:
        """The prompt changed after some steps, its words where the first prompt's layout has them;
        beside it the first prompt's picture."""
        plan = self.plan(form)
        pipe, asked, steps = self.read(form)
        prompt, step = prompt_of(prompt), number("the step", step, 1, steps - 1)
        config = (plan.config or self.plans["exact"]).replace(
            name="layout kept",
            fresh_values=True,
            attention="reuse",
            # from the step on, whichever way the product with the steps is rounded
            attention_gate=(step - 0.5) / steps,
        )
        found = pipe.encode_prompt(
            prompt=prompt, device=pipe.device, num_images_per_prompt=1,
            do_classifier_free_guidance=asked.guidance > 1,
        )  # fmt: skip
        import torch

        embeds = found[0] if found[1] is None else torch.cat([found[1], found[0]])
        before = self._draw(say, form, _Plan("the first prompt", plan.config), (0, 3))
        kept = self._draw(say, form, _Plan("changed, layout kept", config), (1, 3),
                          prompts={step: embeds})  # fmt: skip
        plain = self._draw(say, form, _Plan("changed, without hgc", None), (2, 3),
                           prompts={step: embeds})  # fmt: skip
        text = f"changed after step {step} to “{prompt}”"
        beside = markup.picture(plain.image, plain.name, "for comparison: the same without hgc")
        return (
            f"<p>{markup.escape(text)}</p>"
            f'<div class="hgc-cards">{markup.slider(before, kept)}'
            f"{beside}</div>{markup.warned(kept)}{markup.strip(kept)}"
        )

    def _code(self, form: Form, plan: _Plan, drawn: Drawn) -> str:
        """The lines that give a picture, and what they need as files."""
        _, asked, _ = self.read(form)
        links, heads = [], ["import hgc", "import torch"]
        if plan.config is not None:
            text = plan.config.to_json() + "\n"
            link = markup.data_link(text.encode(), "application/json")
            links.append((f"{_file(plan.name)}.json", link, "the configuration"))
        condition = 'Image.open("condition.png")'
        if not self._is_scene(form, asked):
            heads.append("from PIL import Image")
            links.append(("condition.png", markup.picture_link(asked.condition), "the condition"))
        else:
            condition = (
                f"testbed.condition_image(testbed.held_out(1, {int(form.scene)})[0], "
                f"{form.condition!r})"
            )
        if self.has_scenes:
            heads.append("from hgc import testbed")
            load = f"pipe = testbed.load_pipeline({form.condition!r})"
        else:
            heads.append("from diffusers import AutoPipelineForText2Image, ControlNetModel")
            load = "pipe = ...  # as you load yours"
        lines = [load]
        if form.scheduler != OWN:
            heads.append("from hgc.evaluation import make_scheduler")
            lines.append(
                f"pipe.scheduler = make_scheduler({form.scheduler!r}, pipe.scheduler.config)"
            )
        if plan.config is not None:
            known = plan.config == hgc.presets().get(plan.name)
            config = plan.name if known else f"{_file(plan.name)}.json"
            lines.append(f'hgc.install(pipe, config="{config}")')
        lines.append(
            f"image = pipe({asked.prompt!r}, image={condition}, "
            f"num_inference_steps={drawn.steps}, guidance_scale={asked.guidance}, "
            f"generator=torch.Generator().manual_seed({asked.seed})).images[0]"
        )
        return markup.code(heads, lines, links)

    def _is_scene(self, form: Form, asked: Asked) -> bool:
        """Whether the condition is the one of the held-out scene on the screen, unchanged."""
        if not self.has_scenes:
            return False
        image, _ = self.scene(form.condition, form.scene)
        return image.tobytes() == asked.condition.tobytes()


_UNCACHED = _Plan("uncached", None)


def _file(name: str) -> str:
    """A file's name made of a configuration's."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in name)
    return kept.strip(".-") or "plan"


def _panels(tokenizer: Any, prompt: str, drawn: Drawn) -> str:
    ids = tokenizer(prompt, truncation=True).input_ids[: drawn.maps.shape[1]]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    words: list[tuple[str, list[int]]] = []
    open_word = False
    for i, (one, token) in enumerate(zip(ids, tokens, strict=True)):
        if one in tokenizer.all_special_ids:
            continue
        text = token.removesuffix("</w>")
        if open_word:
            words[-1] = (words[-1][0] + text, [*words[-1][1], i])
        else:
            words.append((text, [i]))
        open_word = not token.endswith("</w>")
    panels = []
    for word, at in words:
        figure = hgc.plot_maps(drawn.maps[0], drawn.image, {"": at})
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=100, transparent=True)
        with Image.open(file) as image:
            panels.append(
                markup.picture(image.convert("RGBA"), f"Where “{word}” looked", markup.escape(word))
            )
    return "".join(panels)
