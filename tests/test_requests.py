"""Sequences of requests: faults in the middle, threads, random changes. Never a wrong image.

`pytest -m "slow or not slow" tests/test_requests.py` runs the long ones too: 500 random requests,
8 threads with 50 images, 200 random sequences, the overhead of `exact`.
"""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import threading
import time
import warnings

import compatibility
import diffusers
import hypothesis
import models
import pytest
import torch
from hypothesis import stateful
from hypothesis import strategies as st

import hgc
from hgc import Config
from hgc.warn import HgcWarning

pytestmark = pytest.mark.filterwarnings("ignore::hgc.warn.HgcWarning")
SOME = Config(
    name="some",
    num_evaluations=8,
    key_steps=(0, 3, 6),
    depth=2,
    guidance="reuse",
    feature_damping=0.7,
)


def live_bytes() -> int:
    """Bytes of all tensors that are alive."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {
            x.untyped_storage()._cdata: x.untyped_storage().nbytes()
            for x in gc.get_objects()
            if issubclass(type(x), torch.Tensor) and x.layout == torch.strided and not x.is_meta
        }
    return sum(found.values())


# -- two at once -------------------------------------------------------------------------------


def test_a_text_that_another_run_under_way_has_is_a_change_of_text():
    """Two loops in turns on one UNet. The second goes over to the text object of the first, whose
    evaluation came just before: what was made from its own text must go."""
    first, second = (torch.cat([models.text(500), models.text(i)]) for i in (1, 2))

    def drawn(*, alone):
        unet = models.small_unet()
        times = torch.linspace(900, 10, 8).long()
        others = times.clone()
        x = y = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        with hgc.install(unet, config=SOME) as installed, torch.no_grad():
            for i in range(8):
                if not alone and i < 7:
                    y = y - 0.1 * unet(torch.cat([y] * 2), others[i], first)[0][1:]
                text = second if i < 2 else first
                x = x - 0.1 * unet(torch.cat([x] * 2), times[i], text)[0][1:]
            # the other's evaluation 7 never came, so this is the report of the second
            return x, [row.why for row in installed.report().rows]

    expected, why = drawn(alone=True)
    found, also = drawn(alone=False)
    assert why[2] == also[2] == "the text changed"
    assert torch.equal(found, expected)


# -- faults ------------------------------------------------------------------------------------


class Fault(Exception):
    pass


@contextlib.contextmanager
def fault(module, at, error):
    """Raise ``error`` inside ``module`` at its call number ``at``."""
    count = iter(range(10_000))

    def fail(x):
        if next(count) == at:
            raise error
        return type(module).forward(module, x)

    module.forward = fail
    try:
        yield
    finally:
        del module.forward


@pytest.mark.parametrize("where", ["unet", "controlnet", "callback", "KeyboardInterrupt", "memory"])
def test_after_a_fault_at_any_evaluation_the_next_request_is_right(where):
    pipe, other = compatibility.sd(), compatibility.sd()
    with hgc.install(other.unet, other.controlnet, config=SOME):
        expected = compatibility.call(other, 1)
    error = {"KeyboardInterrupt": KeyboardInterrupt, "memory": torch.OutOfMemoryError}.get(
        where, Fault
    )
    module = pipe.controlnet.conv_in if where == "controlnet" else pipe.unet.conv_out
    with hgc.install(pipe, config=SOME, trust=(torch.nn.Conv2d,)) as installed:
        compatibility.call(pipe, 1)
        before, faults = live_bytes(), 0
        for at in range(compatibility.STEPS):
            try:
                if where == "callback":

                    def fail(pipe, i, tensors, at=at):
                        if i == at:
                            raise Fault

                    compatibility.call(pipe, 0, **compatibility.callback(fail))
                else:
                    with fault(module, at, error):
                        compatibility.call(pipe, 0)
            except error:
                faults += 1
            image = compatibility.call(pipe, 1)
            assert torch.equal(image, expected), at
            assert sum(run.cache.bytes for run in installed._engine.registry.runs.values()) == 0
        del image
        # the ControlNet is computed at key evaluations only
        assert faults == (3 if where == "controlnet" else compatibility.STEPS)
        assert live_bytes() == before


# -- threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers, images", [(3, 6), pytest.param(8, 50, marks=pytest.mark.slow)])
def test_threads_with_a_pipeline_each_on_one_unet(workers, images):
    """Each image equals the one made alone."""
    pipe = compatibility.sd()
    classes = [diffusers.UniPCMultistepScheduler, diffusers.EulerDiscreteScheduler]

    def draw(k):
        own = compatibility.sd(
            unet=pipe.unet, controlnet=pipe.controlnet, scheduler=models.scheduler(classes[k % 2])
        )
        return compatibility.call(own, k, steps=6 + k % 3)

    with hgc.install(pipe.unet, pipe.controlnet, config=SOME):
        alone = [draw(k) for k in range(images)]
        together, waiting = {}, list(range(images))

        def work():
            while True:
                try:
                    k = waiting.pop()
                except IndexError:
                    return
                together[k] = draw(k)

        threads = [threading.Thread(target=work) for _ in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(together) == images
    for k, image in enumerate(alone):
        assert torch.equal(together[k], image), k


# -- random requests -----------------------------------------------------------------------------


def random_request(chance):
    """A function that makes one request of a pipeline on the given models."""
    size, steps, seed = chance.choice([16, 24, 32]), chance.randint(1, 9), chance.randint(0, 9)
    cls = chance.choice(
        [
            diffusers.StableDiffusionControlNetPipeline,
            diffusers.StableDiffusionControlNetImg2ImgPipeline,
        ]
    )
    scheduler = chance.choice(
        [
            diffusers.UniPCMultistepScheduler,
            diffusers.EulerDiscreteScheduler,
            diffusers.HeunDiscreteScheduler,
            diffusers.PNDMScheduler,
            diffusers.DDIMScheduler,
        ]
    )
    changes = {
        "guidance_scale": chance.choice([1.0, 3.0, 7.5]),
        "controlnet_conditioning_scale": chance.choice([0.0, 0.5, 1.0]),
        "control_guidance_end": chance.choice([0.5, 1.0]),
        "guess_mode": chance.random() < 0.2,
        "num_images_per_prompt": chance.choice([1, 1, 2]),
    }
    if "Img2Img" in cls.__name__:
        changes["strength"] = chance.choice([0.4, 0.7, 1.0])
        steps = max(steps, 3)

    # as SD's own configuration
    options = {"skip_prk_steps": True} if scheduler is diffusers.PNDMScheduler else {}

    def run(unet, controlnet):
        made = models.scheduler(scheduler, **options)
        pipe = compatibility.sd(cls, unet=unet, controlnet=controlnet, scheduler=made)
        return compatibility.call(pipe, seed, size=size, steps=steps, **changes)

    return run


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("config", [SOME, SOME.replace(adaptive=0.2)], ids=["rule", "adaptive"])
@pytest.mark.parametrize("runs", [8, pytest.param(500, marks=pytest.mark.slow)])
def test_random_requests_equal_those_of_a_fresh_installation(runs, config):
    chance = random.Random(7)
    served, twin = compatibility.sd(), compatibility.sd()
    installed = hgc.install(served.unet, served.controlnet, config=config)
    warm = held = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k in range(runs):
            request = random_request(chance)
            image = request(served.unet, served.controlnet)
            with hgc.install(twin.unet, twin.controlnet, config=config):
                expected = request(twin.unet, twin.controlnet)
            assert torch.equal(image, expected), k
            assert sum(run.cache.bytes for run in installed._engine.registry.runs.values()) == 0
            del image, expected, request
            if k >= 3 and (runs < 50 or k % 25 == 0):
                now = live_bytes()
                assert held is None or now == held, k
                held = now
            if k == 50:
                warm = resident_bytes()
    installed.uninstall()
    if warm is not None:
        assert resident_bytes() <= 1.05 * warm


# -- random sequences of everything --------------------------------------------------------------

CONFIGS = {
    "exact": Config.preset("exact"),
    "balanced": Config.preset("balanced"),
    "some": SOME,
    "attention": SOME.replace(attention="reuse", attention_gate=0.4, fresh_values=True),
    "skip": SOME.replace(depth=0, damping=0.6, guidance_damping=0.3),
    "adaptive": SOME.replace(adaptive=0.2),
}


class Counting:
    """An attention processor with state."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs
    ):
        self.calls += 1
        inner = diffusers.models.attention_processor.AttnProcessor2_0()
        return inner(attn, hidden_states, encoder_hidden_states, attention_mask)


