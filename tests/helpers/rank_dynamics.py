"""What ranks of a pool run to count forgetting and to join columns by sample."""

import types

import torch
import torch.distributed as dist
from rank_features import text_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from mts_fast.distributed import ForgettingCounter, IndexedDataset, joined_columns
from mts_fast.features import training_dynamics

WORDS, CLASSES = 20, 3


class Texts(Dataset):
    """Token ids with an attention mask, as a tokenizer of Hugging Face gives them."""

    def __init__(self, size):
        g = torch.Generator().manual_seed(size)
        self.ids = torch.randint(1, WORDS, (size, 6), generator=g)
        self.mask = (torch.arange(6) < torch.randint(3, 7, (size, 1), generator=g)).long()
        self.labels = torch.randint(CLASSES, (size,), generator=g)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {
            "input_ids": self.ids[i],
            "attention_mask": self.mask[i],
            "labels": self.labels[i],
        }


class Mean(nn.Module):
    """A classifier that is called as those of transformers are."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, CLASSES)

    def forward(self, input_ids, attention_mask):
        share = attention_mask / attention_mask.sum(1, keepdim=True)
        mean = (self.words(input_ids) * share[:, :, None]).sum(1)
        return types.SimpleNamespace(logits=self.head(mean.tanh()))


def classifier(kind):
    torch.manual_seed(0)
    if kind == "mean":
        return Mean().double()
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        **{"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "intermediate_size": 32, "num_labels": CLASSES},
    )
    return BertForSequenceClassification(config).double().eval()


def train(group, size, epochs, kind):
    """(every prediction in order, forgetting columns, joined scores, the model's state)."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    texts = Texts(size)
    sampler = DistributedSampler(IndexedDataset(texts), ranks, rank, seed=7)
    loader = DataLoader(IndexedDataset(texts), batch_size=3, sampler=sampler)
    model = classifier(kind)
    parallel = DistributedDataParallel(model, process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    counter = ForgettingCounter(size, process_group=group)
    predictions = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for index, batch in loader:
            labels = batch.pop("labels")
            logits = parallel(**batch).logits
            correct = logits.argmax(1) == labels
            counter.update(index, correct)
            predictions += zip([epoch] * len(index), index.tolist(), correct.tolist(), strict=True)
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, labels).backward()
            optimizer.step()
        assert counter.end_epoch(complete=True) == size
    part = torch.tensor(list(sampler))
    inputs = {"input_ids": texts.ids[part], "attention_mask": texts.mask[part]}
    scores = training_dynamics(model, inputs, texts.labels[part])
    joined = joined_columns(scores, part, size, process_group=group)
    return predictions, counter.columns(), joined, model.state_dict()


def replay(group, size, history, state=None, begun=False):
    """A counter's columns and state after epochs, each a list by rank of (indices, flags); the last
    one is merged and not ended where it is `begun`."""
    rank = 0 if group is None else dist.get_rank(group)
    counter = ForgettingCounter(size, process_group=group)
    if state is not None:
        counter.load_state_dict(state)
    for number, epoch in enumerate(history):
        for indices, flags in epoch[rank]:
            counter.update(indices, flags)
        if begun and number == len(history) - 1:
            counter.merge()
        else:
            counter.end_epoch()
    return counter.columns(), counter.state_dict()


def failures(group):
    """Texts of what ranks must not do, and the counts after all of it."""
    rank, texts = dist.get_rank(group), {}
    sizes = ForgettingCounter(4 + (rank == 1), process_group=group)
    texts["sizes"] = text_of(sizes.end_epoch)
    counter = ForgettingCounter(4, process_group=group)
    counter.update(torch.tensor([rank]), torch.tensor([1]))
    texts["state"] = text_of(counter.state_dict)
    calls = text_of(counter.merge if rank else counter.end_epoch)
    texts["calls"] = calls
    texts["incomplete"] = text_of(lambda: counter.end_epoch(complete=True))
    texts["ended"] = counter.end_epoch()
    texts["twice"] = text_of(counter.end_epoch)
    if rank == 1:
        counter.load_state_dict(counter.state_dict() | {"epoch": torch.tensor([5])})
    texts["epochs"] = text_of(counter.end_epoch)
    return texts, counter.counts.tolist()


def bad_columns(group):
    """Texts of joined columns that must be refused."""
    rank, texts = dist.get_rank(group), {}
    column, numbers = torch.ones(2), torch.tensor([0, 1]) + 2 * rank

    def text(name, columns, indices, size):
        texts[name] = text_of(lambda: joined_columns(columns, indices, size, process_group=group))

    text("missing", {"loss": column}, numbers, 6)
    text("range", {"loss": column}, numbers + 9 * rank, 4)
    text("names", {"loss": column, **({"other": column} if rank else {})}, numbers, 4)
    text("widths", {"loss": column[:, None].expand(2, 1 + rank)}, numbers, 4)
    text("sizes", {"loss": column}, numbers, 4 + rank)
    return texts


def joined_with_an_empty_rank(group):
    """Columns of which rank 1 has none, and rank 2 repeats some with other values."""
    rank = dist.get_rank(group)
    numbers = [torch.tensor([4, 0, 0]), torch.zeros(0).long(), torch.tensor([3, 1, 0, 2])][rank]
    columns = {
        "loss": numbers.double() + 0.25 * rank,
        "pair": torch.stack([numbers, torch.arange(len(numbers))], 1).float(),
    }
    return joined_columns(columns, numbers, 5, process_group=group)
