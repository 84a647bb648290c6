"""`mts-fast score`: the trained selector of a run on new samples, without training again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from mts_fast._check import fail
from mts_fast._files import PREFIX, locked
from mts_fast.features import PAPER_COLUMNS, FeatureTable
from mts_fast.pipeline.config import Config
from mts_fast.pipeline.data import Findings, Samples
from mts_fast.pipeline.decode import open_pixels
from mts_fast.pipeline.inputs import Images, Inputs, device_of
from mts_fast.pipeline.models import build_model
from mts_fast.pipeline.outcome import Outcome, Row, rows_of
from mts_fast.pipeline.pool import (
    class_weights_of,
    distribution_of,
    dynamics_of,
    embeddings_of,
    online_of,
    selector_inputs,
)
from mts_fast.pipeline.prepare import read_content
from mts_fast.pipeline.sources import read_role
from mts_fast.pipeline.stages import CLEAN, DYNAMICS, EMBEDDINGS, FEATURES, MTS
from mts_fast.pipeline.team import ALONE, Team
from mts_fast.training import Selector


@dataclass(frozen=True)
class Scores:
    """New samples with their weights, and the rank correlation between such scores of the run's own
    samples and the weights that training averaged for them."""

    rows: tuple[Row, ...]
    agreement: float


@dataclass(frozen=True)
class _NewSamples:
    """New samples as every process needs them; their names and files are the first one's."""

    samples: Samples | None
    labels: Tensor  # [N]
    inputs: Inputs | None  # None: pixels of `store`, not opened yet
    store: Path

    def sent(self) -> _NewSamples:
        """For the other processes."""
        inputs = None if isinstance(self.inputs, Images) else self.inputs
        return replace(self, samples=None, inputs=inputs)


class TrainedSelector:
    """The selector at the end of a run, with what its features need."""

    def __init__(self, outcome: Outcome) -> None:
        # a run of a GPU can be read where there is none
        self.config = Config(**{**outcome.config, "device": "auto"})
        self.classes = len(outcome.classes)
        self.device = device_of(self.config)
        self.labels = outcome.tensors["labels"]
        self.is_synthetic = torch.tensor([row.role == "synthetic" for row in outcome.rows])
        self.table = FeatureTable(outcome.stage(FEATURES))
        state = outcome.stage(MTS)
        self.online: Tensor = state["online"]
        self.val_features: Tensor = state["val_features"]
        self.model_state: dict[str, Tensor] = state["model"]
        pool_inputs = self.pool_inputs()
        self.selector = Selector(pool_inputs.shape[1], self.classes)
        self.selector.load_state_dict(state["selector"])
        self.selector.eval()

    def pool_inputs(self) -> Tensor:
        """What the selector takes for the run's samples [M, k + 1 + F]."""
        return selector_inputs(self.online, self.online, self.table.standardized(PAPER_COLUMNS))

    @torch.no_grad()
    def weights(self, inputs: Tensor, labels: Tensor, is_synthetic: Tensor) -> Tensor:
        """w [N] of samples with these features [N, k + 1 + F]."""
        weights = self.selector(inputs, labels, is_synthetic).sigmoid()
        factors = class_weights_of(self.config, self.labels, self.classes)
        return weights if factors is None else weights * factors[labels]

    def classifier(self, state: dict[str, Tensor]) -> nn.Module:
        """A classifier of the run."""
        kind = "image" if self.config.text_column is None else "text"
        model = build_model(self.config.model, kind, self.classes)  # type: ignore[arg-type]
        model.load_state_dict(state)
        return model.to(self.device).eval()


def _opened(store: Path, config: Config) -> Images:
    """The decoded samples, which the first process has written."""
    if not store.exists():
        got = f"no file {str(store)!r} on one of its hosts"
        hint = "name a folder on a shared file system"
        fail(FileNotFoundError, "score", "--out", "a folder that every rank sees", got, hint)
    return Images(open_pixels(store), config)


