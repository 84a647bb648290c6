"""Digits in printed and in symbol fonts, from the fonts that matplotlib ships."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SYMBOL_FONTS = ("cmex10", "cmsy10", "STIXSiz", "LastResort")
# glyphs are drawn this much larger than wanted and averaged down
OVERSAMPLING = 8
# a drawing with less ink than this is an empty or missing glyph
LEAST_INK = 0.02


def draw_glyphs(size: int, *, symbols: bool) -> tuple[Tensor, Tensor]:
    """(images [M, 1, size, size] in [0, 1], digit [M]) in every text or every symbol font."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    images, digits = [], []
    side = size * OVERSAMPLING
    for path in sorted(Path(get_data_path(), "fonts", "ttf").glob("*.ttf")):
        if path.name.startswith(SYMBOL_FONTS) != symbols:
            continue
        font = ImageFont.truetype(str(path), side)
        for digit in range(10):
            canvas = Image.new("L", (side, side))
            left, top, right, bottom = font.getbbox(str(digit))
            if right <= left or bottom <= top:
                continue
            glyph = Image.new("L", (int(right - left), int(bottom - top)))
            ImageDraw.Draw(glyph).text((-left, -top), str(digit), fill=255, font=font)
            height = side * 7 // 8
            width = max(1, min(side, round(glyph.width * height / glyph.height)))
            canvas.paste(glyph.resize((width, height)), ((side - width) // 2, (side - height) // 2))
            small = np.asarray(canvas.resize((size, size), Image.Resampling.BOX)) / 255.0
            if small.mean() > LEAST_INK:
                images.append(torch.from_numpy(small).float())
                digits.append(digit)
    return torch.stack(images)[:, None], torch.tensor(digits)
