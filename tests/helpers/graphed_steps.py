"""MTSSteps with and without a graph of the whole step, and models for them."""

import copy

import torch
import torch.nn.functional as F
from comparison import snapshot
from small_steps import CLASSES, batch
from torch import nn

import mts_fast
from mts_fast.training.result import StepResult

CALLS = 14
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


class Convolutions(nn.Module):
    """BatchNorm, whose statistics move in every call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm = nn.Conv1d(1, 4, 3, padding=1), nn.BatchNorm1d(4)
        self.b = nn.Linear(16, CLASSES)
        self.double()

    def forward(self, x):
        return self.b(self.norm(self.a(x[:, None])).relu().flatten(1))


class Dropping(nn.Module):
    def __init__(self, p=0.3):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(p), nn.Linear(8, CLASSES)).double()

    def forward(self, x):
        return self.layers(x)


class Scores(nn.Module):
    """A selector that reads no values on the host, as `Selector` does where they are on a CPU."""

    def __init__(self, num_features=0):
        super().__init__()
        torch.manual_seed(2)
        self.table = nn.Embedding(CLASSES, 4)
        self.layers = nn.Sequential(nn.Linear(5 + num_features, 8), nn.Tanh(), nn.Linear(8, 1))
        self.double()

    def forward(self, features, classes, is_synthetic):
        flags = is_synthetic.double()[:, None]
        return self.layers(torch.cat([self.table(classes), flags, features], 1))[:, 0]


def losses(outputs, labels):
    return F.cross_entropy(outputs, labels, reduction="none")


def make(model, *, graph, optimizer="sgd", selector=None, scheduled=False, **options):
    model = copy.deepcopy(model).to(DEVICE)
    torch.manual_seed(1)
    selector = copy.deepcopy(selector or Scores()).to(DEVICE)
    make_optimizer = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, capturable=True),
    }[optimizer]
    # the loss of a step reads labels that are on a CPU, to check them
    options = {"online_features": False, "check": "never", "loss": losses} | options
    selector_optimizer = torch.optim.SGD(selector.parameters(), lr=0.05, momentum=0.9)
    if scheduled:
        rate = torch.tensor(0.05, dtype=torch.float64, device=DEVICE)
        selector_optimizer = torch.optim.SGD(selector.parameters(), lr=rate, fused=True)
        schedule = torch.optim.lr_scheduler.StepLR(selector_optimizer, 3, gamma=0.5)
        options["selector_scheduler"] = schedule
    return mts_fast.MTSStep(
        model,
        make_optimizer(model.parameters()),
        selector,
        selector_optimizer,
        cuda_graph="step" if graph else False,
        **options,
    )


def on_device(values):
    return {name: value.to(DEVICE) for name, value in values.items()}


def run(step, calls=CALLS, first=0):
    return [step(**on_device(batch(first + seed))) for seed in range(calls)]


def state_of(step):
    device = DEVICE.type
    state = snapshot(module=step.model, optimizer=step.optimizer, device=device, gradients=True)
    state["selector"] = snapshot(
        module=step.selector, optimizer=step.selector_optimizer, device=device
    )
    state["step"] = copy.deepcopy(step.state_dict())
    return state


def tensors_of(result: StepResult):
    return {n: v for n, v in vars(result).items() if isinstance(v, torch.Tensor)}
