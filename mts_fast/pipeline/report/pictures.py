"""Pictures of the page, as data addresses: curves, and thumbnails of samples."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from mts_fast.pipeline.stages import MTS

THUMBNAIL = 96
# points an inch of a chart, twice those of the page, so that text is sharp
RESOLUTION = 192
PAGE_RESOLUTION = 96
# lines are told apart without colours, too
STYLES = ("-", "--", "-.", ":")
# the paper's Figure 2: what is recorded of the weights in training
PANELS = {
    "mean_weight": "mean weight",
    "max_p": "largest normalised weight",
    "var_p": "variance of the normalised weights",
    "effective_batch_size": "effective batch size",
}


@dataclass(frozen=True)
class Chart:
    """A picture's address, what it shows in words, and its size on the page."""

    address: str
    words: str
    width: int
    height: int


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


def loss_curves(records: Sequence[Mapping[str, Any]]) -> Chart:
    """Training loss of every stage by epoch; narrow enough to be read on a phone."""
    figure = Figure(figsize=(4.8, 4.4), layout="constrained")
    axes = figure.subplots()
    stages = dict.fromkeys(record["stage"] for record in records if "epoch" in record)
    for stage, style in zip(stages, cycle(STYLES), strict=False):
        of_stage = [r for r in records if r["stage"] == stage and "epoch" in r]
        label = "MTS" if stage == MTS else stage
        _plot(axes, of_stage, "loss", label=label, linestyle=style)
    axes.set(xlabel="epoch", ylabel="training loss")
    figure.legend(fontsize=9, frameon=False, ncols=2, loc="outside lower center")
    return _drawn(figure, axes, "Training loss of every stage by epoch")


def weight_curves(records: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """The quantities of the paper's Figure 2 by epoch, a chart each."""
    of_mts = [record for record in records if record["stage"] == MTS]
    charts = []
    for key, title in PANELS.items():
        figure = Figure(figsize=(3.3, 2.2), layout="constrained")
        axes = figure.subplots()
        _plot(axes, of_mts, key, color="#1b9e77")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch", fontsize=9)
        charts.append(_drawn(figure, axes, f"{title.capitalize()} by epoch"))
    return charts


def _plot(axes: Any, records: Sequence[Mapping[str, Any]], key: str, **options: Any) -> None:
    """A line; a point where there is one epoch."""
    marker = "o" if len(records) == 1 else None
    axes.plot([r["epoch"] for r in records], [r[key] for r in records], marker=marker, **options)


def _drawn(figure: Figure, axes: Any, words: str) -> Chart:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.yaxis.get_offset_text().set_fontsize(9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=RESOLUTION, format="png")
    width, height = (round(PAGE_RESOLUTION * inches) for inches in figure.get_size_inches())
    return Chart(_address(buffer, "png"), words, width, height)


def _address(buffer: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
