"""All stages of a run, each kept in the run's folder under a hash of what it depends on."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from mts_fast._files import replaced_file, writing
from mts_fast._outputs import output_folder
from mts_fast.features import PAPER_COLUMNS, FeatureTable, ForgettingCounter
from mts_fast.pipeline.batches import EpochBatches, WeightedBatches, seed_of
from mts_fast.pipeline.checkpoints import load_state, save_state
from mts_fast.pipeline.config import Config
from mts_fast.pipeline.data import Findings
from mts_fast.pipeline.fit import Batches, Log, Watch, fit
from mts_fast.pipeline.inputs import all_logits
from mts_fast.pipeline.learn import Learned, Pool, embeddings_of, features_of, learn_weights
from mts_fast.pipeline.models import build_model, load_pretrained
from mts_fast.pipeline.prepare import prepare
from mts_fast.selection import discount_learned

# options that change no result: where to look, and how fast
INDIFFERENT = {
    "real",
    "synthetic",
    "val",
    "test",
    "workers",
    "keep_checkpoints",
    "checkpoint_every",
}
# options of MTS, and of retraining: other trainings do not depend on them
OF_MTS = {
    *("selector_lr", "selector_weight_decay", "selector_every", "selector_warmup_epochs"),
    *("val_batch_size", "hypergradient_lr", "engine"),
}
OF_RETRAINING = {"clean", "clean_share", "easy_power", "refinements"}
WEIGHTS, METRICS = "weights.csv", "metrics.jsonl"
OURS = "MTS weights"


class Run:
    """One run of `mts-fast train`."""

    def __init__(self, config: Config, out: Path, console: Console) -> None:
        self.config = config
        self.out = out
        self.console = console
        self.findings = Findings()
        self.told = 0
        name = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(name if config.device == "auto" else config.device)

    def execute(self) -> dict[str, float]:
        """Run every stage that is not there yet; returns the accuracy of every arm in percent."""
        with output_folder("train", "--out", self.out), Progress(console=self.console) as progress:
            self.progress = progress
            self.data = prepare(self.config, self.out, self.findings, progress)
            self._tell()
            self._write_config()
            return self._stages()

    def _stages(self) -> dict[str, float]:
        config, data = self.config, self.data
        pool_members = torch.cat([data.members["real"], data.members["synthetic"]])
        is_synthetic = torch.arange(len(pool_members)) >= len(data.members["real"])
        trusts_real = config.clean == "real+val"
        clean = data.members["val"]
        if trusts_real:
            clean = torch.cat([data.members["real"], clean])
        self.clean, self.pool_members = clean, pool_members
        candidates = is_synthetic if trusts_real else torch.ones_like(is_synthetic)
        pool = Pool(
            *(data.inputs, data.labels, pool_members, is_synthetic, data.members["val"]),
            classes=len(data.classes),
        )
        self.steps = len(EpochBatches(pool_members, config.batch_size, config.seed))

        everything = self._train("everything alike", EpochBatches, pool_members)
        by_clean = self._train("real + validation", self._only_clean)
        table = self._features(by_clean, pool)
        learned = self._learn(table, pool)
        easy = self._probability(everything)
        filtered = self._retrain(
            "filter by clean classifier", self._probability(by_clean), candidates
        )
        weights = discount_learned(learned, easy, config.easy_power)
        model = self._retrain("weights, first", weights, candidates)
        for i in range(config.refinements):
            weights = discount_learned(self._probability(model).sqrt(), easy, config.easy_power)
            model = self._retrain(f"weights, refined {i + 1}", weights, candidates)
        arms = {
            "everything alike": everything,
            "real + validation": by_clean,
            "filter by clean classifier": filtered,
            OURS: model,
        }
        accuracy = self._evaluate(arms)
        self._tidy_log()
        self._write_weights(learned)
        self._deliver("model", model)
        return accuracy

    # stages

    def _stage(
        self, name: str, omitted: Iterable[str], make: Callable[[Path], Any], *parts: Any
    ) -> Any:
        """What a stage made, of an earlier run where it depended on the same."""
        options = {
            key: value
            for key, value in self.config.model_dump().items()
            if key not in INDIFFERENT | set(omitted)
        }
        text = json.dumps([name, self.data.key, options, *map(str, parts)], sort_keys=True)
        if self.config.pretrained is not None:
            text += hashlib.sha256(Path(self.config.pretrained).read_bytes()).hexdigest()
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        folder = self.out / "stages" / f"{name.replace(' ', '-').replace(',', '')}-{key}"
        done = folder / "done.safetensors"
        if done.exists():
            try:
                return load_state(done)
            except Exception as error:  # whatever a damaged file makes a reader raise
                first = (str(error) or type(error).__name__).splitlines()[0]
                self.findings.remark(f"{done} is broken ({first}); the stage runs again")
                self._tell()
        folder.mkdir(parents=True, exist_ok=True)
        state = make(folder)
        save_state(done, state)
        for checkpoint in folder.glob("checkpoint-*.safetensors"):
            checkpoint.unlink()
        self._tell()
        return state

    def _new_model(self) -> nn.Module:
        kind = "image" if self.config.text_column is None else "text"
        torch.manual_seed(seed_of(self.config.seed, "model"))
        model = build_model(self.config.model, kind, len(self.data.classes))  # type: ignore[arg-type]
        if self.config.pretrained is not None:
            findings = Findings()
            load_pretrained(model, self.config.pretrained, findings)
            new = [r for r in findings.remarks if r not in self.findings.remarks]
            self.findings.remarks += new
        return model

    def _fit(
        self, name: str, batches: Batches, folder: Path, epochs: int, watch: Watch | None
    ) -> nn.Module:
        return fit(
            self._new_model(),
            *(self.data.inputs, self.data.labels, batches, self.config),
            stage=name,
            epochs=epochs,
            folder=folder,
            device=self.device,
            findings=self.findings,
            log=self._logging(name, epochs),
            class_weight=self._class_weight(),
            watch=watch,
        )

    def _train(self, name: str, batches: Any, members: Tensor | None = None) -> nn.Module:
        """A classifier trained plainly."""
        of_stage = (
            batches(members, self.config.batch_size, self.config.seed)
            if members is not None
            else batches()
        )

        def make(folder: Path) -> Any:
            model = self._fit(name, of_stage, folder, self.config.epochs, None)
            return {"model": dict(model.state_dict())}

        omitted = OF_MTS | OF_RETRAINING if members is not None else OF_MTS
        return self._loaded(self._stage(name, omitted, make))

    def _only_clean(self) -> Batches:
        ones = torch.ones(len(self.pool_members))
        return self._mixed(ones, share=1.0)

    def _mixed(self, weights: Tensor, share: float) -> Batches:
        return WeightedBatches(
            *(self.pool_members, weights, self.clean, self.config.batch_size, self.steps),
            share=share,
            labels=self.data.labels,
            seed=self.config.seed,
        )

    def _retrain(self, name: str, weights: Tensor, candidates: Tensor) -> nn.Module:
        """A new classifier on clean data and samples drawn by weight."""
        chosen = weights * candidates
        batches = self._mixed(chosen, self.config.clean_share)

        def make(folder: Path) -> Any:
            model = self._fit(name, batches, folder, self.config.epochs, None)
            return {"model": dict(model.state_dict())}

        digest = hashlib.sha256(chosen.numpy().tobytes()).hexdigest()
        return self._loaded(self._stage(name, OF_MTS, make, digest))

    def _features(self, by_clean: nn.Module, pool: Pool) -> FeatureTable:
        """Embeddings by the classifier of the clean data, and a short training for the dynamics."""

        def make(folder: Path) -> Any:
            forgetting = ForgettingCounter(len(pool.members))
            labels = self.data.labels

            def watch(indices: Tensor, logits: Tensor) -> None:
                forgetting.update(indices, logits.argmax(1).cpu() == labels[indices])

            size = self.config.dynamics_batch_size
            batches = EpochBatches(pool.members, size, self.config.seed)
            model = self._fit("dynamics", batches, folder, self.config.dynamics_epochs, watch)
            embeddings = embeddings_of(by_clean, pool, self.device)
            table = features_of(embeddings, model, forgetting, pool, self.device)
            return {name: table[name] for name in PAPER_COLUMNS}

        return FeatureTable(self._stage("features", OF_MTS, make))

    def _learn(self, table: FeatureTable, pool: Pool) -> Tensor:
        """Weights [M] of the pool."""

        def make(folder: Path) -> Any:
            learned: Learned = learn_weights(
                self._new_model(),
                *(table.standardized(PAPER_COLUMNS), pool, self.config),
                folder=folder,
                device=self.device,
                findings=self.findings,
                log=self._logging("MTS", self.config.epochs),
                class_weight=self._class_weight(),
            )
            return {
                "weights": learned.weights,
                "model": dict(learned.model.state_dict()),
                "selector": dict(learned.selector.state_dict()),
            }

        weights: Tensor = self._stage("mts", OF_RETRAINING - {"clean"}, make)["weights"]
        return weights

    # what stages need

    def _loaded(self, state: dict[str, Any]) -> nn.Module:
        model = self._new_model()
        model.load_state_dict(state["model"])
        return model.to(self.device).eval()

    def _probability(self, model: nn.Module) -> Tensor:
        """[M]: of each pool sample's label."""
        logits = all_logits(model, self.data.inputs, self.pool_members, self.device)
        labels = self.data.labels[self.pool_members]
        return logits.softmax(1).gather(1, labels[:, None]).flatten()

    def _class_weight(self) -> Tensor | None:
        if self.config.class_weights == "none":
            return None
        labels = self.data.labels[self.pool_members]
        counts = labels.bincount(minlength=len(self.data.classes)).clamp(min=1)
        return (len(labels) / (len(counts) * counts)).to(self.device)

    def _evaluate(self, arms: dict[str, nn.Module]) -> dict[str, float]:
        role = "test" if "test" in self.data.members else "val"
        if role == "val":
            what = "no --test: accuracies are of the validation set, which trainings have seen"
            self.findings.remark(what)
            self._tell()
        members = self.data.members[role]  # type: ignore[index]
        accuracy = {}
        for name, model in arms.items():
            logits = all_logits(model, self.data.inputs, members, self.device)
            right = (logits.argmax(1) == self.data.labels[members]).double()
            accuracy[name] = float(right.mean())
            record = {"stage": "evaluation", "arm": name, f"{role}_accuracy": accuracy[name]}
            groups = self.data.samples[role].groups  # type: ignore[index]
            if groups is not None:
                record[f"{role}_worst_group"] = _worst_group(right, groups)
            self._log({**record, "samples": len(right)})
        return accuracy

    # files

    def _tell(self) -> None:
        """Remarks that were not told yet."""
        for remark in self.findings.remarks[self.told :]:
            self.console.print(f"note: {remark}", markup=False, highlight=False, soft_wrap=True)
        self.told = len(self.findings.remarks)

    def _logging(self, name: str, epochs: int) -> Log:
        """Records of a training, and a bar of its epochs."""
        task = self.progress.add_task(name, total=epochs)

        def log(record: dict[str, Any]) -> None:
            self._log(record)
            self.progress.update(task, completed=record["epoch"])

        return log

    def _log(self, record: dict[str, Any]) -> None:
        path = self.out / METRICS
        with writing("train", path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _tidy_log(self) -> None:
        """One record of each epoch and arm, the last: interrupted runs repeat some."""
        path = self.out / METRICS
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        last = {(r["stage"], r.get("epoch"), r.get("arm")): r for r in records}
        with replaced_file("train", path) as part, writing("train", path):
            part.write_text("".join(json.dumps(r) + "\n" for r in last.values()), encoding="utf-8")

    def _write_config(self) -> None:
        path = self.out / "config.json"
        with replaced_file("train", path) as part, writing("train", path):
            part.write_text(json.dumps(self.config.model_dump(), indent=1) + "\n")

    def _write_weights(self, weights: Tensor) -> None:
        """One row per training sample."""
        roles: Sequence[Any] = ("real", "synthetic")
        path = self.out / WEIGHTS
        rows = [
            (role, name, label)
            for role in roles
            for name, label in zip(
                self.data.samples[role].names, self.data.samples[role].labels, strict=True
            )
        ]
        with (
            replaced_file("train", path) as part,
            writing("train", path),
            part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(["file", "class", "role", "weight"])
            for (role, name, label), weight in zip(rows, weights.tolist(), strict=True):
                writer.writerow([name, label, role, repr(weight)])

    def _deliver(self, name: str, model: nn.Module) -> None:
        from safetensors.torch import save_model

        path = self.out / f"{name}.safetensors"
        with replaced_file("train", path) as part, writing("train", path):
            save_model(model, str(part))


def _worst_group(right: Tensor, groups: Sequence[str]) -> float:
    """The lowest accuracy of a group."""
    members: dict[str, list[float]] = {}
    for value, group in zip(right.tolist(), groups, strict=True):
        members.setdefault(group, []).append(value)
    return min(sum(values) / len(values) for values in members.values())
