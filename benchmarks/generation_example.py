"""A data set made by `hgc generate`, and a small segmenter that is trained on it.

    python benchmarks/generation_example.py maps conditions       # 64 class maps with captions
    hgc generate --data conditions --out pictures --images 2 --config fast --format folder
    python benchmarks/generation_example.py train conditions pictures

The maps are the testbed's; your own are PNGs and a metadata.jsonl as `maps` writes it. The
segmenter never sees a rendered picture in training and is judged on rendered ones of other scenes;
beside it stands the same segmenter, trained on the renders of the scenes that the maps are of.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from hgc import testbed
from hgc.testbed.scenes import CLASSES, PALETTE

_FIRST, _JUDGED = 1000, 64  # of the held-out scenes: tables use the first ones


def write_maps(folder: Path, count: int) -> None:
    """Class maps as pictures, class numbers beside them, and what is said of each."""
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w") as lines:
        for n, scene in enumerate(testbed.held_out(count, _FIRST)):
            testbed.condition_image(scene, "segmentation").save(folder / f"{n}.png")
            Image.fromarray(scene.segmentation).save(folder / f"{n}-classes.png")
            row = {"id": n, "text": scene.caption, "condition_file_name": f"{n}.png",
                   "label_file_name": f"{n}-classes.png"}  # fmt: skip
            lines.write(json.dumps(row) + "\n")


def read_pictures(pictures: Path) -> tuple[np.ndarray, list[int]]:
    """uint8 [N, H, W, 3], and the id of the map each was made of."""
    images, ids = [], []
    for lines in sorted(pictures.glob("shards/*/metadata.jsonl")):
        for line in lines.read_text().splitlines():
            row = json.loads(line)
            images.append(np.asarray(Image.open(lines.parent / row["file_name"])))
            ids.append(int(row["id"]))
    return np.stack(images), ids


def _net() -> nn.Sequential:
    layers: list[nn.Module] = []
    width = 3
    for dilation in (1, 2, 4, 8, 1):
        layers += [nn.Conv2d(width, 32, 3, padding=dilation, dilation=dilation),
                   nn.BatchNorm2d(32), nn.ReLU()]  # fmt: skip
        width = 32
    return nn.Sequential(*layers, nn.Conv2d(width, len(CLASSES), 1))


def _tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def train(images: np.ndarray, labels: np.ndarray, updates: int) -> nn.Module:
    """A segmenter of uint8 [N, H, W, 3] pictures with classes [N, H, W]."""
    torch.manual_seed(0)
    net = _net().train()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    x, y = _tensor(images), torch.from_numpy(labels).long()
    order = torch.Generator().manual_seed(0)
    for _ in range(updates):
        chosen = torch.randint(len(x), (16,), generator=order)
        loss = nn.functional.cross_entropy(net(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@torch.no_grad()
def mean_iou(net: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """Over the classes that occur."""
    seen = torch.cat([net(part).argmax(1) for part in _tensor(images).split(16)]).numpy()
    hit = np.bincount(labels[seen == labels], minlength=len(CLASSES))
    both = np.bincount(labels.ravel(), minlength=len(CLASSES)) + np.bincount(
        seen.ravel(), minlength=len(CLASSES)
    )
    return float((hit / np.maximum(both - hit, 1))[both > 0].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["maps", "train"])
    parser.add_argument("conditions", type=Path)
    parser.add_argument("pictures", type=Path, nargs="?")
    parser.add_argument("--count", type=int, default=64, help="maps")
    parser.add_argument("--updates", type=int, default=300)
    asked = parser.parse_args()
    if asked.what == "maps":
        write_maps(asked.conditions, asked.count)
        return
    images, ids = read_pictures(asked.pictures)
    maps = [np.asarray(Image.open(asked.conditions / f"{n}.png")) for n in sorted(set(ids))]
    # the class of a pixel is the colour of the map there
    classes = {n: (one[..., None, :] == PALETTE).all(-1).argmax(-1)
               for n, one in zip(sorted(set(ids)), maps, strict=True)}  # fmt: skip
    labels = np.stack([classes[n] for n in ids])
    judged = testbed.held_out(_JUDGED, _FIRST + 10_000)
    truth = np.stack([s.image for s in judged]), np.stack([s.segmentation for s in judged])
    truth = truth[0], truth[1].astype(np.int64)
    made = train(images, labels, asked.updates)
    print(f"trained on {len(images)} pictures of {len(classes)} maps: mean IoU on {_JUDGED} "
          f"rendered scenes {mean_iou(made, *truth):.3f}", flush=True)  # fmt: skip
    scenes = testbed.held_out(max(ids) + 1, _FIRST)
    renders = np.stack([s.image for s in scenes]), np.stack([s.segmentation for s in scenes])
    real = train(renders[0], renders[1].astype(np.int64), asked.updates)
    print(f"trained on the {len(scenes)} renders of the same maps: {mean_iou(real, *truth):.3f}")


if __name__ == "__main__":
    main()
