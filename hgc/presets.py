"""The presets. Each figure is for SD1.5 + ControlNet at 512x512 with classifier-free guidance,
in the paper's convention (attention matmuls not counted), against 18.20T for 20 full steps."""

from __future__ import annotations

from hgc.config import Config

PRESETS: dict[str, Config] = {
    config.name: config
    for config in (
        # Loss-free reuse only: bit-identical images.
        Config(name="exact"),
        # At or under 6.70T, the figure of the paper (arXiv 2511.11031).
        Config(
            name="paper",
            key_steps=(0, 3, 6, 9, 12, 15, 19),
            depth=1,
            guidance="reuse",
            forecast=0.7,
            guidance_forecast=0.7,
        ),
        # At or under 5.6T.
        Config(
            name="balanced",
            key_steps=(0, 4, 9, 14, 19),
            depth=2,
            guidance="reuse",
            forecast=0.9,
            guidance_forecast=0.9,
        ),
        # At or under 4.6T.
        Config(
            name="fast",
            num_evaluations=12,
            key_steps=(0, 3, 7, 11),
            depth=3,
            guidance="reuse",
            forecast=0.8,
            guidance_forecast=0.8,
        ),
        # At or under 4.0T.
        Config(
            name="turbo",
            num_evaluations=10,
            key_steps=(0, 3, 6, 9),
            depth=2,
            guidance="reuse",
            forecast=0.8,
            guidance_forecast=0.8,
        ),
    )
}
