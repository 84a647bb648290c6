"""The arrays of tests/golden (made by the published implementation) as models and batches."""

import ast
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import mts_fast

FOLDER = Path(__file__).parents[1] / "golden"
STEPS = (
    "step_mlp_layernorm",
    "step_mlp_plain_momentum",
    "step_cnn_batchnorm",
    "step_cnn_batchnorm_two_batches",
)
# names of the published selector -> ours
SELECTOR_NAMES = {
    "first_hidden_layer.fc": "mlp.0",
    "rest_hidden_layers.0.fc": "mlp.2",
    "output_layer": "mlp.4",
}


class CNN(nn.Module):
    """`cnn_bn` of the golden data."""

    def __init__(self, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, classes)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.fc(x.mean((2, 3)))


def mlp(classes):
    """`mlp_ln` of the golden data."""
    return nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(12, 32),
            ln=nn.LayerNorm(32),
            act1=nn.GELU(),
            fc2=nn.Linear(32, 16),
            act2=nn.GELU(),
            fc=nn.Linear(16, classes),
        )
    )


@dataclass
class Golden:
    """One golden step: its arrays as tensors, and everything set up as before the step."""

    arrays: dict[str, torch.Tensor]
    config: dict
    model: nn.Module
    optimizer: torch.optim.SGD
    selector: mts_fast.Selector
    selector_optimizer: torch.optim.AdamW

    def group(self, prefix):
        """Arrays under `prefix/`; those of the selector have our names."""
        arrays = {
            k.removeprefix(prefix + "/"): v
            for k, v in self.arrays.items()
            if k.startswith(prefix + "/")
        }
        return {rename(k): v for k, v in arrays.items()}


def rename(name):
    """A published parameter name as ours."""
    for old, new in SELECTOR_NAMES.items():
        name = name.replace(old, new)
    return name


def load_arrays(name):
    """All numeric arrays of a file as tensors."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return {k: torch.from_numpy(file[k]) for k in file.files if file[k].dtype.kind in "fi"}


def load_step(name, device="cpu", dtype=torch.float64):
    """The golden step `name`, ready to run."""
    with np.load(FOLDER / f"{name}.npz") as file:
        config = ast.literal_eval(str(file["config"]))
    arrays = {
        k: v.to(device, dtype if v.is_floating_point() else None)
        for k, v in load_arrays(name).items()
    }
    classes = config["num_classes"]
    model = (CNN if config["kind"] == "cnn_bn" else mlp)(classes).to(device, dtype)
    selector = mts_fast.Selector(17, classes).to(device, dtype)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config["lr"],
        momentum=config["momentum"],
        nesterov=config["nesterov"],
        weight_decay=config["weight_decay"],
    )
    selector_optimizer = torch.optim.AdamW(
        mts_fast.training.parameter_groups(selector, config["selector_weight_decay"]),
        lr=config["selector_lr"],
    )
    golden = Golden(arrays, config, model, optimizer, selector, selector_optimizer)
    model.load_state_dict(golden.group("model_before"))
    selector.load_state_dict(golden.group("selector_before"))
    for parameter_name, parameter in model.named_parameters():
        before = arrays[f"momentum_before/{parameter_name}"]
        optimizer.state[parameter]["momentum_buffer"] = before.clone()
    return golden
