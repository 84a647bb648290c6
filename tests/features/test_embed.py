"""embed: what it takes from a model, and that it leaves no trace on it."""

import sys
import types

import numpy as np
import pytest
import torch
from comparison import assert_bitwise, snapshot
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

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


def hidden(model):
    """The pooled activations, in eval mode."""
    model = model.eval()
    return model[3](model[1](model[0](IMAGES))).flatten(1).detach()


# the output; the input of the classifier; maps, averaged over their positions
@pytest.mark.parametrize("layer", [None, "penultimate", "5", "1"])
def test_layers(layer):
    model = classifier()
    found = embed(model, batches(), layer=layer)
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
    torch.testing.assert_close(found, expected.detach())


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
    found = embed(model, batches(size), layer="penultimate", out=path)
    torch.testing.assert_close(found, hidden(model))
    assert np.array_equal(np.load(path), found.numpy())
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
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match="install a timm that fits this torch"):
        embed("timm:vit_tiny", batches())
