"""Installing the cache on a UNet and its ControlNets."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    DiffusionPipeline,
    UNet2DConditionModel,
)

from hgc.execute.engine import Engine
from hgc.execute.patch import owner_of
from hgc.models.captured import LIMIT, CapturedNetworks
from hgc.models.compiled import CompiledNetworks
from hgc.models.supported import check_unet, controlnets, has_compiled_parts
from hgc.planning.config import Config
from hgc.report.report import Report

__all__ = ["Installation", "install", "uninstall"]


class Installation:
    """The cache on one UNet and its ControlNets. Made by :func:`install`.

    A context manager: leaving the block uninstalls. One installation serves any number of threads,
    each with pipelines of its own on the shared models.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        engine.attach(self)

    @property
    def unet(self) -> UNet2DConditionModel:
        """The UNet it is on."""
        return self._engine.unet

    @property
    def controlnets(self) -> tuple[ControlNetModel | ControlNetUnionModel, ...]:
        """The ControlNets it is on."""
        return self._engine.controlnets

    @property
    def config(self) -> Config:
        """The configuration installed."""
        return self._engine.config

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._engine.patched is not None:
            self.uninstall()

    def reset(self) -> None:
        """Forget the calling thread's runs, and all captured graphs; the next evaluation starts a
        new run."""
        self._engine.reset()

    def uninstall(self) -> None:
        """Give the models back exactly as they were found.

        Raises RuntimeError where hgc is not installed any more, or a forward was replaced since.
        """
        if self._engine.patched is None:
            raise RuntimeError(_not_installed(self.unet))
        self._engine.detach()

    def compile(self, **options: Any) -> Installation:
        """Compile what the evaluations compute, of the UNet and of each ControlNet.

        Each kind of evaluation (a network at a depth, with the whole batch or its conditional half)
        is compiled at its first use, as one graph for each size; what decides and caches stays
        outside. ``dynamic=True`` makes one graph serve all sizes. Calling it again starts anew,
        with the new options.

        Args:
            options: For ``torch.compile``: ``mode``, ``dynamic``, ``backend``, ``options``.
                ``fullgraph`` is True unless given. ``mode="reduce-overhead"`` makes CUDA graphs.

        Returns:
            The installation itself.

        Raises:
            RuntimeError: hgc is not installed any more, or blocks of a model are compiled one by
                one already.
            TypeError: ``options`` names something that ``torch.compile`` does not take.
        """
        self._check_stand_in("compile")
        self._engine.functions.stand_in(CompiledNetworks(self.unet, self.controlnets, options))
        return self

    def capture(self, *, graphs: int = LIMIT) -> Installation:
        """Make each kind of evaluation one CUDA graph, with the bits of the eager evaluation.

        A kind is a network at a depth, with the whole batch or its conditional half, at one size,
        with one set of arguments that are no tensors (a LoRA's scale). Its first use runs eagerly,
        its second is captured, and the graph replayed from then on. What is not of a captured kind
        runs eagerly. Graphs share their memory: one thread at a time replays, others run eagerly.
        They go where a weight or a layer is replaced, with :meth:`reset` and with
        :meth:`uninstall`. Calling it again starts anew.

        Args:
            graphs: Held at most; where another is wanted, the least recently used one goes.

        Returns:
            The installation itself.

        Raises:
            RuntimeError: hgc is not installed any more, torch sees no CUDA device, or blocks of a
                model are compiled one by one already.
            ValueError: ``graphs`` is less than 1.
        """
        self._check_stand_in("capture")
        if type(graphs) is not int or graphs < 1:
            raise ValueError(f"graphs must be an integer of at least 1; got {graphs!r}")
        if not torch.cuda.is_available():
            raise RuntimeError("Installation.capture makes CUDA graphs, and torch sees no device")
        self._engine.functions.stand_in(
            CapturedNetworks(self.unet, self.controlnets, limit=graphs, say=self._engine.warn)
        )
        return self

    def fuse(self) -> Installation:
        """Run group norms as one op with what stands around them, where that is no compiled
        network: the sum of a resnet's features and its embedding of time, and the SiLU. On a GPU
        time is embedded for all timesteps of a run at once, where what embeds is diffusers' own.

        Made for channels_last, where PyTorch takes each norm to NCHW and back. Convert the models
        before: ``pipe.unet.to(memory_format=torch.channels_last)``, and ``pipe.controlnet``. Sums
        and products have another order, and in half precision the norm is not rounded before the
        SiLU: the result has not the bits of diffusers. Needs Triton; on a CPU it is PyTorch's own.
        Layers with hooks, under autocast and where gradients are wanted are diffusers' own. Graphs
        captured before go.

        Returns:
            The installation itself.

        Raises:
            RuntimeError: hgc is not installed any more.
            ValueError: the configuration is exact, which promises diffusers' bits.
        """
        if self._engine.patched is None:
            raise RuntimeError(_not_installed(self.unet))
        if self.config.is_exact:
            raise ValueError(
                f"config ({self.config.name}) is exact, which promises the bits of diffusers; "
                "Installation.fuse rounds otherwise"
            )
        self._engine.functions.fuse()
        return self

    def _check_stand_in(self, verb: str) -> None:
        """Raise where :meth:`compile` or :meth:`capture` cannot do what it says."""
        if self._engine.patched is None:
            raise RuntimeError(_not_installed(self.unet))
        for model in (self.unet, *self.controlnets):
            if has_compiled_parts(model):
                raise RuntimeError(
                    f"blocks of the {type(model).__name__} are compiled one by one already "
                    f"(compile_repeated_blocks): use that or Installation.{verb}, not both"
                )
        if not self._engine.is_active:
            self._engine.warn(
                verb,
                f"Installation.{verb} does nothing with this release of diffusers, since hgc runs "
                f"no evaluation itself: uninstall hgc and {verb} the models",
            )

    @property
    def peak_bytes(self) -> int:
        """The most bytes the calling thread's last run held at once; 0 before its first run."""
        run = self._engine.registry.last
        return 0 if run is None else run.cache.peak_bytes

    def _without_run(self) -> str:
        """Why the calling thread has no run."""
        if self._engine.registry.passed:
            return (
                "what this thread evaluated was left to diffusers, as a warning said, or was one "
                "evaluation alone"
            )
        return "call the pipeline first, in this thread"

    def maps(self) -> torch.Tensor:
        """Where each token of the prompt looked in the calling thread's last run.

        The cross-attention maps of the UNet, averaged over heads, layers and key evaluations: what
        the first prompt of the run asked for, where it was changed later. Held until the thread's
        next run ends.

        Returns:
            [images, tokens, h, w], float32, on the run's device, at the finest resolution with
            cross-attention; the tokens of a position sum to 1. Under classifier-free guidance the
            conditional half; of any other batch all rows. See :func:`hgc.plot_maps`.

        Raises:
            RuntimeError: this thread has made no run yet, or none that kept maps.
        """
        run = self._engine.registry.last
        if run is None:
            raise RuntimeError(f"no run whose maps to show: {self._without_run()}")
        if not self.config.fresh_values:
            raise RuntimeError(
                "no maps were kept: install with Config(fresh_values=True), for example "
                'config=hgc.Config.preset("balanced").replace(fresh_values=True)'
            )
        maps = run.attention_maps()
        if maps is None:
            raise RuntimeError(
                "no maps were kept: the run failed, max_cache_bytes left no room for them, or its "
                "cross-attention has processors, masks or options that hgc leaves to diffusers"
            )
        return maps

    def report(self) -> Report:
        """What the calling thread's last run did.

        Raises RuntimeError where this thread has made no run yet, and where its last evaluations
        were left to diffusers.
        """
        registry = self._engine.registry
        run = registry.last
        if run is None or not run.report or registry.passed:
            raise RuntimeError(f"no run to report on: {self._without_run()}")
        return Report.of(self.unet, self.config, run)


