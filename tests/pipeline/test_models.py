"""Classifiers by name, and weights from files."""

import sys
import types

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mts_fast.pipeline.data import Findings
from mts_fast.pipeline.models import build_model, load_pretrained


def factories(monkeypatch, **functions):
    module = types.ModuleType("made_up")
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, "made_up", module)


def stub(monkeypatch, package, names):
    """A package with these models, all of one linear layer."""
    module = types.ModuleType(package)
    module.__spec__ = types.SimpleNamespace(name=package)
    models = module if package == "timm" else types.ModuleType(f"{package}.models")
    models.list_models = lambda: names

    def make(name, num_classes):
        layer = nn.Linear(4, num_classes)
        layer.name = name
        return layer

    models.create_model = models.get_model = make
    monkeypatch.setitem(sys.modules, package, module)
    monkeypatch.setitem(sys.modules, models.__name__, models)


def test_functions(monkeypatch):
    factories(
        monkeypatch,
        one=lambda num_classes: nn.Linear(2, num_classes),
        any=lambda **options: nn.Linear(2, options["num_classes"]),
        fixed=lambda: nn.Linear(2, 9),
        wrong=lambda: (nn.Linear(2, 9), None),
        number=3,
    )
    assert build_model("made_up:one", "image", 5).out_features == 5
    assert build_model("made_up:any", "image", 5).out_features == 5
    assert build_model("made_up:fixed", "image", 5).out_features == 9
    for name, error, said in (
        ("made_up:on", ValueError, "did you mean 'one'"),
        ("made_up:number", ValueError, "a function of made_up"),
        ("no_such_module:f", ValueError, "No module named 'no_such_module'"),
        ("made_up:wrong", TypeError, "returning a module, got tuple"),
    ):
        with pytest.raises(error, match=said):
            build_model(name, "image", 5)


def test_names_of_packages(monkeypatch):
    stub(monkeypatch, "timm", ["resnet18", "vit"])
    stub(monkeypatch, "torchvision", ["resnet18", "alexnet"])
    assert build_model("alexnet", "image", 3).name == "alexnet"
    assert build_model("torchvision:resnet18", "image", 3).out_features == 3
    with pytest.raises(ValueError, match=r"got 'resnet19'; did you mean 'resnet18'\?"):
        build_model("resnet19", "image", 3)


def test_a_package_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match="timm"):
        build_model("timm:resnet18", "image", 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic"
    )
    path = tmp_path_factory.mktemp("resnet")
    config.save_pretrained(path)
    return path


def test_a_folder_of_transformers(folder, tmp_path):
    model = build_model(str(folder), "image", 5)
    assert model(torch.rand(2, 3, 32, 32)).logits.shape == (2, 5)
    model.save_pretrained(tmp_path)
    other = build_model(str(tmp_path), "image", 3)  # another number of classes: a new head
    assert other(torch.rand(2, 3, 32, 32)).logits.shape == (2, 3)
    key = "resnet.embedder.embedder.convolution.weight"
    assert torch.equal(other.state_dict()[key], model.state_dict()[key])


def test_what_is_no_folder_of_transformers(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="--model must be a image model of transformers"):
        build_model(str(tmp_path), "image", 3)


def small():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "backbone.net."])
@pytest.mark.parametrize("form", ["safetensors", "bare", "checkpoint"])
def test_weights_under_any_prefix(prefix, form, tmp_path):
    torch.manual_seed(2)
    state = {prefix + k: torch.randn(v.shape) for k, v in small().state_dict().items() if v.ndim}
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state if form == "bare" else {"state_dict": state, "epoch": 3}, path)
    model, findings = small(), Findings()
    load_pretrained(model, str(path), findings)
    for key, value in state.items():
        assert torch.equal(model.state_dict()[key.removeprefix(prefix)], value)
    (remark,) = findings.remarks  # the counter of the batch norm, a scalar, is not in the file
    assert "1 tensors in the model alone" in remark and "num_batches_tracked" in remark


def test_what_does_not_fit_is_listed(tmp_path):
    state = {**small().state_dict(), "2.weight": torch.zeros(7, 4), "extra": torch.zeros(1)}
    path = str(tmp_path / "w.pt")
    torch.save(state, path)
    model, findings = small(), Findings()
    before = model[2].weight.clone()
    load_pretrained(model, path, findings)
    told = "\n".join(findings.remarks)
    assert "of other shapes, left as they were: '2.weight'" in told
    assert "in the file alone: 'extra'" in told and torch.equal(model[2].weight, before)


@pytest.mark.parametrize("content", [None, b"", b"not weights", {"a": 1}, {"x": torch.zeros(1)}])
def test_files_without_weights(content, tmp_path):
    path = tmp_path / "w.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    model = small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="--pretrained must be"):
        load_pretrained(model, str(path), Findings())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
