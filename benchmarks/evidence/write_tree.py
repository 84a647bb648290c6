"""Write a data set of the demo as folders of PNG files, for `mts-fast train`.

    python benchmarks/evidence/write_tree.py --data coloured-digits --seed 400 FOLDER

FOLDER gets real/, synthetic/, val/ and test/, a folder for each class in each. Names of synthetic
files begin with what is known of them, which no training reads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mts_fast.demo.data import DATA, make_scenario


def write_images(folder: Path, images: Tensor, labels: Tensor, kinds: list[str]) -> None:
    """PNG files of images [N, C, H, W] in [0, 1], in a folder for each class."""
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).squeeze(3).numpy()
    for i, (label, kind) in enumerate(zip(labels.tolist(), kinds, strict=True)):
        place = folder / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i]).save(place / f"{kind}-{i:05d}.png")


def write_tree(data: str, seed: int, out: Path) -> None:
    """All roles of one seed."""
    scenario = make_scenario(data, seed)
    real = ~scenario.is_synthetic
    kinds = [scenario.kinds[k].replace(" ", "-") if k >= 0 else "" for k in scenario.kind.tolist()]
    synthetic = [kind for kind, is_real in zip(kinds, real.tolist(), strict=True) if not is_real]
    pool = scenario.pool
    write_images(out / "real", pool.images[real], pool.labels[real], ["real"] * int(real.sum()))
    write_images(out / "synthetic", pool.images[~real], pool.labels[~real], synthetic)
    for role, part in (("val", scenario.val), ("test", scenario.test)):
        write_images(out / role, part.images, part.labels, [role] * len(part.labels))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=DATA, default="coloured-digits")
    parser.add_argument("--seed", type=int, default=400)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write_tree(arguments.data, arguments.seed, arguments.folder)


if __name__ == "__main__":
    main()