class Sequences(stateful.RuleBasedStateMachine):
    """Install, draw, change, uninstall in any order, on models that are beside a twin without
    history."""

    def __init__(self) -> None:
        super().__init__()
        self.pipe, self.twin = compatibility.sd(), compatibility.sd()
        self.installed = None
        self.config = None
        self.loras = 0

    def both(self, change):
        change(self.pipe)
        change(self.twin)

    @stateful.rule(name=st.sampled_from(sorted(CONFIGS)))
    def install(self, name):
        if self.installed is not None:
            with pytest.raises(RuntimeError, match="already installed"):
                hgc.install(self.pipe, config=CONFIGS[name])
            return
        self.config = CONFIGS[name]
        self.installed = hgc.install(self.pipe, config=self.config)

    @stateful.rule()
    def uninstall(self):
        if self.installed is None:
            with pytest.raises(RuntimeError, match="not installed"):
                hgc.uninstall(self.pipe.unet, self.pipe.controlnet)
            return
        hgc.uninstall(self.pipe.unet, self.pipe.controlnet)
        self.installed = None
        for model in (self.pipe.unet, self.pipe.controlnet):
            assert not any(type(v).__module__.startswith("hgc") for v in model.__dict__.values())

    @stateful.rule(
        seed=st.integers(0, 3),
        steps=st.integers(3, 7),
        guidance=st.sampled_from([1.0, 3.0]),
        scale=st.sampled_from([0.0, 0.6]),
    )
    def draw(self, seed, steps, guidance, scale):
        changes = {
            "steps": steps, "size": 16, "guidance_scale": guidance,
            "controlnet_conditioning_scale": scale,
        }  # fmt: skip
        self.compare(lambda pipe: compatibility.call(pipe, seed, **changes))

    @stateful.rule(at=st.integers(0, 3))
    def change_the_prompt_in_a_run(self, at):
        def change(pipe, i, tensors):
            if i == at:
                return {"prompt_embeds": torch.cat([models.text(500), models.text(77)])}
            return {}

        arguments = compatibility.callback(change, "prompt_embeds")
        self.compare(lambda pipe: compatibility.call(pipe, 0, steps=6, size=16, **arguments))

    @stateful.rule(at=st.integers(0, 3))
    def fail_in_a_run(self, at):
        def fail(pipe, i, tensors):
            if i == at:
                raise Fault

        with pytest.raises(Fault):
            compatibility.call(self.pipe, 9, steps=5, size=16, **compatibility.callback(fail))

    @stateful.rule()
    def load_a_lora(self):
        if self.loras < 2:
            self.loras += 1
            weights = compatibility.lora_weights(self.loras)
            name = f"lora{self.loras}"
            self.both(lambda pipe: pipe.load_lora_weights(dict(weights), adapter_name=name))

    @stateful.rule(scale=st.sampled_from([0.3, 1.0]))
    def scale_the_loras(self, scale):
        if self.loras:
            names = [f"lora{k + 1}" for k in range(self.loras)]
            self.both(lambda pipe: pipe.set_adapters(names, [scale] * len(names)))

    @stateful.rule()
    def unload_the_loras(self):
        if self.loras:
            self.loras = 0
            self.both(lambda pipe: pipe.unload_lora_weights())

    @stateful.rule(on=st.booleans())
    def freeu(self, on):
        if on:
            self.both(lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6))
        else:
            self.both(lambda pipe: pipe.disable_freeu())

    @stateful.rule(on=st.booleans())
    def slicing(self, on):
        if on:
            self.both(lambda pipe: pipe.enable_attention_slicing(1))
        else:
            self.both(lambda pipe: pipe.disable_attention_slicing())

    @stateful.rule(kind=st.sampled_from(["AttnProcessor", "AttnProcessor2_0", "counting"]))
    def processors(self, kind):
        def put(pipe):
            if kind == "counting":
                made = Counting()
            else:
                made = getattr(diffusers.models.attention_processor, kind)()
            pipe.unet.set_attn_processor(made)

        self.both(put)

    @stateful.rule()
    def hot_swap(self):
        if self.loras:
            weights = compatibility.lora_weights(7)
            self.both(
                lambda pipe: pipe.load_lora_weights(
                    dict(weights), adapter_name="lora1", hotswap=True
                )
            )

    def compare(self, request):
        image = request(self.pipe)
        if self.installed is None or self.config.is_exact:
            expected = request(self.twin)
        else:
            with hgc.install(self.twin, config=self.config):
                expected = request(self.twin)
        assert torch.equal(image, expected)

    def teardown(self):
        if self.installed is not None:
            self.installed.uninstall()