def score_samples(
    outcome: Outcome,
    sources: Sequence[str],
    on_corrupt: str | None,
    note: Callable[[str], None],
    team: Team = ALONE,
    folder: Path | None = None,
) -> Scores | None:
    """Weigh new synthetic samples; nothing of the run is changed. Of several processes the first
    one reads the samples and has the scores.

    Their features are those of the run: the embedding by its classifier of the clean data, where
    they lie among the run's samples and each other, the classifier of the short training, and the
    similarity to the validation set under the classifier of MTS. How often training forgot them is
    not known: the mean of the run's synthetic samples stands for it.

    Args:
        sources: folders, lists or data sets, as for `mts-fast train`.
        on_corrupt: "error" or "skip"; default: as in the run.
        note: called with remarks.
        folder: one that all processes see, for the decoded samples; default: the system's.

    Raises:
        ValueError: what is wrong with the new samples, or with the run's folder.
    """
    trained = team.together(lambda: TrainedSelector(outcome))
    size = None
    if trained.config.text_column is None:
        size = team.together(lambda: open_pixels(outcome.folder / outcome.store).shape[1])
    changed = {"image_size": size, "on_corrupt": on_corrupt or trained.config.on_corrupt}
    config = trained.config.model_copy(update=changed)
    # a model that cannot be made here is told before anything is read
    team.in_turn(lambda: trained.classifier(trained.model_state))
    whole: list[_NewSamples] = []
    with ExitStack() as stack:

        def lead() -> _NewSamples:
            made = tempfile.TemporaryDirectory(prefix=PREFIX, dir=folder)
            place = Path(stack.enter_context(made))
            stack.enter_context(locked(place))
            whole.append(_read(outcome, sources, config, place, note))
            return whole[0].sent()

        new = team.led(lead)
        inputs = team.together(
            lambda: (whole[0] if team.leads else new).inputs or _opened(new.store, config)
        )
        features = _features_of(outcome, trained, inputs, new.labels, team)
    weights = trained.weights(features, new.labels, torch.ones(len(new.labels), dtype=torch.bool))
    if not team.leads:
        return None
    old = trained.weights(trained.pool_inputs(), trained.labels, trained.is_synthetic)
    learned = torch.tensor([row.weight for row in outcome.rows])
    samples = whole[0].samples
    assert samples is not None
    return Scores(rows_of([samples], weights.tolist()), rank_correlation(old, learned))


def _read(
    outcome: Outcome,
    sources: Sequence[str],
    config: Config,
    folder: Path,
    note: Callable[[str], None],
) -> _NewSamples:
    """Read and check the samples, and decode them into `folder`."""
    findings = Findings()
    samples = read_role("synthetic", sources, config, findings)
    findings.raise_errors("score", "nothing was written")
    assert samples is not None
    _check_classes(samples, outcome.classes, findings)
    with Progress(console=Console(stderr=True)) as bars:
        content = read_content(config, {"synthetic": samples}, folder, findings, bars)
    samples = content.samples["synthetic"]
    labels = torch.tensor([outcome.classes.index(label) for label in samples.labels])
    for remark in findings.remarks:
        note(remark)
    return _NewSamples(samples, labels, content.inputs, content.store)


def _check_classes(samples: Samples, classes: Sequence[str], findings: Findings) -> None:
    """Stop at classes that the run does not know."""
    for label in sorted({*samples.labels, *samples.empty_classes} - {*classes}):
        what = f"--synthetic {samples.source!r} has class {label!r}, which the run does not know"
        findings.stop(what, f"name one of {', '.join(map(repr, classes))}")


def _features_of(
    outcome: Outcome, trained: TrainedSelector, inputs: Inputs, labels: Tensor, team: Team
) -> Tensor:
    """What the selector takes for new samples [N, k + 1 + F]."""
    members, device = torch.arange(len(labels)), trained.device
    state, of_run, dynamics_state = team.together(
        lambda: [outcome.stage(name) for name in (CLEAN, EMBEDDINGS, DYNAMICS)]
    )
    clean = trained.classifier(state["model"])
    embeddings = embeddings_of(clean, inputs, members, device, team)
    columns = distribution_of(
        torch.cat([of_run, embeddings]),
        torch.cat([trained.labels, labels]),
        torch.cat([trained.is_synthetic, torch.ones(len(labels), dtype=torch.bool)]),
        team,
    )
    table = FeatureTable({name: column[-len(labels) :] for name, column in columns.items()})
    dynamics = trained.classifier(dynamics_state["model"])
    table.update(dynamics_of(dynamics, inputs, labels, members, device, team))
    forgetting = trained.table["forgetting_counts"][trained.is_synthetic].double().mean()
    table.update({"forgetting_counts": torch.full((len(labels), 1), float(forgetting))})
    offline = table.standardized(PAPER_COLUMNS, pool=trained.table)
    model = trained.classifier(trained.model_state)
    features = embeddings_of(model, inputs, members, device, team)
    online = online_of(features, trained.val_features)
    return selector_inputs(online, trained.online, offline)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's; ties in the order of the samples."""
    ranks = [x.argsort(stable=True).argsort(stable=True).double() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
