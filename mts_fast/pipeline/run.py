"""All stages of a run, in order; what they make is kept (stages.py), what comes of it is told."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from mts_fast._check import fail
from mts_fast._files import locked, replaced_file, writing
from mts_fast._outputs import output_folder
from mts_fast.features import PAPER_COLUMNS, FeatureTable, ForgettingCounter
from mts_fast.pipeline.batches import EpochBatches, WeightedBatches, seed_of
from mts_fast.pipeline.config import Config
from mts_fast.pipeline.data import Findings
from mts_fast.pipeline.display import Display
from mts_fast.pipeline.evaluation import outcome_of, predictions_of
from mts_fast.pipeline.fit import Batches, Log, Watch, fit
from mts_fast.pipeline.inputs import all_logits, device_of
from mts_fast.pipeline.learn import learn_weights
from mts_fast.pipeline.memory import PROBE, check_memory
from mts_fast.pipeline.models import (
    build_model,
    check_model,
    load_pretrained,
    model_key,
    tell_batch_statistics,
)
from mts_fast.pipeline.outcome import Outcome, save_outcome
from mts_fast.pipeline.pool import Pool, class_weights_of, embeddings_of, features_of
from mts_fast.pipeline.prepare import prepare_together
from mts_fast.pipeline.records import Records
from mts_fast.pipeline.stages import (
    CLEAN,
    DYNAMICS,
    EMBEDDINGS,
    EVERYTHING,
    FEATURES,
    FILTER,
    MTS,
    OF_DYNAMICS,
    OF_MIXING,
    OF_MTS,
    OF_RETRAINING,
    OURS,
    Stages,
)
from mts_fast.pipeline.team import ALONE, Team
from mts_fast.selection import discount_learned

FIRST = "weights, first"
# of an epoch beside one of plain training (docs/benchmarks.md); for the estimate of the time left
COST_OF_MTS = 2.5


class Run:
    """One run of `mts-fast train`; of several processes the first one reads and writes files."""

    def __init__(self, config: Config, out: Path, console: Console, team: Team = ALONE) -> None:
        self.config = config
        self.out = out
        self.console = console
        self.team = team
        self.findings = Findings()
        self.told = 0
        self.device = team.together(lambda: device_of(config))

    def execute(self) -> Outcome | None:
        """Run every stage that is not there yet; the outcome is the first process's alone.

        Raises:
            ValueError: what is wrong with the data or the options.
            RuntimeError: another process is at work in the folder.
            OSError: it cannot be written.
        """
        with ExitStack() as stack:
            self.team.alone(lambda: self._enter_out(stack))
            self.display = Display(self.console)
            progress = stack.enter_context(self.display.progress)
            self.data = prepare_together(self.config, self.out, self.findings, progress, self.team)
            self._tell()
            self.team.alone(lambda: self._open_records(stack))
            return self._all_stages()

    def _enter_out(self, stack: ExitStack) -> None:
        """Have the run's folder for this process alone."""
        self._check_out()
        check_model(self.config.model)
        stack.enter_context(output_folder("train", "--out", self.out / "stages"))
        if not stack.enter_context(locked(self.out, wait=False)):
            got = f"{str(self.out)!r}, where another `mts-fast train` is running"
            hint = "wait for it, or pass another folder"
            fail(RuntimeError, "train", "--out", "free", got, hint)

    def _open_records(self, stack: ExitStack) -> None:
        self.records = Records(self.out, self.config.loggers, self.config.model_dump())
        stack.callback(self.records.close)

    def _check_out(self) -> None:
        """Refuse a folder among the samples, where the run's files would be taken for some."""
        config = self.config
        for source in filter(None, (config.real, *config.synthetic, config.val, config.test)):
            folder = Path(source).expanduser().resolve()
            if folder.is_dir() and folder in (self.out.resolve(), *self.out.resolve().parents):
                got = f"{str(self.out)!r} in {source!r}"
                fail(
                    ValueError, "train", "--out", "apart from the data", got, "name another folder"
                )

    def _all_stages(self) -> Outcome | None:
        config, data = self.config, self.data
        pool_members = torch.cat([data.members["real"], data.members["synthetic"]])
        is_synthetic = torch.arange(len(pool_members)) >= len(data.members["real"])
        trusts_real = config.clean == "real+val"
        self.clean = data.members["val"]
        if trusts_real:
            self.clean = torch.cat([data.members["real"], self.clean])
        candidates = is_synthetic if trusts_real else torch.ones_like(is_synthetic)
        pool = Pool(
            *(data.inputs, data.labels, pool_members, is_synthetic, data.members["val"]),
            classes=len(data.classes),
        )
        self.pool = pool
        self.steps = len(EpochBatches(pool_members, config.batch_size, config.seed))
        self.template = self._same_model()
        content = self.team.led(lambda: f"{data.key} {model_key(config.model, self.template)}")
        self.stages = Stages(config, self.out, content, self.findings, self._tell, self.team)
        if self.device.type == "cpu":
            probe = data.inputs.batch(pool_members[:PROBE], self.device)
            self.team.together(lambda: check_memory(self.template, probe, config))
        refined = [f"weights, refined {i + 1}" for i in range(config.refinements)]
        of_retraining = dict.fromkeys([FILTER, FIRST, *refined], config.epochs)
        epochs = {EVERYTHING: config.epochs, CLEAN: config.epochs}
        epochs |= {DYNAMICS: config.dynamics_epochs, MTS: config.epochs, **of_retraining}
        self.display.expect(epochs, {MTS: COST_OF_MTS})

        everything = self._train(EVERYTHING, OF_RETRAINING, self._everything())
        clean = self._train(CLEAN, OF_MIXING, self._mixed(torch.ones(len(pool_members)), 1.0))
        weights = self._learned_weights(self._features(clean))
        easy, probabilities = self._probability(everything), self._probabilities(clean)
        filtered = self._retrain(FILTER, self._of_labels(probabilities), candidates)
        mass = discount_learned(weights, easy, config.easy_power)
        model = self._retrain(FIRST, mass, candidates)
        for name in refined:
            mass = discount_learned(self._probability(model).sqrt(), easy, config.easy_power)
            model = self._retrain(name, mass, candidates)
        arms = {EVERYTHING: everything, CLEAN: clean, FILTER: filtered, OURS: model}
        predictions = predictions_of(arms, data, self.device, self.team)
        self.outcome: Outcome | None = None

        def finish() -> None:
            self._deliver(model)
            self.outcome = outcome_of(self, weights, predictions, easy, probabilities)
            self._tell()
            self.records.tidy()
            self._write_config()
            save_outcome(self.outcome)

        self.team.alone(finish)
        return self.outcome

    # stages

    def _train(
        self, name: str, omitted: set[str], batches: Batches, content: str = ""
    ) -> nn.Module:
        """A classifier trained plainly."""

        def make(folder: Path) -> Any:
            model = self._fit(name, batches, folder, self.config.epochs)
            return {"model": dict(model.state_dict())}

        omitted = {*OF_MTS, *OF_DYNAMICS, *omitted}
        return self._loaded(self._stage(name, make, omitted=omitted, content=content))

    def _retrain(self, name: str, weights: Tensor, candidates: Tensor) -> nn.Module:
        """A new classifier on clean data and samples drawn by weight."""
        chosen = weights * candidates
        digest = hashlib.sha256(chosen.numpy().tobytes()).hexdigest()
        return self._train(name, set(), self._mixed(chosen, self.config.clean_share), digest)

    def _features(self, clean: nn.Module) -> FeatureTable:
        """Embeddings by the classifier of the clean data, and a short training for the dynamics."""
        pool, device = self.pool, self.device
        omitted = {*OF_MTS, *OF_MIXING}
        embeddings: Tensor = self._stage(
            EMBEDDINGS,
            lambda _: embeddings_of(clean, pool.inputs, pool.members, device, self.team),
            omitted={*omitted, *OF_DYNAMICS},
        )
        dynamics = self._stage(DYNAMICS, self._run_dynamics, omitted={*OF_MTS, *OF_RETRAINING})

        def make(_: Path) -> Any:
            model = self._loaded(dynamics)
            forgetting = dynamics["forgetting"]
            table = features_of(embeddings, model, forgetting, pool, device, self.team)
            return {name: table[name] for name in PAPER_COLUMNS}

        return FeatureTable(self._stage(FEATURES, make, omitted=omitted))

    def _run_dynamics(self, folder: Path) -> Any:
        places = self.pool.places()
        counter = ForgettingCounter(len(self.pool.members))

        def watch(indices: Tensor, right: Tensor) -> None:
            counter.update(places[indices], right)

        size, seed = self.config.dynamics_batch_size, self.config.seed
        batches = EpochBatches(self.pool.members, size, seed)
        # a warm-up or a decay meant for the whole training would fill or never reach a short one
        config = self.config.model_copy(update={"warmup_epochs": 0, "decay_epochs": ()})
        model = self._fit(DYNAMICS, batches, folder, config.dynamics_epochs, watch, config)
        return {
            "model": dict(model.state_dict()),
            "forgetting": counter.columns()["forgetting_counts"],
        }

    def _learned_weights(self, table: FeatureTable) -> Tensor:
        """Weights [M] of the pool."""

        def make(folder: Path) -> Any:
            learned = learn_weights(
                self._new_model(),
                *(table.standardized(PAPER_COLUMNS), self.pool, self.config),
                stage=MTS,
                folder=folder,
                device=self.device,
                findings=self.findings,
                log=self._logging(MTS),
                class_weight=self._class_weight(),
                team=self.team,
            )
            return {
                "weights": learned.weights,
                "model": dict(learned.model.state_dict()),
                "selector": dict(learned.selector.state_dict()),
                "val_features": learned.val_features,
                "online": learned.online,
            }

        weights: Tensor = self._stage(MTS, make, omitted=OF_MIXING)["weights"]
        return weights

    # what stages need

    def _stage(self, name: str, make: Callable[[Path], Any], **options: Any) -> Any:
        state = self.stages.run(name, make, **options)
        self.display.finished(name)
        return state

    def _fit(
        self,
        name: str,
        batches: Batches,
        folder: Path,
        epochs: int,
        watch: Watch | None = None,
        config: Config | None = None,
    ) -> nn.Module:
        return fit(
            self._new_model(),
            *(self.data.inputs, self.data.labels, batches, config or self.config),
            stage=name,
            epochs=epochs,
            folder=folder,
            device=self.device,
            findings=self.findings,
            log=self._logging(name),
            class_weight=self._class_weight(),
            watch=watch,
            team=self.team,
        )

    def _everything(self) -> Batches:
        return EpochBatches(self.pool.members, self.config.batch_size, self.config.seed)

    def _mixed(self, weights: Tensor, share: float) -> Batches:
        return WeightedBatches(
            *(self.pool.members, weights, self.clean, self.config.batch_size, self.steps),
            share=share,
            labels=self.data.labels,
            seed=self.config.seed,
        )

    def _same_model(self) -> nn.Module:
        """A new model, of the first process's tensors."""
        model = self.team.in_turn(self._build_model)
        if self.team.size > 1:
            state = self.team.led(lambda: dict(model.state_dict()))
            self.team.together(lambda: model.load_state_dict(state))
            tell_batch_statistics(model, self.findings)
            self._tell()
        return model

    def _build_model(self) -> nn.Module:
        kind = "image" if self.config.text_column is None else "text"
        torch.manual_seed(seed_of(self.config.seed, "model"))
        model = build_model(self.config.model, kind, len(self.data.classes))  # type: ignore[arg-type]
        if self.config.pretrained is not None:
            load_pretrained(model, self.config.pretrained, self.findings)
            self._tell()
        return model

    def _new_model(self) -> nn.Module:
        return copy.deepcopy(self.template)

    def _loaded(self, state: dict[str, Any]) -> nn.Module:
        model = self._new_model()
        model.load_state_dict(state["model"])
        return model.to(self.device).eval()

    def _probabilities(self, model: nn.Module) -> Tensor:
        """[M, C]: of each pool sample."""
        members, inputs = self.pool.members, self.data.inputs
        return all_logits(model, inputs, members, self.device, self.team).softmax(1)

    def _of_labels(self, probabilities: Tensor) -> Tensor:
        """[M]: of each pool sample's label."""
        labels = self.data.labels[self.pool.members]
        return probabilities.gather(1, labels[:, None]).flatten()

    def _probability(self, model: nn.Module) -> Tensor:
        """[M]: of each pool sample's label."""
        return self._of_labels(self._probabilities(model))

    def _class_weight(self) -> Tensor | None:
        labels = self.data.labels[self.pool.members]
        weights = class_weights_of(self.config, labels, len(self.data.classes))
        return None if weights is None else weights.to(self.device)

    # what comes of it

    def _tell(self) -> None:
        """Remarks that were not told yet."""
        for remark in self.findings.remarks[self.told :]:
            self.console.print(f"note: {remark}", markup=False, highlight=False, soft_wrap=True)
        self.told = len(self.findings.remarks)

    def _logging(self, name: str) -> Log:
        """Records of a training, and a bar of its epochs."""

        def log(record: dict[str, Any]) -> None:
            self.records.log({**record, "folder": self.stages.used[name]})
            self.display.advance(name, record["epoch"], record["samples_per_second"])

        return log

    def _write_config(self) -> None:
        path = self.out / "config.json"
        with replaced_file("train", path) as part, writing("train", path):
            part.write_text(json.dumps(self.config.model_dump(), indent=1) + "\n")

    def _deliver(self, model: nn.Module) -> None:
        from safetensors.torch import save_model

        path = self.out / "model.safetensors"
        with replaced_file("train", path) as part, writing("train", path):
            save_model(model, str(part))