def _not_installed(unet: Any) -> str:
    return f"hgc is not installed on this {type(unet).__name__}"


def _models_of(unet: Any, controlnet: Any) -> tuple[Any, Any, Any]:
    """The UNet, the ControlNets and the pipeline, where one was given in place of the UNet."""
    if not isinstance(unet, DiffusionPipeline) or getattr(unet, "unet", None) is None:
        return unet, controlnet, None
    if controlnet is not None:
        raise TypeError(
            "controlnet must be left out where a pipeline is given (a configuration is given as "
            f"config=); got {type(controlnet).__name__} beside a {type(unet).__name__}"
        )
    return unet.unet, getattr(unet, "controlnet", None), unet


def install(
    unet: UNet2DConditionModel | DiffusionPipeline,
    controlnet: Any = None,
    config: Config | str = "balanced",
    *,
    scheduler: Any = None,
    trust: tuple[Any, ...] = (),
) -> Installation:
    """Make a UNet and its ControlNets reuse features between the steps of a run.

    Args:
        unet: A pipeline, or its ``pipe.unet``.
        controlnet: ``pipe.controlnet``: a ControlNetModel, a list of them, a MultiControlNetModel,
            the same of ControlNetUnionModel, or None for a pipeline without one. To be left out
            where a pipeline is given, whose own is taken.
        config: A :class:`~hgc.Config`, the name of a preset (:func:`hgc.presets` lists them), or
            the path of a JSON file.
        scheduler: That of the pipeline. A pipeline's own is known, and looked up at every run. Only
            configurations that forecast x0 ask for it; without one they forecast the model's own
            outputs, which is much worse, and warn.
        trust: Classes of modules and attention processors, and functions that are processors, of
            your own or of another package, that may be skipped at evaluations that reuse, and that
            treat each row of a batch by itself. A run of models with any other code inside that
            neither torch nor diffusers nor peft ship is left to diffusers, with a warning.

    Returns:
        The :class:`Installation`; ``with hgc.install(...):`` uninstalls at the end of the block.

    Raises:
        TypeError: a model is not supported, or is compiled already; its class is named. Or a
            pipeline was given, and something for ``controlnet`` beside it.
        ValueError: ``config`` names no preset, or does not fit the model.
        RuntimeError: hgc is installed on one of the models already.
    """
    config = Config.of(config)
    unet, controlnet, pipe = _models_of(unet, controlnet)
    check_unet(unet)
    nets = controlnets(controlnet)
    for module in (unet, *nets):
        if owner_of(module) is not None:
            raise RuntimeError(
                f"hgc is already installed on this {type(module).__name__}; call "
                "hgc.uninstall(unet, controlnet), or .uninstall() of the Installation, first. "
                "What two pipelines share is to be copied for each (copy.deepcopy)"
            )
    # a pipeline holds its UNet, which holds the installation; its scheduler holds neither, and
    # stays where the pipeline goes and another takes over its models
    held = weakref.ref(pipe) if pipe is not None and scheduler is None else lambda: None
    known = [getattr(pipe, "scheduler", None) if scheduler is None else scheduler]

    def current() -> Any:
        alive = held()
        if alive is not None:
            known[0] = getattr(alive, "scheduler", None)
        return known[0]

    return Installation(Engine(unet, nets, config, scheduler=current, trust=trust))


def uninstall(unet: UNet2DConditionModel | DiffusionPipeline, controlnet: Any = None) -> None:
    """Undo :func:`install`: both models are exactly as they were.

    Args:
        unet: The UNet hgc was installed on, or a pipeline with it.
        controlnet: Its ControlNets; they are uninstalled with the UNet whether given or not.

    Raises:
        RuntimeError: hgc is not installed on ``unet``, or its forward was replaced since.
    """
    unet, controlnet, _ = _models_of(unet, controlnet)
    installation = owner_of(unet)
    if installation is None:
        raise RuntimeError(_not_installed(unet))
    installation.uninstall()
