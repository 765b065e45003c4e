"""Seeded scenes with exact labels: what the testbed's model is trained on and judged by.

A scene is a 64 x 64 picture of a ground, a sky and three to five overlapping solids, each covered
with one of ten materials. Colours vary within a material and several materials share a hue (brick
and wood, grass and foliage, water and tent), so a picture must carry the pattern, not the colour
alone, to be recognised. Everything is a pure function of the seed.
"""

from __future__ import annotations

import dataclasses

import numpy as np

__all__ = [
    "CLASSES",
    "GROUNDS",
    "HELD_OUT_SEED",
    "LIGHTS",
    "MATERIALS",
    "PALETTE",
    "SHAPES",
    "SIZE",
    "Scene",
    "caption_of",
    "render",
]

SIZE = 64
CLASSES = (
    "sky",
    "grass",
    "water",
    "sand",
    "rock",
    "brick",
    "wood",
    "foliage",
    "checker",
    "tent",
)
GROUNDS = ("grass", "water", "sand")
MATERIALS = ("rock", "brick", "wood", "foliage", "checker", "tent")
SHAPES = ("box", "ball", "cone", "gem")
LIGHTS = ("day", "dusk", "night", "fog")

# Colours of the segmentation condition, one a class; far apart so that a resize cannot confuse two.
PALETTE = np.array(
    [
        (110, 190, 255),
        (60, 200, 60),
        (0, 60, 220),
        (240, 220, 120),
        (128, 128, 128),
        (200, 40, 30),
        (130, 70, 10),
        (0, 100, 40),
        (230, 0, 200),
        (255, 255, 255),
    ],
    dtype=np.uint8,
)

# Training uses seeds from 0 up; held-out scenes start here, so the two never meet.
HELD_OUT_SEED = 1_000_000_000


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """One rendered scene.

    seed: the seed it was rendered from.
    image: uint8 [64, 64, 3], RGB.
    segmentation: uint8 [64, 64], index into `CLASSES`.
    depth: float32 [64, 64] in [0, 1]; 1 is nearest, 0 is the sky.
    caption: names the light, the ground and every visible solid with its material.
    light: one of `LIGHTS`.
    ground: one of `GROUNDS`.
    solids: (material, shape) of each visible solid, from far to near.
    """

    seed: int
    image: np.ndarray
    segmentation: np.ndarray
    depth: np.ndarray
    caption: str
    light: str
    ground: str
    solids: tuple[tuple[str, str], ...]


_YY, _XX = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)


def _smooth_noise(rng: np.random.Generator, cells_y: int, cells_x: int) -> np.ndarray:
    """Bilinear value noise in [0, 1] with the given number of cells, float32 [64, 64]."""
    grid = rng.random((cells_y + 1, cells_x + 1), dtype=np.float32)
    fy, fx = _YY * (cells_y / SIZE), _XX * (cells_x / SIZE)
    y0, x0 = fy.astype(np.int32), fx.astype(np.int32)
    dy, dx = fy - y0, fx - x0
    top = grid[y0, x0] * (1 - dx) + grid[y0, x0 + 1] * dx
    bottom = grid[y0 + 1, x0] * (1 - dx) + grid[y0 + 1, x0 + 1] * dx
    return top * (1 - dy) + bottom * dy


def _mix(a: tuple[float, ...], b: tuple[float, ...], weight: np.ndarray) -> np.ndarray:
    weight = weight[..., None]
    return np.asarray(a, np.float32) * (1 - weight) + np.asarray(b, np.float32) * weight


def _texture(material: str, rng: np.random.Generator) -> np.ndarray:
    """A full frame of one material, float32 [64, 64, 3] in about [0, 1]."""
    phase_y, phase_x = rng.uniform(0, 16, 2)
    y, x = _YY + np.float32(phase_y), _XX + np.float32(phase_x)
    if material == "sky":
        clouds = np.clip(_smooth_noise(rng, 6, 4) * 2.2 - 1.0, 0, 1)
        base = _mix((0.30, 0.52, 0.86), (0.66, 0.82, 0.97), _YY / SIZE)
        out = base * (1 - 0.7 * clouds[..., None]) + 0.7 * clouds[..., None]
    elif material == "grass":
        blades = _smooth_noise(rng, 12, 32)
        out = _mix((0.16, 0.42, 0.10), (0.52, 0.74, 0.24), blades)
    elif material == "water":
        wave = 0.5 + 0.5 * np.sin(2 * np.pi * y / rng.uniform(5, 7) + 1.2 * np.sin(x / 5))
        out = _mix((0.08, 0.28, 0.58), (0.36, 0.64, 0.82), wave)
    elif material == "sand":
        dunes = 0.6 * _smooth_noise(rng, 10, 4) + 0.4 * _smooth_noise(rng, 24, 24)
        out = _mix((0.68, 0.52, 0.30), (0.95, 0.85, 0.60), dunes)
    elif material == "rock":
        strata = 0.5 + 0.5 * np.sin((x + y) * (2 * np.pi / rng.uniform(8, 11)))
        weight = 0.55 * strata + 0.45 * _smooth_noise(rng, 14, 14)
        out = _mix((0.28, 0.27, 0.32), (0.70, 0.68, 0.72), weight)
    elif material == "brick":
        height, width = 5, 10
        row = np.floor(y / height)
        mortar = (np.mod(y, height) < 1) | (np.mod(x + (row % 2) * width / 2, width) < 1)
        tone = _smooth_noise(rng, 12, 8)
        out = _mix((0.56, 0.20, 0.13), (0.78, 0.36, 0.22), tone)
        out[mortar] = (0.84, 0.76, 0.68)
    elif material == "wood":
        plank = rng.uniform(6, 8)
        grain = 0.5 + 0.5 * np.sin(x * 2 * np.pi / plank + 2 * _smooth_noise(rng, 3, 16))
        out = _mix((0.36, 0.18, 0.07), (0.74, 0.46, 0.22), grain)
    elif material == "foliage":
        blobs = np.clip(_smooth_noise(rng, 11, 11) * 2.6 - 0.8, 0, 1)
        out = _mix((0.03, 0.20, 0.09), (0.34, 0.56, 0.20), blobs)
    elif material == "checker":
        cell = rng.uniform(4.5, 6)
        odd = np.mod(np.floor(x / cell) + np.floor(y / cell), 2)
        out = _mix((0.78, 0.14, 0.52), (0.96, 0.82, 0.24), odd)
    else:  # tent
        stripe = np.mod(x - y, 9) < 4.5
        out = _mix((0.92, 0.92, 0.95), (0.14, 0.34, 0.72), stripe.astype(np.float32))
    # Hue and brightness vary within a material, so its mean colour alone does not name it.
    tint = 1 + rng.uniform(-0.13, 0.13, 3)
    return (out * tint * rng.uniform(0.86, 1.14)).astype(np.float32)


