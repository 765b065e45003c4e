"""The embedding of time, of all timesteps of a run at once.

An evaluation embeds its timestep, and each resnet projects that: in a full one of SD1.5 with a
ControlNet 66 ops, on 2 rows each. For all timesteps of a run it is as many, once. Products of more
rows may be rounded otherwise, so this goes with :meth:`hgc.Installation.fuse`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from hgc.execute.call import ControlCall, UNetCall
from hgc.execute.functions import Functions
from hgc.models import controlnet, unet
from hgc.models.layer_calls import (
    EMBEDDING,
    TimeColumns,
    TimeRow,
    can_fuse,
    is_plain,
    project_time,
    projections,
)
from hgc.models.structure import modules_inside
from hgc.run.run import Run
from hgc.watch.weights import Sighting

__all__ = ["TimePath"]

Tensor = torch.Tensor

# The parts of a network that embed what there is beside sample, text and condition.
_PARTS = (
    "time_proj", "time_embedding", "time_embed_act", "class_embedding", "add_time_proj",
    "add_embedding", "control_type_proj", "control_add_embedding",
)  # fmt: skip
# Of a table: 50 steps of 40 pictures under guidance. One of SD1.5's UNet has 43 KB in
# half precision.
_MOST_ROWS = 4096


@dataclasses.dataclass(slots=True)
class _Table:
    """The rows of all timesteps of a run.

    Attributes:
        rows: [N, B, ...], or [N, 1, ...] where a batch's are all alike; None where they cannot be
            made.
        made_by: Layers and weights that made them, as they were; None of what cannot change.
        hooks: Of these layers.
        version: How often the timesteps were written to.
    """

    rows: Tensor | None = None
    columns: TimeColumns | None = None
    made_by: Sighting | None = None
    hooks: Sequence[dict[int, Any]] = ()
    version: int = 0


class TimePath:
    """Gives evaluations the row of their timestep, where layers are fused."""

    def __init__(self, functions: Functions) -> None:
        self._functions = functions

    def row(
        self, run: Run, net: Any, call: UNetCall | ControlCall, prefix: str, half: bool
    ) -> TimeRow | None:
        """That of the evaluation of ``run`` under way, in ``net``, whose cache entries begin with
        ``prefix``; None where the evaluation embeds its timestep itself.

        half: Of the conditional half of the batch.
        """
        if not (
            self._functions.fuses
            and self.pays(call.sample.device)
            and can_fuse()
            and run.config.max_cache_bytes is None  # which is for what saves more
            and not torch.is_inference_mode_enabled()
        ):
            return None
        timestep, name = run.position.timestep, f"{prefix}time"
        assert timestep is not None and run.now is not None
        if timestep.is_inference():
            return None
        table: _Table | None = run.time_tables.get(prefix)
        if table is None or not _holds(table, run.cache.kept(name), timestep):
            run.cache.drop_kept(name)
            table = run.time_tables[prefix] = _table(run, net, call)
            if table.rows is not None:
                run.cache.keep(name, table.rows)
        if table.rows is None or table.columns is None:
            return None
        row = table.rows[run.now.index]
        return TimeRow(row[len(row) // 2 :] if half else row, table.columns)

    @staticmethod
    def pays(device: torch.device) -> bool:
        """Whether launches cost anything there. On a CPU they do not."""
        return device.type != "cpu"


def _holds(table: _Table, kept: Tensor | None, timestep: Tensor) -> bool:
    if table.made_by is None:
        return True
    return (
        kept is table.rows
        and table.version == timestep._version
        and not any(table.hooks)
        and table.made_by.is_same()
    )


def _table(run: Run, net: Any, call: UNetCall | ControlCall) -> _Table:
    sample, timestep, total = call.sample, run.position.timestep, run.position.total
    assert timestep is not None
    version = timestep._version
    given = _given(net, call.arguments)
    rows = sample.shape[0] if given else 1
    parts = [
        (net, name, net._modules[name]) for name in _PARTS if net._modules.get(name) is not None
    ]
    inside = [
        (part, name, child)
        for _, _, top in parts
        for part in (top, *modules_inside(top))
        for name, child in part._modules.items()
        if child is not None
    ]
    resnets = projections(net)
    layers = [
        *parts, *inside, *((resnet, "time_emb_proj", resnet.time_emb_proj) for resnet in resnets)
    ]  # fmt: skip
    weights = [w for _, _, layer in layers for w in layer._parameters.values() if w is not None]
    if (
        given is None
        or total * rows > _MOST_ROWS
        or not all(is_plain(layer, *EMBEDDING) for _, _, layer in layers)
        or not all(type(w) is torch.nn.Parameter and w.device == sample.device for w in weights)
        or not all(x.shape[0] == rows and not x.is_inference() for x in _tensors(given))
    ):
        return _Table()
    made_by = Sighting(
        0,
        [place for layer in layers for place in _places(*layer)],
        weights,
        [w._version for w in weights],
    )
    timesteps = timestep.as_strided((total,), (1,), 0).to(sample.device)
    embed: Callable[..., Tensor] = (
        unet.embed if isinstance(net, UNet2DConditionModel) else controlnet.embed
    )
    emb = embed(
        net, sample.new_empty((total * rows, 0)),
        timesteps[:, None].expand(total, rows).reshape(-1), None, **_repeated(given, total),
    )  # fmt: skip
    found, columns = project_time(resnets, emb)
    hooks = [h for _, _, each in layers for h in (each._forward_hooks, each._forward_pre_hooks)]
    return _Table(found.unflatten(0, (total, rows)), columns, made_by, hooks, version)


def _given(net: Any, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """What an embedding is made of beside the timestep, with a row a sample; None where it has
    other things in it."""
    kind, found = net.config.addition_embed_type, {}
    if kind not in (None, "text_time"):
        return None
    if net._modules.get("class_embedding") is not None:
        found["class_labels"] = arguments["class_labels"]
    if kind == "text_time":
        added = arguments["added_cond_kwargs"] or {}
        found["added_cond_kwargs"] = {
            name: added[name] for name in ("text_embeds", "time_ids") if name in added
        }
    for name in ("timestep_cond", "control_type"):
        if arguments.get(name) is not None:
            found[name] = arguments[name]
    return found


def _tensors(given: dict[str, Any]) -> list[Tensor]:
    nested = [x.values() if isinstance(x, dict) else (x,) for x in given.values()]
    return [x for values in nested for x in values]


def _repeated(given: dict[str, Any], times: int) -> dict[str, Any]:
    """Each tensor ``times`` times, one after the other."""
    return {
        name: _repeated(value, times)
        if isinstance(value, dict)
        else value.repeat(times, *[1] * (value.dim() - 1))
        for name, value in given.items()
    }


def _places(parent: Any, name: str, layer: Any) -> list[tuple[dict[str, Any], str, Any]]:
    """Where a layer, its weights and settings are, and what is there."""
    own = layer.__dict__
    settings = [key for key in own if key[0] != "_" and key != "training"]
    return [
        (parent._modules, name, layer),
        (own, "forward", None),
        *((layer._parameters, key, value) for key, value in layer._parameters.items()),
        *((own, key, own[key]) for key in settings if not isinstance(layer, torch.nn.Linear)),
    ]
