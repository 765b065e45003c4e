"""hgc: a hybrid-grained cache that makes diffusers ControlNet pipelines faster.

``hgc.install(pipe)`` and the pipeline reuses between neighbouring steps what
hardly changes between them. See :class:`Config` for what is reused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hgc.planning.config import Calibration, Config, ConfigError, StepPlan, presets
from hgc.planning.rule import plan

if TYPE_CHECKING:
    from hgc.generation import GenerateError, generate
    from hgc.installation import Installation, install, uninstall
    from hgc.report.macs import MacCount, count_macs
    from hgc.report.report import Report
    from hgc.run.maps import plot_maps
    from hgc.tune.calibrate import calibrate

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "Config",
    "ConfigError",
    "GenerateError",
    "HgcWarning",
    "Installation",
    "MacCount",
    "Report",
    "StepPlan",
    "calibrate",
    "count_macs",
    "generate",
    "install",
    "plan",
    "plot_maps",
    "presets",
    "uninstall",
]

# torch and diffusers take seconds to import; Config and plan need neither.
_LAZY = {
    "GenerateError": "hgc.generation",
    "generate": "hgc.generation",
    "HgcWarning": "hgc.warn",
    "Installation": "hgc.installation",
    "install": "hgc.installation",
    "uninstall": "hgc.installation",
    "calibrate": "hgc.tune.calibrate",
    "MacCount": "hgc.report.macs",
    "count_macs": "hgc.report.macs",
    "plot_maps": "hgc.run.maps",
    "Report": "hgc.report.report",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'hgc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
