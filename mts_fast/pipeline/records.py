"""What a run logs: JSON lines always, TensorBoard and Weights & Biases where they are asked for."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mts_fast._check import fail
from mts_fast._files import replaced_file, writing

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
# modules of the loggers that a run can be asked for
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


class Records:
    """The records of one run; `log` writes one everywhere."""

    def __init__(self, out: Path, loggers: Sequence[str], config: dict[str, Any]) -> None:
        self.path = out / METRICS
        self._writer: Any = None
        self._wandb: Any = None
        for name in loggers:
            try:
                module = importlib.import_module(MODULES[name])
            except ImportError as error:
                hint = f"pip install {name}, or leave it out"
                fail(ImportError, "train", "loggers", "installed", f"{name!r} ({error})", hint)
            if name == "tensorboard":
                self._writer = module.SummaryWriter(str(out / TENSORBOARD))
            else:
                self._wandb = module.init(project="mts_fast", dir=str(out), config=config)

    def log(self, record: dict[str, Any]) -> None:
        """One record: its stage, its epoch or arm, and numbers."""
        with writing("train", self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        name = record.get("arm", record["stage"])
        numbers = {
            f"{name}/{key}": value for key, value in record.items() if isinstance(value, float)
        }
        if self._writer is not None:
            for tag, value in numbers.items():
                self._writer.add_scalar(tag.replace(" ", "_"), value, record.get("epoch", 0))
        if self._wandb is not None:
            self._wandb.log({**numbers, "epoch": record.get("epoch", 0)})

    def close(self) -> None:
        """Flush what the loggers hold."""
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()

    def tidy(self) -> None:
        """Leave one record of each epoch of a stage's folder and of each arm, the last: interrupted
        runs repeat some."""
        keys = ("folder", "stage", "epoch", "arm")
        last = {tuple(r.get(key) for key in keys): r for r in read_records(self.path)}
        with replaced_file("train", self.path) as part, writing("train", self.path):
            part.write_text("".join(json.dumps(r) + "\n" for r in last.values()), encoding="utf-8")


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of a file; a line that a killed process left half is passed over."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
