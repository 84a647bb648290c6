"""embed: the features it returns, and that it leaves the model unchanged."""

import sys
import types

import numpy as np
import pytest
import torch
from comparison import assert_bitwise, snapshot
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from mts_fast.features import embed

IMAGES = torch.randn(11, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def classifier():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )


def batches(size=4, **options):
    return DataLoader(TensorDataset(IMAGES, torch.arange(11)), batch_size=size, **options)


ROWS = torch.arange(22.0).view(11, 2)
DATA = TensorDataset(ROWS, torch.arange(11))


class Streamed(IterableDataset):
    def __iter__(self):
        return iter(ROWS)


class Backwards(SequentialSampler):
    """A subclass of SequentialSampler that is not sequential."""

    def __iter__(self):
        return reversed(range(11))


# loaders of known order: sequential samplers, also inside batch samplers; streams; lists
@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(DATA, batch_size=4),
        DataLoader(DATA, batch_size=4, sampler=SequentialSampler(DATA)),
        DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 4, False)),
        DataLoader(DATA, sampler=BatchSampler(SequentialSampler(DATA), 4, False), batch_size=None),
        DataLoader(DATA, batch_size=1),
        DataLoader(Streamed(), batch_size=4),
        list(ROWS.split(4)),
        tuple(DataLoader(DATA, batch_size=4)),
    ],
)
def test_loaders_of_known_order(loader):
    assert torch.equal(embed(nn.Identity(), loader), ROWS)
    assert torch.equal(embed(nn.Identity(), iter(loader)), ROWS)


# loaders whose order embed cannot know
@pytest.mark.parametrize(
    ("loader", "why"),
    [
        (DataLoader(DATA, batch_size=4, shuffle=True), "shuffle=True or .*RandomSampler"),
        (DataLoader(DATA, sampler=SubsetRandomSampler(range(11))), "SubsetRandomSampler"),
        (DataLoader(DATA, sampler=WeightedRandomSampler(torch.ones(11), 11)), "WeightedRandomSam"),
        (DataLoader(DATA, sampler=Backwards(DATA)), "Backwards"),
        (DataLoader(DATA, sampler=list(range(11))), "list"),
        (DataLoader(DATA, batch_sampler=[[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]), "list"),
        (DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 4, False)), "RandomSam"),
        (DataLoader(DATA, batch_size=4, num_workers=2, in_order=False), "in_order=False"),
        (
            DataLoader(Streamed(), batch_size=4, num_workers=2),
            "IterableDataset with several workers",
        ),
        (set(ROWS.split(4)), "a set, which has none"),
    ],
)
def test_loaders_of_another_order(loader, why):
    message = f"embed: loader must be in a fixed order, got .*{why}.*; pass shuffle=False"
    with pytest.raises(ValueError, match=message):
        embed(nn.Identity(), loader)


@pytest.mark.parametrize("out", [None, "x.npy"])
def test_the_caller_vouches_for_an_order(out, tmp_path):
    out = None if out is None else tmp_path / out
    ours = DataLoader(DATA, batch_sampler=[list(range(6)), list(range(6, 11))])
    assert torch.equal(embed(nn.Identity(), ours, ordered=True, out=out), ROWS)
    with pytest.raises(TypeError, match="ordered must be True or False, got str 'yes'"):
        embed(nn.Identity(), ours, ordered="yes", out=out)


# loaders that yield fewer or more samples than the data set has
@pytest.mark.parametrize("out", [None, "x.npy"])
@pytest.mark.parametrize(
    ("loader", "count"),
    [
        (DataLoader(DATA, batch_size=4, drop_last=True), "8;"),
        (DataLoader(DATA, batch_sampler=[[3, 4]]), "2;"),
        (DataLoader(DATA, batch_sampler=[list(range(11)), [0, 1]]), "13 or more;"),
    ],
)
def test_samples_left_out_or_repeated(loader, count, out, tmp_path):
    out = None if out is None else tmp_path / out
    message = f"loader must be of 11 samples, as its dataset, got {count} pass drop_last=False; emb"
    with pytest.raises(ValueError, match=message):
        embed(nn.Identity(), loader, ordered=True, out=out)
    assert list(tmp_path.iterdir()) == []
    part = DataLoader(Subset(DATA, [3, 4, 7]), batch_size=2)
    assert torch.equal(embed(nn.Identity(), part, out=out), ROWS[[3, 4, 7]])


