"""The presets. Each figure is for SD1.5 + ControlNet at 512x512 with classifier-free guidance,
in the paper's convention (attention matmuls not counted), against 18.20T for 20 full steps. They
were found by benchmarks/search_presets.py, on scenes that no table uses."""

from __future__ import annotations

from hgc.config import Config

PRESETS: dict[str, Config] = {
    config.name: config
    for config in (
        # Loss-free reuse only: bit-identical images.
        Config(name="exact"),
        # 6.55T; at or under 6.70T, the figure of the paper (arXiv 2511.11031).
        Config(
            name="paper",
            key_steps=(0, 2, 5, 8, 11, 15, 19),
            guidance="reuse",
            forecast=0.95,
            guidance_forecast=0.35,
        ),
        # 5.23T; at or under 5.6T.
        Config(
            name="balanced",
            key_steps=(0, 3, 7, 11, 16, 19),
            conditional_key_steps=(19,),
            guidance="reuse",
            forecast=1.0,
            guidance_forecast=0.35,
        ),
        # 4.58T; at or under 4.6T. Fewer steps and a cache multiply below 5T.
        Config(
            name="fast",
            num_evaluations=9,
            key_steps=(0, 2, 4, 6, 8),
            guidance="reuse",
            forecast=0.65,
            guidance_forecast=0.5,
        ),
        # 3.87T; at or under 4.0T.
        Config(
            name="turbo",
            num_evaluations=8,
            key_steps=(0, 2, 4, 6),
            depth=2,
            guidance="reuse",
            forecast=0.65,
            guidance_forecast=0.35,
        ),
    )
}