def _sequences(count, steps):
    settings = hypothesis.settings(
        max_examples=count, stateful_step_count=steps, deadline=None, derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck), database=None,
    )  # fmt: skip
    stateful.run_state_machine_as_test(Sequences, settings=settings)


def test_random_sequences():
    _sequences(10, 8)


@pytest.mark.slow
def test_two_hundred_random_sequences():
    _sequences(200, 12)


# -- overhead -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_exact_costs_at_most_two_percent():
    """Paired and in turns; the time of this thread, not of others on the machine."""
    pipe = models.sd15_pipeline(
        models.sd15_unet(block_out_channels=(32, 64, 96, 96), norm_num_groups=8),
        models.sd15_controlnet(block_out_channels=(32, 64, 96, 96), norm_num_groups=8),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        models.draw(pipe, steps=4)
        ratios = []
        for _ in range(8):
            times = []
            for installed in (False, True):
                if installed:
                    hgc.install(pipe.unet, pipe.controlnet, config="exact")
                start = time.thread_time()
                models.draw(pipe, steps=10)
                times.append(time.thread_time() - start)
                if installed:
                    hgc.uninstall(pipe.unet, pipe.controlnet)
            ratios.append(times[1] / times[0])
    finally:
        torch.set_num_threads(threads)
    print(f"exact / without: median {statistics.median(ratios):.4f} of {sorted(ratios)}")
    assert statistics.median(ratios) <= 1.02


def test_one_step_is_a_run_and_nothing_to_warn_of():
    pipe = compatibility.sd()
    reference = compatibility.call(pipe, 0, steps=1)
    with hgc.install(pipe.unet, pipe.controlnet, config=SOME), warnings.catch_warnings():
        warnings.simplefilter("error", HgcWarning)
        for _ in range(2):
            assert torch.equal(compatibility.call(pipe, 0, steps=1), reference)


def test_what_is_held_in_a_list_is_seen_when_it_is_written_to():
    from hgc.run.snapshot import TensorSnapshot

    x, y = torch.zeros(2), torch.zeros(2)
    held, given = TensorSnapshot([x, y]), [x, y]
    assert held.is_([x, y]) and not held.is_([y, x]) and not held.is_((x, y))
    y.add_(1)
    assert not held.is_([x, y])
    held = TensorSnapshot(given)
    given[0] = y
    assert not held.is_(given)


def test_a_pipeline_whose_guidance_has_three_rows_keeps_maps():
    pipe = compatibility.sd(diffusers.StableDiffusionControlNetPAGPipeline)
    config = SOME.replace(fresh_values=True)
    with hgc.install(pipe.unet, pipe.controlnet, config=config) as installed:
        compatibility.call(pipe, 0)
        assert installed.maps().shape == (3, models.TOKENS, 16, 16)


def test_macs_of_a_controlnet_union_are_those_of_a_real_run():
    from hgc.report.macs import flop_counter, macs_of

    pipe = compatibility.xl(diffusers.StableDiffusionXLControlNetUnionPipeline)
    with hgc.install(pipe.unet, pipe.controlnet, config="exact") as installed:
        counter = flop_counter()
        with counter:
            compatibility.call(pipe, 0)
        report = installed.report()
    assert report.macs == macs_of(counter)
    count = hgc.count_macs(
        pipe.unet, pipe.controlnet, "exact", num_evaluations=8, height=32, tokens=models.TOKENS
    )
    assert (count.total, count.paper) == (report.macs.total, report.macs.paper)


def test_warnings_are_said_once():
    pipe = compatibility.sd()
    tight = SOME.replace(max_cache_bytes=100)
    with hgc.install(pipe.unet, pipe.controlnet, config=tight) as installed:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            images = [compatibility.call(pipe, 0) for _ in range(3)]
        said = [w for w in caught if issubclass(w.category, HgcWarning)]
        assert len(said) == 1 and "max_cache_bytes=100 is too small" in str(said[0].message)
        assert installed.peak_bytes <= 100
    assert all(torch.equal(image, images[0]) for image in images)
    assert torch.equal(compatibility.call(pipe, 0), images[0])  # nothing was reused: exact