@pytest.mark.parametrize("out", [None, "x.npy"])
@pytest.mark.parametrize(
    ("last", "got"),
    [
        (torch.ones(2, 3), r"a float32 tensor of shape \(2, 3\)"),
        (torch.ones(2, 2).double(), "float64"),
    ],
)
def test_batches_that_differ(last, got, out, tmp_path):
    class Sized(list):
        dataset = range(6)

    out = None if out is None else tmp_path / out
    message = rf"the model's output must be \[B, 2\] torch.float32 in every batch, got .*{got}"
    with pytest.raises(ValueError, match=message):
        embed(nn.Identity(), Sized([ROWS[:4], last]), out=out)
    assert list(tmp_path.iterdir()) == []


INDEX, TOKENS = torch.arange(11), torch.arange(22).view(11, 2) % 7


@pytest.mark.parametrize(
    "rest", [[(ROWS, INDEX)], [{"x": ROWS}], [[ROWS]], [ROWS, INDEX], [TOKENS]]
)
def test_indices_are_not_read_as_inputs(rest):
    """A model of integer inputs would accept them without an error."""
    message = r"batches must be inputs first, got a int64 .*, as of indices, before .*; leave the"
    with pytest.raises(TypeError, match=f"embed: loader's {message}"):
        embed(nn.Embedding(11, 3), [(INDEX, *rest)])


def test_integers_that_are_inputs():
    model = nn.Embedding(11, 3)
    expected = model.weight.detach()
    assert torch.equal(embed(model, [TOKENS, TOKENS]), expected[TOKENS].mean(1).repeat(2, 1))
    assert torch.equal(embed(model, [(TOKENS, INDEX)]), expected[TOKENS].mean(1))
    # one number a sample, and a label
    assert torch.equal(embed(model, [(INDEX, INDEX)]), expected)


def test_a_model_on_another_device_comes_back_where_the_call_fails(device):
    model = classifier()
    with pytest.raises(OSError, match="image 7 is unreadable"):
        embed(model, DataLoader(Broken(7), batch_size=2), device=device)
    assert {t.device.type for t in model.state_dict().values()} == {"cpu"}
    embed(model, batches(), device=device)
    assert {t.device.type for t in model.state_dict().values()} == {device.type}


def hidden(model):
    """The pooled activations, in eval mode."""
    model = model.eval()
    return model[3](model[1](model[0](IMAGES))).flatten(1).detach()


# the output; the input of the classifier; maps, averaged over their positions
@pytest.mark.parametrize("layer", [None, "penultimate", "5", "1"])
def test_layers(layer):
    model = classifier()
    embeddings = embed(model, batches(), layer=layer)
    model.eval()
    expected = {
        None: model(IMAGES),
        "penultimate": hidden(model),
        "5": hidden(model),
        "1": model[0](IMAGES),
    }[layer]
    if layer == "1":
        # of a norm's input [B, D, H, W] the axes between are averaged: here [B, W]
        expected = expected.flatten(1, -2).mean(1)
    torch.testing.assert_close(embeddings, expected.detach())


def test_outputs_of_more_axes():
    tokens = torch.randn(5, 7, 3)
    assert torch.allclose(embed(nn.Identity(), [tokens]), tokens.mean(1))
    assert torch.allclose(embed(nn.Identity(), [IMAGES]), IMAGES.mean((2, 3)))
    assert embed(nn.Identity(), [tokens.double()]).dtype == torch.float64
    assert embed(nn.Identity(), [tokens.bfloat16()]).dtype == torch.float32


def test_leaves_no_trace():
    model = classifier().train()
    model[1].eval()
    before = snapshot(module=model)
    embed(model, batches(), layer="penultimate")
    assert_bitwise(snapshot(module=model), before)
    assert not model[5]._forward_pre_hooks


@pytest.mark.parametrize("size", [1, 4, 11])  # one by one, a remainder, all at once
def test_file_equals_memory(size, tmp_path):
    model, path = classifier(), tmp_path / "x.npy"
    embeddings = embed(model, batches(size), layer="penultimate", out=path)
    torch.testing.assert_close(embeddings, hidden(model))
    assert np.array_equal(np.load(path), embeddings.numpy())
    assert [p.name for p in tmp_path.iterdir()] == ["x.npy"]


class Broken(torch.utils.data.Dataset):
    def __init__(self, at):
        self.at = at

    def __len__(self):
        return 11

    def __getitem__(self, i):
        if i == self.at:
            raise OSError("image 7 is unreadable")
        return IMAGES[i]


