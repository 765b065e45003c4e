"""The presets: what each sets of the fields of :class:`hgc.Config`. Each figure is for SD1.5 +
ControlNet at 512x512 with classifier-free guidance, in the paper's convention (attention matmuls
not counted), against 18.20T for 20 full steps.

Between key evaluations nothing is run: x0 is forecast (docs/decisions/008 and 022). Where the keys
lie and how much of a slope is taken was searched on two models, on scenes that no table uses.
"""

from __future__ import annotations

from typing import Any

FIELDS: dict[str, dict[str, Any]] = {
    # Loss-free reuse only: bit-identical images.
    "exact": {},
    # 6.5T; at or under 6.70T, the figure of the paper (arXiv 2511.11031), with both its grains:
    # what the outermost decoder layer says of cached features, its cross-attention reused,
    # corrects the forecast.
    "paper": {
        "key_steps": (0, 2, 5, 8, 12, 16, 19),
        "attention": "reuse",
        "guidance": "reuse",
        "feature_damping": 0.95,
        "difference_damping": 0.35,
        "damping": 0.6,
        "guidance_damping": 0.4,
        "gain": 0.4,
    },
    # 5.37T; at or under 5.6T.
    "balanced": {"key_steps": (0, 2, 5, 9, 14, 18), "depth": 0},
    # 4.47T; at or under 4.6T.
    "fast": {"key_steps": (0, 3, 7, 12, 17), "depth": 0},
    # 3.58T; at or under 4.0T.
    "turbo": {"key_steps": (0, 4, 9, 16), "depth": 0},
}
