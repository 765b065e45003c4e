"""The executor on a GPU: `pytest -m gpu`."""

from __future__ import annotations

import models
import pytest
import torch

import hgc
from hgc import Config
from hgc.warn import HgcWarning

pytestmark = pytest.mark.gpu

SOME = Config(
    name="some",
    num_evaluations=10,
    key_steps=(0, 4, 9),
    depth=2,
    guidance="reuse",
    feature_damping=0.7,
    difference_damping=0.7,
)


@pytest.fixture(scope="module", params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def pipe(request):
    if not torch.cuda.is_available():
        pytest.fail("`pytest -m gpu` needs a CUDA GPU, and torch sees none")
    return models.sd15_pipeline().to("cuda", request.param)


@pytest.fixture(autouse=True)
def deterministic():
    """Bitwise comparisons are made under deterministic cuDNN settings."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


def draw(pipe, **changes):
    generator = torch.Generator("cuda").manual_seed(0)
    arguments = {
        "prompt_embeds": models.text(0).to("cuda", pipe.unet.dtype),
        "negative_prompt_embeds": models.text(500).to("cuda", pipe.unet.dtype),
        "generator": generator,
        **changes,
    }
    return models.draw(pipe, **arguments)


def test_exact_and_uninstalled_are_bitwise(pipe):
    reference = draw(pipe, steps=10)
    with hgc.install(pipe.unet, pipe.controlnet, config="exact"):
        assert torch.equal(draw(pipe, steps=10), reference)
    with hgc.install(pipe.unet, pipe.controlnet, config=SOME):
        draw(pipe, steps=10)
    assert torch.equal(draw(pipe, steps=10), reference)


def test_halves_are_taken_on_a_gpu_too(pipe):
    with hgc.install(pipe.unet, pipe.controlnet, config=SOME) as installed:
        draw(pipe, steps=10)
        rows = installed.report().rows
    assert [row.guidance for row in rows] == ["both"] * 2 + ["reuse"] * 2 + ["both"] + [
        "reuse"
    ] * 4 + ["both"]
    assert {row.why for row in rows} == {"plan"}


@pytest.mark.parametrize("config", [SOME, SOME.replace(adaptive=0.3)], ids=["rule", "adaptive"])
def test_nothing_waits_for_the_gpu(pipe, config):
    """Under torch's sync debug mode no call of the engine may synchronise."""
    with hgc.install(pipe.unet, pipe.controlnet, config=config):
        draw(pipe, steps=10)  # warm-up: libraries may synchronise when they load
        installed = {module: module.forward for module in (pipe.unet, pipe.controlnet)}
        for module, forward in installed.items():

            def watched(*args, _forward=forward, **kwargs):
                torch.cuda.set_sync_debug_mode("error")
                try:
                    return _forward(*args, **kwargs)
                finally:
                    torch.cuda.set_sync_debug_mode("default")

            module.forward = watched
        try:
            draw(pipe, steps=10)
        finally:
            for module, forward in installed.items():
                module.forward = forward


def test_key_evaluations_that_a_run_places_do_not_hang_on_timing(pipe):
    """Whether the device is ahead of the host or far behind, the decisions are the same, and the
    picture is that of a fixed rule with the key steps that were placed."""
    config = SOME.replace(adaptive=0.3, num_evaluations=16)
    found = []
    for busy in (False, True, True):
        with hgc.install(pipe.unet, pipe.controlnet, config=config) as installed:
            if busy:
                torch.cuda._sleep(500_000_000)
            latents = draw(pipe, steps=16)
            rows = installed.report().rows
        found.append((latents, tuple(row.index for row in rows if row.depth == "full")))
    placed = found[0][1]
    assert 2 < len(placed) < 16 and any(row.why.startswith("error ") for row in rows)
    fixed = config.replace(adaptive=None, key_steps=placed)
    with hgc.install(pipe.unet, pipe.controlnet, config=fixed):
        expected = draw(pipe, steps=16)
    for latents, keys in found:
        assert keys == placed and torch.equal(latents, expected)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_evaluations_follow_the_eager_ones(pipe, mode):
    """Three runs: the first compiles, the second records the graphs, the third replays them."""
    with hgc.install(pipe.unet, pipe.controlnet, config=SOME) as installed:
        eager = [draw(pipe, steps=10, prompt_embeds=text(pipe, s)).float() for s in range(3)]
        installed.compile(mode=mode)
        kinds = None
        for seed in range(3):
            out = draw(pipe, steps=10, prompt_embeds=text(pipe, seed)).float()
            # another compiler rounds otherwise at every layer of ten evaluations
            bound = 64 * torch.finfo(pipe.unet.dtype).eps * eager[seed].abs().max()
            assert (out - eager[seed]).abs().max() <= bound
            assert kinds is None or kinds == installed._engine.functions.networks.kinds
            kinds = installed._engine.functions.networks.kinds
    torch._dynamo.reset()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_fused_runs_follow_the_others_and_are_captured_bit_for_bit(pipe, memory_format):
    for model in (pipe.unet, pipe.controlnet):
        model.to(memory_format=memory_format)
    try:
        with hgc.install(pipe.unet, pipe.controlnet, config=SOME) as installed:
            eager = draw(pipe, steps=10).float()
            installed.fuse()
            fused = draw(pipe, steps=10)
            # other kernels round otherwise at every layer of ten evaluations
            bound = 64 * torch.finfo(pipe.unet.dtype).eps * eager.abs().max()
            assert (fused.float() - eager).abs().max() <= bound
            installed.capture()
            for _ in range(3):
                assert torch.equal(draw(pipe, steps=10), fused)
            assert installed._engine.functions.networks.counts["replayed"] > 0
    finally:
        for model in (pipe.unet, pipe.controlnet):
            model.to(memory_format=torch.contiguous_format)


def text(pipe, seed):
    return models.text(seed).to("cuda", pipe.unet.dtype)


def test_nothing_waits_for_the_gpu_when_compiled(pipe):
    with hgc.install(pipe.unet, pipe.controlnet, config=SOME) as installed:
        installed.compile(mode="reduce-overhead")
        for _ in range(3):
            draw(pipe, steps=10)
        watch(installed._engine.functions.networks)
        draw(pipe, steps=10)
    torch._dynamo.reset()


def watch(networks):
    """Make an error of whatever waits for the device in ``networks``."""
    for role in ("unet", "controlnet"):

        def watched(*args, _run=getattr(networks, f"run_{role}"), **kwargs):  # noqa: B008
            torch.cuda.set_sync_debug_mode("error")
            try:
                return _run(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        setattr(networks, f"run_{role}", watched)


# -- captured ---------------------------------------------------------------------------------

# As the presets: interval 2, whole key evaluations and halves, the encoder, attention and maps.
PLANS = {
    "some": SOME,
    "paper": Config.preset("paper"),
    "balanced": Config.preset("balanced"),
    "fast": Config.preset("fast"),
    "encoder": SOME.replace(encoder="reuse"),
    "attention": SOME.replace(attention_gate=0.4),
    "maps": SOME.replace(attention_gate=0.4, fresh_values=True),
    "adaptive": SOME.replace(adaptive=0.3),
    "exact": Config.preset("exact"),
}


@pytest.mark.parametrize("name", PLANS)
def test_captured_evaluations_are_bitwise_eager(pipe, name):
    """Three runs of each call: the first is eager, the second records, the third replays."""
    calls = [
        {},
        {"prompt_embeds": text(pipe, 3)},
        {"size": 48},
        {"controlnet_conditioning_scale": 0.4},
        {"num_images_per_prompt": 2},
    ]
    config = PLANS[name]
    with hgc.install(pipe.unet, pipe.controlnet, config=config) as installed:
        eager = [draw(pipe, steps=10, **call) for call in calls]
        installed.capture(graphs=64)
        for _ in range(3):
            for call, expected in zip(calls, eager, strict=True):
                assert torch.equal(draw(pipe, steps=10, **call), expected), call
        counts = installed._engine.functions.networks.counts
        assert counts["replayed"] > counts["recorded"] > 0
        assert set(counts) <= {"first use", "recorded", "replayed"}, counts


def test_captured_under_other_settings_of_torch(pipe):
    """Other kernels are other graphs, and the settings may change between runs."""
    flags = torch.backends.cudnn
    with hgc.install(pipe.unet, pipe.controlnet, config=SOME) as installed:
        installed.capture()
        for precise in (True, False, True):
            flags.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = not precise
            try:
                networks, installed._engine.functions.networks = (
                    installed._engine.functions.networks,
                    None,
                )
                eager = draw(pipe, steps=10)
                installed._engine.functions.networks = networks
                for _ in range(3):
                    assert torch.equal(draw(pipe, steps=10), eager)
            finally:
                flags.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False


def test_captured_in_turns_and_through_an_exception(pipe):
    """Two pipelines on one UNet, a run within a run, and one that ends in an exception."""
    other = models.sd15_pipeline(pipe.unet, pipe.controlnet).to("cuda", pipe.unet.dtype)

    def within(pipe, i, t, kwargs):
        if i == 4:
            inner.append(draw(other, steps=10, prompt_embeds=text(other, 8)))
        return {}

    def fails(pipe, i, t, kwargs):
        if i == 5:
            raise KeyboardInterrupt
        return {}

    with hgc.install(pipe.unet, pipe.controlnet, config=SOME) as installed:
        eager = draw(pipe, steps=10), draw(other, steps=10, prompt_embeds=text(other, 8))
        installed.capture()
        for _ in range(3):
            inner = []
            assert torch.equal(draw(pipe, steps=10, callback_on_step_end=within), eager[0])
            assert torch.equal(inner[0], eager[1])
            with pytest.raises(KeyboardInterrupt):
                draw(pipe, steps=10, callback_on_step_end=fails)
            assert torch.equal(draw(pipe, steps=10), eager[0])


def test_captured_graphs_follow_the_weights(pipe):
    """Written in place, moved, and put back."""
    with hgc.install(pipe.unet, pipe.controlnet, config=SOME) as installed:
        reference = draw(pipe, steps=10)
        installed.capture()
        for _ in range(3):
            assert torch.equal(draw(pipe, steps=10), reference)
        with torch.no_grad():
            pipe.unet.conv_out.weight.mul_(0.5)
        assert not torch.equal(draw(pipe, steps=10), reference)
        with torch.no_grad():
            pipe.unet.conv_out.weight.mul_(2.0)
        assert torch.equal(draw(pipe, steps=10), reference)
        pipe.to("cpu")
        torch.cuda.empty_cache()
        junk = torch.full((1 << 22,), float("nan"), device="cuda")
        pipe.to("cuda")
        for _ in range(3):
            assert torch.equal(draw(pipe, steps=10), reference)
        pipe.unet.to(memory_format=torch.channels_last)
        installed._engine.functions.networks, networks = None, installed._engine.functions.networks
        last = draw(pipe, steps=10)
        installed._engine.functions.networks = networks
        for _ in range(3):
            assert torch.equal(draw(pipe, steps=10), last)
        pipe.unet.to(memory_format=torch.contiguous_format)
        del junk


def test_captured_graphs_are_freed(pipe):
    with hgc.install(pipe.unet, pipe.controlnet, config=SOME) as installed:
        for _ in range(2):
            draw(pipe, steps=10)
        installed.reset()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            installed.capture()
            for _ in range(3):
                draw(pipe, steps=10)
            assert installed._engine.functions.networks.graphs > 0
            installed.reset()
            assert installed._engine.functions.networks.graphs == 0
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() <= before + (1 << 20)


def test_other_streams_and_threads(pipe):
    """Each stream and each thread gets its own picture, whoever replays."""
    import threading

    with hgc.install(pipe.unet, pipe.controlnet, config=SOME) as installed:
        eager = [draw(pipe, steps=10, prompt_embeds=text(pipe, seed)) for seed in range(4)]
        installed.capture()
        for _ in range(2):
            draw(pipe, steps=10)
        found = {}

        def work(seed):
            own = models.sd15_pipeline(pipe.unet, pipe.controlnet).to("cuda", pipe.unet.dtype)
            stream = torch.cuda.Stream() if seed % 2 else torch.cuda.current_stream()
            with torch.cuda.stream(stream):
                found[seed] = [draw(own, steps=10, prompt_embeds=text(own, seed)) for _ in range(3)]
                stream.synchronize()

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for seed, expected in enumerate(eager):
            assert all(torch.equal(one, expected) for one in found[seed]), seed


def test_nothing_waits_for_the_gpu_when_captured(pipe):
    with hgc.install(pipe.unet, pipe.controlnet, config=SOME) as installed:
        installed.capture()
        for _ in range(3):
            draw(pipe, steps=10)
        watch(installed._engine.functions.networks)
        draw(pipe, steps=10)


def test_a_replayed_evaluation_is_one_graph(pipe):
    from torch.profiler import ProfilerActivity, profile

    with hgc.install(pipe.unet, pipe.controlnet, config=SOME) as installed:
        installed.capture()
        for _ in range(3):
            draw(pipe, steps=10)
        before = installed._engine.functions.networks.counts["replayed"]
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            draw(pipe, steps=10)
            torch.cuda.synchronize()
        replayed = installed._engine.functions.networks.counts["replayed"] - before
    # an evaluation of the UNet each, and the ControlNet's at key evaluations
    graphs = sum(e.count for e in profiled.key_averages() if "GraphLaunch" in e.key)
    assert graphs == replayed == 10 + 3


def test_what_cannot_be_captured_runs_eagerly(pipe, monkeypatch):
    """A network that waits for the device: said once, the bits of the eager run, and torch is as it
    was: random numbers, memory and other captures work on."""
    original = torch.nn.Conv2d.forward

    def waiting(self, x):
        if self is pipe.unet.conv_out:
            x.sum().item()
        return original(self, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", waiting)
    trust = (torch.nn.Conv2d,)  # its code is not torch's now
    with hgc.install(pipe.unet, pipe.controlnet, config=SOME, trust=trust) as installed:
        eager = draw(pipe, steps=10)
        installed.capture()
        with pytest.warns(HgcWarning, match="cannot be captured and runs eagerly"):
            for _ in range(3):
                assert torch.equal(draw(pipe, steps=10), eager)
        assert installed._engine.functions.networks.counts["could not be recorded"] > 0
        torch.randn(8, device="cuda")
        torch.cuda.empty_cache()
        monkeypatch.undo()
        installed.reset()
        for _ in range(3):
            assert torch.equal(draw(pipe, steps=10), eager)
        assert installed._engine.functions.networks.counts["replayed"] > 0
