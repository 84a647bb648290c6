"""Pictures of a demo run: accuracies, extremes per class, weights by kind, Figure 2's panels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mts_fast._files import replaced_file, writing
from mts_fast.demo.arms import ARMS
from mts_fast.demo.data import CLASSES, REAL, Scenario, make_scenario
from mts_fast.demo.jobs import JobResult

# helpful kinds, then all others; real images in black
COLORS = ("#1b9e77", "#7570b3", "#d95f02", "#e7298a", "#a6761d")
ROLES = {
    "baseline": ("#8c8c8c", "baseline"),
    "ours": ("#1b9e77", "MTS"),
    "ablation": ("#7570b3", "MTS left out"),
    "reference": ("#c9b458", "knows the truth"),
}
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
    data: str,
    results: Sequence[JobResult],
    rows: dict[str, dict[str, Any]],
    root: str | None,
    out: Path,
) -> list[Path]:
    """All pictures of a run; those that show images are of the first seed."""
    first = results[0]
    scenario = make_scenario(data, first.seed, root)
    weights = torch.tensor(first.weights)
    return [
        draw_accuracies(rows, len(results), out / "accuracies.png"),
        draw_extremes(scenario, weights, out / "extremes.png"),
        draw_weights(scenario, weights, out / "weights_by_kind.png"),
        draw_weights_over_time(scenario, results, out / "weights_over_time.png"),
        draw_curves(results, out / "training_curves.png"),
    ]


def colors_of(scenario: Scenario) -> dict[str, str]:
    """A colour for each kind, green for the first that helps."""
    order = sorted(scenario.kinds, key=lambda kind: kind not in scenario.helpful)
    return dict(zip(order, COLORS, strict=False))


def draw_accuracies(rows: dict[str, dict[str, Any]], seeds: int, path: Path) -> Path:
    """Mean accuracy of every arm, with two standard errors, the best on top."""
    plt = _pyplot()
    order = sorted(rows, key=lambda arm: rows[arm]["accuracy"])
    figure, ax = plt.subplots(figsize=(7.5, 0.3 * len(order) + 1))
    for y, arm in enumerate(order):
        row, color = rows[arm], ROLES[ARMS[arm].role][0]
        error = 2 * (row["accuracy_se"] or 0)
        ax.errorbar(row["accuracy"], y, xerr=error, fmt="o", color=color, capsize=3)
    ax.set_yticks(range(len(order)), order)
    ax.set_xlabel(f"test accuracy %: mean of {seeds} seeds, two standard errors")
    ax.grid(axis="x", alpha=0.3)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    roles = [(c, name) for role, (c, name) in ROLES.items() if role in {ARMS[a].role for a in rows}]
    handles = [plt.Line2D([], [], color=c, marker="o", linestyle="") for c, _ in roles]
    ax.legend(handles, [name for _, name in roles], loc="lower right", frameon=False)
    return _save(figure, path)


def draw_weights(scenario: Scenario, weights: torch.Tensor, path: Path) -> Path:
    """Histogram of the learned weight for each kind of sample."""
    plt = _pyplot()
    colors = colors_of(scenario)
    kinds = [("real", REAL, "black")]
    kinds += [(kind, scenario.kinds.index(kind), color) for kind, color in colors.items()]
    figure, axes = plt.subplots(len(kinds), 1, figsize=(6, 1.1 * len(kinds) + 0.8), sharex=True)
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


def draw_weights_over_time(scenario: Scenario, results: Sequence[JobResult], path: Path) -> Path:
    """Mean weight of every kind while it is learned, mean of the seeds."""
    plt = _pyplot()
    figure, ax = plt.subplots(figsize=(6, 3.6))
    steps = results[0].curves["weighed at"]
    for name, color in {"real": "black", **colors_of(scenario)}.items():
        curves = np.array([r.curves[f"weight: {name}"] for r in results])
        ax.plot(steps, curves.T, color=color, alpha=0.2, linewidth=0.8)
        ax.plot(steps, curves.mean(0), color=color, linewidth=1.8, label=name)
    ax.set_xlabel("step")
    ax.set_ylabel("mean weight w")
    ax.legend(frameon=False, fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def draw_extremes(scenario: Scenario, weights: torch.Tensor, path: Path) -> Path:
    """The highest- and lowest-weighted synthetic images of each class, framed by their kind."""
    plt = _pyplot()
    colors = colors_of(scenario)
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
            image = scenario.pool.images[index].permute(1, 2, 0)
            ax.imshow(image, cmap="gray", vmin=0, vmax=1)
            for spine in ax.spines.values():
                spine.set(color=colors[scenario.kinds[int(scenario.kind[index])]], linewidth=2.5)
        axes[c, 0].set_ylabel(f"{c}", rotation=0, labelpad=8, va="center")
    figure.text(0.30, 0.93, "highest weights", ha="center")
    figure.text(0.73, 0.93, "lowest weights", ha="center")
    handles = [plt.Line2D([], [], color=color, linewidth=4) for color in colors.values()]
    figure.legend(handles, list(colors), loc="lower center", ncols=len(colors), frameon=False)
    return _save(figure, path, tight=False)


def draw_curves(results: Sequence[JobResult], path: Path) -> Path:
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


def draw_study(
    title: str,
    xlabel: str,
    lines: dict[str, list[tuple[float, float]]],
    labels: Sequence[str],
    path: Path,
) -> Path:
    """Accuracy (mean, standard error) of arms over the variants of a study."""
    plt = _pyplot()
    figure, ax = plt.subplots(figsize=(6.5, 4))
    places = np.arange(len(labels))
    for i, (arm, values) in enumerate(lines.items()):
        means, errors = np.array(values).T
        shift = 0.08 * (i - (len(lines) - 1) / 2)
        ax.errorbar(
            places + shift, means, yerr=2 * errors, fmt="o-", capsize=3, linewidth=1.2, label=arm
        )
    ax.set_xticks(places, labels)
    ax.set_xlabel(xlabel)
    ax.set_ylabel("test accuracy %")
    ax.set_title(title, loc="left", fontsize=10)
    ax.grid(axis="y", alpha=0.3)
    ax.legend(frameon=False, fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def draw_gsnr(rows: Sequence[dict[str, float]], data: str, path: Path) -> Path:
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
