"""Which models and releases of torch and diffusers hgc supports, and what it says of others."""

from __future__ import annotations

import hashlib
import inspect
import types
from collections.abc import Iterable
from typing import Any

import diffusers
import torch
from diffusers import ControlNetModel, ControlNetUnionModel, UNet2DConditionModel
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from diffusers.models.controlnets.multicontrolnet_union import MultiControlNetUnionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets import unet_2d_blocks as blocks
from packaging.specifiers import SpecifierSet

from hgc.models.structure import modules_inside

__all__ = [
    "PACKAGES",
    "RELEASES",
    "check_unet",
    "controlnets",
    "has_compiled_parts",
    "in_dtype",
    "untested",
]

# Whose modules hgc knows.
PACKAGES = ("torch", "diffusers", "peft")

_DOWN = (blocks.CrossAttnDownBlock2D, blocks.DownBlock2D)
_UP = (blocks.CrossAttnUpBlock2D, blocks.UpBlock2D)
_MID = (blocks.UNetMidBlock2DCrossAttn, blocks.UNetMidBlock2D, type(None))

# hgc steps through parts of these forwards itself, so it must know them: the first 16 hex digits
# of the SHA-256 of their source, one set a diffusers release that the bitwise tests passed on.
_STEPPED_THROUGH = (
    UNet2DConditionModel.forward,
    ControlNetModel.forward,
    ControlNetUnionModel.forward,
    blocks.CrossAttnDownBlock2D.forward,
    blocks.DownBlock2D.forward,
    blocks.CrossAttnUpBlock2D.forward,
    blocks.UpBlock2D.forward,
    blocks.UNetMidBlock2DCrossAttn.forward,
    ResnetBlock2D.forward,
    Transformer2DModel.forward,
    Transformer2DModel._operate_on_continuous_inputs,
    Transformer2DModel._get_output_for_continuous_inputs,
)
_KNOWN_SOURCES = (
    "65161280e745a874",  # diffusers 0.35 and 0.36
    "0a9d1321c21e2117",  # 0.37 and 0.38
    "46080f0e472fc026",  # 0.39 and 0.40
    "673eb8dd166d11c1",  # 0.41 and 0.42
)

# Those that scripts/check_matrix.sh was run with, as pyproject.toml has them.
RELEASES = {"torch": ">=2.10,<2.15", "diffusers": ">=0.35.2,<0.43"}


def _fingerprint() -> str:
    """A hash of the diffusers forwards that hgc steps through; "" where their source is missing."""
    try:
        sources = [inspect.getsource(function) for function in _STEPPED_THROUGH]
    except OSError:  # a frozen application
        return ""
    return hashlib.sha256("".join(sources).encode()).hexdigest()[:16]


def untested() -> dict[str, str]:
    """Of torch and diffusers, those with which hgc was not tested, and what to say of them."""
    found = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    said = {
        name: f"{name} {version} is not one that hgc was tested with: {name}{RELEASES[name]} is"
        for name, version in found.items()
        if not SpecifierSet(RELEASES[name]).contains(version, prereleases=True)
    }
    if _fingerprint() not in _KNOWN_SOURCES:
        said.setdefault("diffusers", (
            f"the forwards of diffusers {found['diffusers']} are not those that hgc was tested "
            f"with: those of diffusers{RELEASES['diffusers']} are"
        ))  # fmt: skip
    if "diffusers" in said:
        said["diffusers"] += "; every evaluation is computed in full by diffusers itself"
    return said


