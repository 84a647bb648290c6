"""Pictures of a demo run: weights by kind, extremes per class, and the paper's Figure 2 panels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mts_fast._files import replaced_file, writing
from mts_fast.demo.arms import SeedResult
from mts_fast.demo.scenario import CLASSES, KINDS, REAL, Scenario, make_scenario

# good, then the failures; real images in black
COLORS = ("#1b9e77", "#7570b3", "#d95f02", "#e7298a", "#a6761d")
SHOWN = 6
PANELS = (
    ("mean_weight", "mean w"),
    ("max_p", "max p"),
    ("var_p", "Var p"),
    ("effective_batch_size", "effective batch size 1/Σp²"),
    ("val_loss", "validation loss at θ'"),
    ("gsnr", "GSNR of the selector gradient"),
)


def draw_figures(
    data: str, results: Sequence[SeedResult], root: str | None, out: Path
) -> list[Path]:
    """All pictures of a run; those that show images are of the first seed."""
    first = results[0]
    scenario = make_scenario(data, first.seed, root)
    weights = torch.tensor(first.weights)
    return [
        draw_weights(scenario, weights, out / "weights_by_kind.png"),
        draw_extremes(scenario, weights, out / "extremes.png"),
        draw_curves(results, out / "training_curves.png"),
    ]


def draw_weights(scenario: Scenario, weights: torch.Tensor, path: Path) -> Path:
    """Histogram of the learned weight for each kind of sample."""
    plt = _pyplot()
    kinds = [("real", REAL, "black"), *((n, i, COLORS[i]) for i, n in enumerate(KINDS))]
    figure, axes = plt.subplots(len(kinds), 1, figsize=(6, 6.5), sharex=True)
    bins = np.linspace(0, 1, 41)
    for ax, (name, kind, color) in zip(axes, kinds, strict=True):
        values = weights[scenario.kind == kind].numpy()
        ax.hist(values, bins, weights=np.full(len(values), 100 / len(values)), color=color)
        ax.axvline(float(values.mean()), color="black", linestyle=":", linewidth=1)
        label = name if kind == REAL else f"synthetic: {name}"
        ax.set_title(f"{label} ({len(values)}), mean {values.mean():.2f}", loc="left", fontsize=9)
        ax.set_ylabel("%", rotation=0, labelpad=10)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("learned weight w")
    return _save(figure, path)


def draw_extremes(scenario: Scenario, weights: torch.Tensor, path: Path) -> Path:
    """The highest- and lowest-weighted synthetic images of each class, framed by their kind."""
    plt = _pyplot()
    figure, axes = plt.subplots(CLASSES, 2 * SHOWN + 1, figsize=(8.5, 7))
    for c in range(CLASSES):
        members = ((scenario.pool.labels == c) & scenario.is_synthetic).nonzero().flatten()
        order = members[weights[members].argsort(descending=True)].tolist()
        for column, index in enumerate([*order[:SHOWN], None, *order[-SHOWN:]]):
            ax = axes[c, column]
            ax.set_xticks([])
            ax.set_yticks([])
            if index is None:
                ax.axis("off")
                continue
            ax.imshow(scenario.pool.images[index, 0], cmap="gray", vmin=0, vmax=1)
            for spine in ax.spines.values():
                spine.set(color=COLORS[int(scenario.kind[index])], linewidth=2.5)
        axes[c, 0].set_ylabel(f"{c}", rotation=0, labelpad=8, va="center")
    figure.text(0.30, 0.93, "highest weights", ha="center")
    figure.text(0.73, 0.93, "lowest weights", ha="center")
    handles = [plt.Line2D([], [], color=color, linewidth=4) for color in COLORS]
    figure.legend(handles, list(KINDS), loc="lower center", ncols=len(KINDS), frameon=False)
    return _save(figure, path, tight=False)


def draw_curves(results: Sequence[SeedResult], path: Path) -> Path:
    """The paper's Figure 2 quantities over training, one thin line per seed and their mean."""
    plt = _pyplot()
    panels = [(key, title) for key, title in PANELS if key in results[0].curves]
    figure, grid = plt.subplots(2, (len(panels) + 1) // 2, figsize=(10, 5), squeeze=False)
    for ax, (key, title) in zip(grid.flat, panels, strict=False):
        curves = np.array([r.curves[key] for r in results])
        steps = np.array(results[0].curves["step"])[: curves.shape[1]]
        ax.plot(steps, curves.T, color="#1b9e77", alpha=0.25, linewidth=0.8)
        ax.plot(steps, curves.mean(0), color="#1b9e77", linewidth=1.8)
        ax.set_title(title, loc="left", fontsize=9)
        ax.set_xlabel("step")
        ax.spines[["top", "right"]].set_visible(False)
    for ax in list(grid.flat)[len(panels) :]:
        ax.axis("off")
    return _save(figure, path)


def draw_batch_size_study(rows: Sequence[dict[str, float]], data: str, path: Path) -> Path:
    """GSNR of the selector gradient against the selector batch, over draws and within one batch."""
    plt = _pyplot()
    figure, ax = plt.subplots(figsize=(5.5, 4))
    sizes = np.array([row["batch_size"] for row in rows])
    over = np.array([row["gsnr_over_draws"] for row in rows])
    within = np.array([row["gsnr_within_batch"] for row in rows])
    ax.plot(sizes, over, "o-", color="#d95f02", label="over independent draws")
    ax.plot(sizes, within, "s--", color="#7570b3", label="estimated within one batch")
    ax.plot(sizes, over[-1] * sizes / sizes[-1], ":", color="gray", label="proportional to B")
    ax.set_xscale("log", base=2)
    ax.set_yscale("symlog", linthresh=max(1e-3, float(over[over > 0].min()) / 2))
    ax.set_xlabel("selector batch B")
    ax.set_ylabel("GSNR of the selector gradient")
    ax.set_title(f"{data}: parameters fixed in mid-training", loc="left", fontsize=10)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path, *, tight: bool = True) -> Path:
    if tight:
        figure.tight_layout()
    with replaced_file("demo", path) as part, writing("demo", path):
        figure.savefig(part, dpi=110)
    _pyplot().close(figure)
    return path
