"""Plain training: nothing dropped, the schedule, resumed bit for bit."""

import pytest
import torch
from torch import nn

from mts_fast.pipeline.batches import EpochBatches, WeightedBatches, seed_of
from mts_fast.pipeline.config import load_config
from mts_fast.pipeline.data import Findings
from mts_fast.pipeline.fit import fit, rate_factor
from mts_fast.pipeline.inputs import Texts, all_logits

CPU = torch.device("cpu")


def config_of(**changes):
    return load_config(None, {"real": "r", "synthetic": ["s"], "model": "m", **changes}, [])


@pytest.mark.parametrize(("size", "batch"), [(10, 3), (10, 4), (9, 4), (5, 512), (3, 1), (1, 4)])
def test_every_sample_once_an_epoch(size, batch):
    batches = EpochBatches(torch.arange(size), batch, seed=1)
    epochs = [list(batches.epoch(n)) for n in range(3)]
    for parts in epochs:
        assert len(parts) == len(batches)
        assert torch.cat(parts).sort().values.tolist() == list(range(size))
        assert batch == 1 or size == 1 or all(len(part) > 1 for part in parts)
    assert all(map(torch.equal, epochs[1], batches.epoch(1)))
    if size > 3:
        assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))


def test_members_alone_are_drawn():
    members = torch.tensor([3, 5, 8, 9])
    parts = list(EpochBatches(members, 2, seed=0).epoch(0))
    assert torch.cat(parts).sort().values.equal(members)


def test_weighted_batches_repeat_by_epoch():
    pool, clean = torch.arange(100, 120), torch.arange(6)
    batches = WeightedBatches(
        *(pool, torch.rand(20), clean, 8, 4), share=0.5, labels=torch.arange(120) % 2, seed=2
    )
    parts = list(batches.epoch(3))
    assert len(parts) == len(batches) == 4 and all(len(part) == 8 for part in parts)
    assert all(int((part >= 100).sum()) == 4 for part in parts)
    assert all(map(torch.equal, parts, batches.epoch(3)))


def test_the_rate_warms_up_and_falls():
    cosine = config_of(warmup_epochs=2)
    values = [rate_factor(t, cosine, 10) for t in (0, 1, 2, 6, 10)]
    assert values == pytest.approx([0.005, 0.5, 1, 0.5, 0])
    step = config_of(schedule="step", decay_epochs=[3, 5])
    assert [rate_factor(t, step, 10) for t in (0, 2.9, 3, 5)] == pytest.approx([1, 1, 0.1, 0.01])
    assert rate_factor(7, config_of(schedule="constant"), 10) == 1


class Bag(nn.Module):
    """Texts by the mean of their words, with dropout, called by keywords."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(9, 8), nn.Linear(8, 2)
        self.drop = nn.Dropout(0.3)

    def forward(self, input_ids, attention_mask):
        vectors = self.words(input_ids) * attention_mask[..., None]
        return self.head(self.drop(vectors.sum(1) / attention_mask.sum(1, keepdim=True)))


def texts():
    torch.manual_seed(3)
    lengths = torch.randint(2, 6, (40,))
    mask = (torch.arange(6)[None] < lengths[:, None]).long()
    labels = torch.arange(40) % 2
    return Texts(torch.randint(1, 5, (40, 6)) + 4 * labels[:, None] * mask, mask), labels


def train(folder, epochs=6, log=None, watch=None, model=None):
    inputs, labels = texts()
    config = config_of(epochs=epochs, batch_size=16, lr=0.5, momentum=0.9)
    folder.mkdir(exist_ok=True)
    return fit(
        model or Bag(),
        *(inputs, labels, EpochBatches(torch.arange(len(inputs)), 16, 0), config),
        stage="plain",
        epochs=epochs,
        folder=folder,
        device=CPU,
        findings=Findings(),
        log=log or (lambda _: None),
        watch=watch,
    )


def test_it_learns_and_says_so(tmp_path):
    records = []
    model = train(tmp_path, log=records.append)
    inputs, labels = texts()
    assert (
        all_logits(model, inputs, torch.arange(40), CPU).argmax(1) == labels
    ).float().mean() > 0.9
    assert [r["epoch"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1]["loss"] < records[0]["loss"] and not model.training


@pytest.mark.parametrize("after", [1, 2, 5])
def test_an_interrupted_training_goes_on_bit_for_bit(after, tmp_path):
    whole = train(tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(record):
        if record["epoch"] == after + 1:  # the checkpoint of this epoch is not written any more
            raise Stop

    if after < 5:
        with pytest.raises(Stop):
            train(tmp_path / "cut", log=stop)
    else:
        train(tmp_path / "cut")
    epochs = []
    resumed = train(tmp_path / "cut", log=lambda r: epochs.append(r["epoch"]))
    assert epochs == list(range(after + 1, 7))
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_watch_sees_every_sample_of_every_epoch(tmp_path):
    seen = []
    train(tmp_path, 2, watch=lambda indices, right: seen.append((indices, right)))
    assert [indices.sort().values.tolist() for indices, _ in seen] == [list(range(40))] * 2
    batches = EpochBatches(torch.arange(40), 16, 0)
    for epoch, (indices, right) in enumerate(seen):
        assert indices.equal(torch.cat(list(batches.epoch(epoch)))) and right.dtype == torch.bool
    # the first predictions are those of the untrained model, with the dropout of the first step
    inputs, labels = texts()
    first = next(batches.epoch(0))
    model = Bag().train()
    torch.manual_seed(seed_of(0, "plain", 0))
    logits = model(**inputs.batch(first, CPU))
    assert seen[0][1][:16].equal(logits.argmax(1) == labels[first])
    assert not list(tmp_path.iterdir())