def _shape(shape: str, cy: float, cx: float, ry: float, rx: float) -> tuple[np.ndarray, np.ndarray]:
    """Mask (bool [64, 64]) and relief (float32 [64, 64], 1 at the centre and 0 at the rim)."""
    dy, dx = (_YY - cy) / ry, (_XX - cx) / rx
    if shape == "box":
        far = np.maximum(np.abs(dy), np.abs(dx))
    elif shape == "ball":
        far = np.sqrt(dy * dy + dx * dx)
    elif shape == "cone":
        far = np.maximum(np.abs(dy), np.abs(dx) * 2 / np.maximum(dy + 1, 1e-3))
    else:  # gem
        far = np.abs(dy) + np.abs(dx)
    return far <= 1, np.clip(1 - far, 0, 1).astype(np.float32)


def _light(
    image: np.ndarray, light: str, depth: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    level = rng.uniform(0.92, 1.06)
    if light == "day":
        return image * level
    if light == "dusk":
        return (image * (1.0, 0.66, 0.48) + (0.10, 0.02, 0.04)) * level
    if light == "night":
        return (image * (0.34, 0.42, 0.66) + (0.0, 0.01, 0.05)) * level
    haze = (0.32 + 0.33 * (1 - depth))[..., None]
    return image * (1 - haze) + np.asarray((0.80, 0.82, 0.84)) * level * haze


def caption_of(light: str, ground: str, solids: list[tuple[str, str]]) -> str:
    """The caption of a scene, e.g. "a dusk scene with sand, a brick ball, a tent box"."""
    named = list(dict.fromkeys(solids))
    return f"a {light} scene with {ground}" + "".join(f", a {m} {s}" for m, s in named)


def render(seed: int) -> Scene:
    """Render one scene; equal seeds give equal scenes on every machine with the same numpy."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(f"seed: expected an int, got {type(seed).__name__}")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")
    rng = np.random.default_rng(seed)
    light = LIGHTS[rng.integers(len(LIGHTS))]
    ground = GROUNDS[rng.integers(len(GROUNDS))]
    horizon = rng.uniform(20, 34)
    slope = rng.uniform(-0.12, 0.12)
    below = horizon + slope * (_XX - SIZE / 2) < _YY
    image = np.where(below[..., None], _texture(ground, rng), _texture("sky", rng))
    segmentation = np.where(below, CLASSES.index(ground), 0).astype(np.uint8)
    plane = 0.15 + 0.80 * np.clip((_YY - horizon) / (SIZE - horizon), 0, 1)
    depth = np.where(below, plane, 0.0).astype(np.float32)

    count = int(rng.integers(3, 6))
    # Far solids stand higher and are smaller, as perspective has it; drawn from far to near.
    nearness = np.sort(rng.uniform(0.0, 1.0, count))
    owner = np.full((SIZE, SIZE), -1)
    solids: list[tuple[str, str]] = []
    one_material = rng.random() < 0.15
    for index, near in enumerate(nearness):
        material = MATERIALS[rng.integers(len(MATERIALS))]
        if one_material and solids:
            material = solids[0][0]
        shape = SHAPES[rng.integers(len(SHAPES))]
        scale = 0.72 + 0.5 * near
        ry, rx = rng.uniform(8.5, 14.5) * scale, rng.uniform(8.5, 14.5) * scale
        base = horizon + 2 + near * (SIZE - 4 - horizon)
        cy, cx = base - ry, rng.uniform(6, SIZE - 6)
        mask, relief = _shape(shape, cy, cx, ry, rx)
        shade = 1.10 - 0.32 * np.clip((_YY - (cy - ry)) / (2 * ry), 0, 1)
        rim = 0.82 + 0.18 * np.clip(relief * 4, 0, 1)
        surface = _texture(material, rng) * (shade * rim)[..., None]
        image = np.where(mask[..., None], surface, image)
        segmentation[mask] = CLASSES.index(material)
        depth = np.where(mask, 0.20 + 0.70 * near + 0.10 * relief, depth)
        owner[mask] = index
        solids.append((material, shape))

    visible = [s for i, s in enumerate(solids) if np.count_nonzero(owner == i) >= 40]
    image = _light(image.astype(np.float32), light, depth, rng)
    image = np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)
    return Scene(
        seed=int(seed),
        image=image,
        segmentation=segmentation,
        depth=depth.astype(np.float32),
        caption=caption_of(light, ground, visible),
        light=light,
        ground=ground,
        solids=tuple(visible),
    )
