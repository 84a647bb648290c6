"""Pictures of the page, as data addresses: curves, and thumbnails of samples."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from mts_fast.pipeline.stages import MTS

THUMBNAIL = 96
RESOLUTION = 110
# the paper's Figure 2: what is recorded of the weights in training
PANELS = {
    "mean_weight": "mean weight",
    "max_p": "largest normalised weight",
    "var_p": "variance of the normalised weights",
    "effective_batch_size": "effective batch size",
}


def thumbnail(pixels: np.ndarray) -> str:
    """A picture [size, size, 3] of bytes, at most THUMBNAIL wide, small ones enlarged by a whole
    factor so that their pixels show."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    factor = max(1, THUMBNAIL // image.width)
    if factor > 1:
        image = image.resize((image.width * factor,) * 2, Image.Resampling.NEAREST)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return _address(buffer, "png")


def loss_curves(records: Sequence[Mapping[str, Any]]) -> str:
    """Training loss of every stage by epoch."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    stages = dict.fromkeys(record["stage"] for record in records if "epoch" in record)
    for stage in stages:
        of_stage = [r for r in records if r["stage"] == stage and "epoch" in r]
        label = "MTS" if stage == MTS else stage
        axes.plot([r["epoch"] for r in of_stage], [r["loss"] for r in of_stage], label=label)
    axes.set(xlabel="epoch", ylabel="training loss")
    figure.legend(fontsize=8, frameon=False, loc="outside right upper")
    return _drawn(figure, [axes])


def weight_curves(records: Sequence[Mapping[str, Any]]) -> str:
    """The quantities of the paper's Figure 2 by epoch."""
    of_mts = [record for record in records if record["stage"] == MTS]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    panels = figure.subplots(2, 2).flatten()
    for axes, (key, title) in zip(panels, PANELS.items(), strict=True):
        axes.plot([r["epoch"] for r in of_mts], [r[key] for r in of_mts], color="#1b9e77")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("epoch", fontsize=8)
    return _drawn(figure, panels)


def _drawn(figure: Figure, panels: Sequence[Any]) -> str:
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=RESOLUTION, format="png")
    return _address(buffer, "png")


def _address(buffer: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
