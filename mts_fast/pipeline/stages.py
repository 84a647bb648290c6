"""What each stage of a run made, kept in the run's folder under a hash of what it depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mts_fast.pipeline.checkpoints import load_state, save_state
from mts_fast.pipeline.config import Config
from mts_fast.pipeline.data import Findings
from mts_fast.pipeline.team import Team

DONE = "done.safetensors"
# names of stages; the first four are arms
EVERYTHING, CLEAN = "everything alike", "real + validation"
FILTER, OURS = "filter by clean classifier", "MTS weights"
DYNAMICS, EMBEDDINGS, FEATURES, MTS = "dynamics", "embeddings", "features", "mts"
# options that change no result: where to look, and how fast
INDIFFERENT = {
    *("real", "synthetic", "val", "test", "workers", "loggers"),
    *("keep_checkpoints", "checkpoint_every"),
}
# options of some stages, which others do not depend on
OF_DYNAMICS = {"dynamics_epochs", "dynamics_batch_size"}
OF_MTS = {
    *("selector_lr", "selector_weight_decay", "selector_every", "selector_warmup_epochs"),
    *("val_batch_size", "hypergradient_lr", "engine", "compute"),
}
OF_MIXING = {"clean_share", "easy_power", "refinements"}
OF_RETRAINING = {*OF_MIXING, "clean"}


class Stages:
    """The stages of one run."""

    def __init__(
        self,
        config: Config,
        out: Path,
        content: str,
        findings: Findings,
        tell: Callable[[], None],
        team: Team,
    ) -> None:
        self.out = out
        self.findings = findings
        self.tell = tell
        self.team = team
        self.used: dict[str, str] = {}  # name -> folder below `out`, of the stages of this run
        options = config.model_dump()
        self._options = {key: options[key] for key in options.keys() - INDIFFERENT}
        self._content = content  # a hash of the data and of the untrained model

    def run(
        self,
        name: str,
        make: Callable[[Path], Any],
        *,
        omitted: Iterable[str],
        content: str = "",
    ) -> Any:
        """What a stage made, of an earlier run where it depended on the same.

        Args:
            make: called with the stage's folder, for checkpoints; returns its state.
            omitted: options that it does not depend on.
            content: a hash of what else it depends on.
        """
        options = {key: self._options[key] for key in self._options.keys() - {*omitted}}
        text = json.dumps([name, self._content, options, content], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        folder = Path("stages", f"{name.replace(' ', '-').replace(',', '')}-{key}")
        self.used[name] = str(folder)
        done = self.out / folder / DONE
        earlier = self.team.led(lambda: self._load(done))
        if earlier is not None:
            return earlier
        state = make(done.parent)
        self.team.alone(lambda: self._save(done, state))
        return state

    def _load(self, done: Path) -> Any:
        """What an earlier run has left; None where it has to be made."""
        if done.exists():
            try:
                return load_state(done)
            except Exception as error:  # whatever a damaged file makes a reader raise
                first = (str(error) or type(error).__name__).splitlines()[0]
                self.findings.remark(f"{done} is broken ({first}); the stage runs again")
                self.tell()
        done.parent.mkdir(parents=True, exist_ok=True)
        return None

    def _save(self, done: Path, state: Any) -> None:
        save_state(done, state)
        for checkpoint in done.parent.glob("checkpoint-*.safetensors"):
            checkpoint.unlink()
        self.tell()