def test_old_file_survives(tmp_path):
    path = tmp_path / "x.npy"
    path.write_text("old")
    with pytest.raises(OSError, match=r"^image 7 is unreadable"):
        embed(classifier(), DataLoader(Broken(7), batch_size=2), out=path)
    with pytest.raises(ValueError, match="loader must be of 11 samples, as its dataset, got 8"):
        embed(classifier(), batches(drop_last=True), out=path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("model", "loader", "options", "error", "message"),
    [
        (classifier(), batches(shuffle=True), {}, ValueError, "loader must be in a fixed order"),
        (classifier(), [], {}, ValueError, "loader must be non-empty"),
        (classifier(), None, {}, TypeError, "loader must be an iterable of batches, got NoneType"),
        (classifier(), "data", {}, TypeError, "loader must be an iterable of batches, got str"),
        (classifier(), {"x": 1}, {}, TypeError, "loader must be an iterable of batches, got dict"),
        (classifier(), IMAGES, {}, TypeError, "loader must be batches, got single samples of Ten"),
        (classifier(), DATA, {}, TypeError, "loader must be batches, got single samples of Tensor"),
        (classifier(), [torch.tensor(3.0)], {}, ValueError, "loader's batches must be .* B >= 1"),
        (classifier(), [IMAGES[:0]], {}, ValueError, "loader's batches must be .* B >= 1"),
        (None, batches(), {}, TypeError, "model must be a torch.nn.Module, got NoneType"),
        (classifier().to("meta"), batches(), {}, ValueError, "model must be on a device that ho"),
        (classifier(), batches(), {"device": "gpu"}, ValueError, "device must be a device of this"),
        (
            classifier(),
            batches(),
            {"device": "meta"},
            ValueError,
            "device must be on a device that",
        ),
        (classifier(), batches(), {"device": 1.5}, TypeError, "device must be a device of this"),
        (classifier(), batches(), {"device": "cuda:99"}, ValueError, "device must be a device of"),
        (classifier(), batches(), {"layer": 5}, TypeError, "layer must be a module path"),
        (classifier(), batches(), {"out": 5}, TypeError, "out must be a path"),
        (classifier(), [{"x": IMAGES}], {}, TypeError, "loader must be batches of tensors"),
        (classifier(), [IMAGES], {"out": "x.npy"}, ValueError, "loader must be of known length"),
        (classifier(), batches(), {"out": "x.pt"}, ValueError, "out must be a .npy file"),
        (
            classifier(),
            batches(),
            {"layer": "9"},
            ValueError,
            r"embed: layer must be a module path",
        ),
        (nn.Identity(), [IMAGES[:, 0, 0, 0]], {}, TypeError, "the model's output must be"),
        (nn.Flatten(0, 1), [IMAGES], {}, ValueError, "the model's output must be of length 11"),
        ("resnet18", batches(), {}, ValueError, "model must be a module, 'timm:NAME' or"),
        ("timm:", batches(), {}, ValueError, "model must be a module, 'timm:NAME' or"),
    ],
)
def test_errors_name_the_argument(model, loader, options, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=f"(embed: )?{message}"):
        embed(model, loader, **options)
    assert list(tmp_path.iterdir()) == []


def test_pretrained_models_by_name(monkeypatch):
    """Stand-ins for the two packages, which do not install beside a CPU build of torch."""
    asked = []
    timm = types.ModuleType("timm")
    timm.create_model = lambda name, **options: asked.append((name, options)) or nn.Flatten()
    torchvision = types.ModuleType("torchvision")
    model = classifier()
    torchvision.models = types.SimpleNamespace(
        get_model=lambda name, **options: asked.append((name, options)) or model
    )
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    assert torch.equal(embed("timm:vit_tiny", batches()), IMAGES.flatten(1))
    torch.testing.assert_close(embed("torchvision:resnet18", batches()), hidden(model))
    assert asked == [
        ("vit_tiny", {"pretrained": True, "num_classes": 0}),
        ("resnet18", {"weights": "DEFAULT"}),
    ]

    def unknown(name, **options):
        raise RuntimeError(f"Unknown model ({name})")

    timm.create_model = unknown
    with pytest.raises(
        ValueError, match=r"model must be one that timm has, got 'timm:x' \(Unknown"
    ):
        embed("timm:x", batches())
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match="install a timm that fits this torch"):
        embed("timm:vit_tiny", batches())