def in_dtype(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """``dtype`` as an argument of ``from_pretrained``, which had another name before 0.40."""
    renamed = SpecifierSet(">=0.40").contains(diffusers.__version__, prereleases=True)
    return {"dtype" if renamed else "torch_dtype": dtype}


def _is_compiled(module: Any) -> bool:
    # by name: importing torch._dynamo takes seconds
    wrapped = any(cls.__name__ == "OptimizedModule" for cls in type(module).__mro__)
    return wrapped or getattr(module, "_compiled_call_impl", None) is not None


def has_compiled_parts(module: Any) -> bool:
    """Whether parts of ``module`` are compiled by themselves (``compile_repeated_blocks``)."""
    return module.__dict__.get("_compiled_call_impl") is not None or any(
        part.__dict__.get("_compiled_call_impl") is not None
        or type(part).__name__ == "OptimizedModule"
        for part in modules_inside(module)
    )


def _refuse_compiled(name: str, module: Any) -> None:
    if _is_compiled(module):
        raise TypeError(
            f"{name} is compiled by torch.compile, which would trace hgc's bookkeeping: pass the "
            "plain module (module._orig_mod of a compiled one), then call .compile() of the "
            "Installation"
        )


def _refuse_replaced(name: str, module: Any, base: Any) -> None:
    """hgc runs the layers of a model itself: a forward that is not diffusers' own would be lost."""
    if type(module).forward is not base.forward:
        raise TypeError(
            f"{name} is a {type(module).__name__} with a forward of its own, which hgc would not "
            f"run; supported: {base.__name__}"
        )
    # diffusers leaves its registry on the model when the hooks are gone
    if getattr(getattr(module, "_diffusers_hook", None), "hooks", None):
        raise TypeError(
            f"{name} ({type(module).__name__}) has diffusers hooks on it (group offload, a cache), "
            "which hgc would not run: remove them, install hgc first, then enable them"
        )
    slot = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
    own = module.__dict__.get(slot)
    plain = isinstance(own, types.MethodType) and own.__func__ is type(module).forward
    if own is not None and not plain and not hasattr(module, "_hgc_installation"):
        raise TypeError(
            f"the forward of {name} ({type(module).__name__}) was replaced by {own!r}, which hgc "
            "would not run: undo that first"
        )


def check_unet(unet: Any) -> None:
    """Raise TypeError, naming the class and the supported ones, where hgc cannot run ``unet``."""
    _refuse_compiled("unet", unet)
    if not isinstance(unet, UNet2DConditionModel):
        raise TypeError(f"unet must be a diffusers UNet2DConditionModel; got {type(unet).__name__}")
    _refuse_replaced("unet", unet, UNet2DConditionModel)
    for kind, found, supported in (
        ("down block", unet.down_blocks, _DOWN),
        ("up block", unet.up_blocks, _UP),
        ("mid block", [unet.mid_block], _MID),
    ):
        for block in found:
            if type(block) not in supported:
                names = ", ".join(c.__name__ for c in supported if c is not type(None))
                raise TypeError(
                    f"unet has a {kind} of class {type(block).__name__}; supported: {names}"
                )
    if unet.config.addition_embed_type == "image_hint":
        raise TypeError("unet has addition_embed_type='image_hint', which hgc does not support")


def controlnets(controlnet: Any) -> tuple[ControlNetModel | ControlNetUnionModel, ...]:
    """The single ControlNets in ``controlnet``: None, a model, a list, or a model of several.

    Raises TypeError naming the class of what is neither a ControlNetModel nor a
    ControlNetUnionModel.
    """
    if controlnet is None:
        return ()
    _refuse_compiled("controlnet", controlnet)
    if isinstance(controlnet, (MultiControlNetModel, MultiControlNetUnionModel)):
        nets: Iterable[Any] = controlnet.nets
    elif isinstance(controlnet, (list, tuple)):
        nets = controlnet
    else:
        nets = [controlnet]
    unique: list[ControlNetModel | ControlNetUnionModel] = []
    for net in nets:
        _refuse_compiled("controlnet", net)
        if type(net) not in (ControlNetModel, ControlNetUnionModel):
            raise TypeError(
                "controlnet must be a diffusers ControlNetModel, a list of them, a "
                "MultiControlNetModel, or the same of ControlNetUnionModel; "
                f"got {type(net).__name__}"
            )
        _refuse_replaced("controlnet", net, type(net))
        if all(net is not seen for seen in unique):
            unique.append(net)
    return tuple(unique)
