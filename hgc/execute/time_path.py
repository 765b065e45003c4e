"""The embedding of time, of all timesteps of a run at once.

An evaluation embeds its timestep, and each resnet projects that: in a full one of SD1.5 with a
ControlNet 66 ops, on 2 rows each. For all timesteps of a run it is as many, once. Products of more
rows may be rounded otherwise, so this goes with :meth:`hgc.Installation.fuse`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

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
from hgc.run.run import Run
from hgc.watch.trust import hook_on_all_modules
from hgc.watch.weights import Place, Sighting

__all__ = ["TimePath"]

Tensor = torch.Tensor

# The parts of a network that embed what there is beside sample, text and condition.
_PARTS = (
    "time_proj", "time_embedding", "time_embed_act", "class_embedding", "add_time_proj",
    "add_embedding", "control_type_proj", "control_add_embedding",
)  # fmt: skip
_METHODS = ("get_class_embed", "get_aug_embed")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# Of a table: 50 steps of 40 pictures under guidance. One of SD1.5's UNet has 43 KB in
# half precision.
_MOST_ROWS = 4096


@dataclasses.dataclass(slots=True)
class _Table:
    """The rows of all timesteps of a run.

    Attributes:
        rows: [N, B, ...], or [N, 1, ...] where a batch's are all alike.
        made_by: What made them, as it was.
        timesteps: How often they were written to.
    """

    rows: Tensor
    columns: TimeColumns
    made_by: _Makers
    timesteps: int


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
            and not hook_on_all_modules()
        ):
            return None
        timestep, name = run.position.timestep, f"{prefix}time"
        assert timestep is not None and run.now is not None
        if timestep.is_inference():
            return None
        # False: it cannot be made in this run
        table: _Table | Literal[False] | None = run.time_tables.get(prefix)
        if table is False:
            return None
        if not (
            table is not None
            and run.cache.kept(name) is table.rows
            and table.timesteps == timestep._version
            and table.made_by.are_as_they_were()
        ):
            run.cache.drop_kept(name)
            table = _table(run, net, call)
            run.time_tables[prefix] = table or False
            if table is None:
                return None
            run.cache.keep(name, table.rows)
        row = table.rows[run.now.index]
        return TimeRow(row[len(row) // 2 :] if half else row, table.columns)

    @staticmethod
    def pays(device: torch.device) -> bool:
        """Whether launches cost anything there. On a CPU they do not."""
        return device.type != "cpu"


class _Makers:
    """What makes the rows of a network: the layers that embed, and the projections of resnets."""

    def __init__(self, net: Any) -> None:
        self.resnets = projections(net)
        self._own = own = net.__dict__
        within = [(net, name, net._modules.get(name)) for name in _PARTS]
        for _, _, layer in within:  # grows while it is walked
            if layer is not None:
                within += [(layer, name, child) for name, child in layer._modules.items()]
        within += [(resnet, "time_emb_proj", resnet.time_emb_proj) for resnet in self.resnets]
        self._layers = [layer for _, _, layer in within if layer is not None]
        self.weights = [w for x in self._layers for w in x._parameters.values() if w is not None]
        self._places: list[Place] = [
            (parent._modules, name, layer) for parent, name, layer in within
        ]
        self._places.append((own, "_internal_dict", own["_internal_dict"]))  # the configuration
        self._places += [(own, name, None) for name in _METHODS]

    def are_plain(self, device: torch.device) -> bool:
        """Whether each layer is one that torch or diffusers ship, called as they call it, with its
        weights on ``device`` and writes to them counted."""
        return (
            not any(name in self._own for name in _METHODS)
            and all(is_plain(x, *EMBEDDING) and not x._buffers for x in self._layers)
            and all(
                "weight" in x._parameters and not {"weight", "bias"} & x.__dict__.keys()
                for x in self._layers
                if isinstance(x, (torch.nn.Linear, torch.nn.Embedding))
            )
            and all(
                type(w) is torch.nn.Parameter and w.device == device and not w.is_inference()
                for w in self.weights
            )
        )

    def look(self) -> None:
        """Take note of how they are."""
        for layer in self._layers:
            own = layer.__dict__
            self._places += [
                (own, key, value)
                for key, value in own.items()
                if key[0] != "_" and not isinstance(layer, torch.nn.Linear)
            ]
            self._places += [(layer._parameters, *item) for item in layer._parameters.items()]
            self._places += [(own, key, own[key]) for key in ("_parameters", "_buffers", *_HOOKS)]
        self._hooks = [layer.__dict__[key] for layer in self._layers for key in _HOOKS]
        self._seen = Sighting(0, self._places, self.weights, [w._version for w in self.weights])
        self._state = self._now()

    def _now(self) -> tuple[list[Any], ...]:
        """What no place shows: classes, attributes that came, forwards, where weights are."""
        return (
            [*map(type, self._layers)],
            [*map(len, map(vars, self._layers))],
            [cls.forward for cls in EMBEDDING],
            [*map(Tensor.data_ptr, self.weights)],
        )

    def are_as_they_were(self) -> bool:
        """Whether nobody changed them, or put a hook on them, since they were looked at."""
        return self._seen.is_same() and not any(self._hooks) and self._now() == self._state


def _table(run: Run, net: Any, call: UNetCall | ControlCall) -> _Table | None:
    sample, timestep, total = call.sample, run.position.timestep, run.position.total
    assert timestep is not None
    version = timestep._version
    given, makers = _given(net, call), _Makers(net)
    if given is None or not makers.are_plain(sample.device):
        return None
    rows = sample.shape[0] if given else 1
    if total * rows > _MOST_ROWS:
        return None
    makers.look()
    timesteps = timestep.as_strided((total,), (1,), 0).to(sample.device)
    embed: Callable[..., Tensor] = (
        unet.embed if isinstance(net, UNet2DConditionModel) else controlnet.embed
    )
    emb = embed(
        net, sample.new_empty((total * rows, 0)),
        timesteps[:, None].expand(total, rows).reshape(-1), None, **_repeated(given, total),
    )  # fmt: skip
    found, columns = project_time(makers.resnets, emb)
    return _Table(found.unflatten(0, (total, rows)), columns, makers, version)


def _given(net: Any, call: UNetCall | ControlCall) -> dict[str, Any] | None:
    """What an embedding is made of beside the timestep, with a row a sample; None where that is
    other things, or writes to it are not counted."""
    kind, batch, arguments = net.config.addition_embed_type, call.sample.shape[0], call.arguments
    if kind not in (None, "text_time"):
        return None
    found: dict[str, Any] = {}
    tables = []  # tensors, and how many dimensions they have where each row is of a sample
    classes = net._modules.get("class_embedding")
    if classes is not None:
        by_number = (
            isinstance(classes, torch.nn.Embedding) or net.config.class_embed_type == "timestep"
        )
        found["class_labels"] = arguments["class_labels"]
        tables.append((found["class_labels"], 1 if by_number else 2))
    if kind == "text_time":
        added = arguments["added_cond_kwargs"] or {}
        found["added_cond_kwargs"] = {name: added.get(name) for name in ("text_embeds", "time_ids")}
        tables += [(value, 2) for value in found["added_cond_kwargs"].values()]
    for name in ("timestep_cond", "control_type"):
        if arguments.get(name) is not None:
            found[name] = arguments[name]
            tables.append((found[name], 2))
    fits = all(
        isinstance(x, Tensor) and x.dim() == dims and len(x) == batch and not x.is_inference()
        for x, dims in tables
    )
    return found if fits else None


def _repeated(given: dict[str, Any], times: int) -> dict[str, Any]:
    """Each tensor ``times`` times, one after the other."""
    return {
        name: _repeated(value, times)
        if isinstance(value, dict)
        else value.repeat(times, *[1] * (value.dim() - 1))
        for name, value in given.items()
    }
