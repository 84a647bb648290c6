"""A small training run around MTSStep: model, selector, both optimizers, and batches by seed."""

import copy

import torch
from models import CLASSES, batchnorm_cnn, mlp, norm_and_dropout
from torch import nn

import mts_fast
from mts_fast import reference
from mts_fast.ops.virtual_update import optimizer_states

# float64, over 20 steps, relative to the largest entry of each tensor. Observed at most 4e-10 for
# finite differences and 5e-15.
DRIFT = {"finite_difference": 1e-8}
DRIFT_EXACT = 1e-12

OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}
# name -> how it is made, the shape of one input
MODELS = {
    "mlp": (mlp, (4,)),
    "dropout": (lambda: nn.Sequential(nn.Dropout(0.3), *mlp()), (4,)),
    "dense": (norm_and_dropout, (4,)),
    "batchnorm": (batchnorm_cnn, (2, 6, 6)),
    "convolutional": (
        lambda: nn.Sequential(nn.Dropout2d(0.3), *batchnorm_cnn()),
        (2, 6, 6),
    ),
}
OFFLINE = 2


class StepRun:
    """Everything that one MTSStep works on; two runs of the same arguments are equal."""

    def __init__(
        self,
        device,
        *,
        model="mlp",
        optimizer="momentum",
        dtype=torch.float32,
        schedule=None,
        step_schedule="exact",
        **options,
    ):
        torch.manual_seed(5)
        self.device, self.dtype = device, dtype
        make, self.shape = MODELS[model]
        self.model = make().to(device, dtype).train()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        online = options.get("online_k", 3) + 1 if options.get("online_features", True) else 0
        self.selector = mts_fast.Selector(online + OFFLINE, CLASSES, hidden=(8,)).to(device, dtype)
        self.selector_optimizer = torch.optim.AdamW(self.selector.parameters(), lr=0.05)
        if schedule is not None:
            options["selector_scheduler"] = schedule(self.selector_optimizer)
        self.step = mts_fast.MTSStep(
            self.model,
            self.optimizer,
            self.selector,
            self.selector_optimizer,
            schedule=step_schedule,
            **options,
        )

    def draw(self, seed, size=12):
        """Inputs, labels, offline features and real/synthetic flags."""
        g = torch.Generator().manual_seed(seed)
        return (
            torch.randn(size, *self.shape, generator=g, dtype=self.dtype).to(self.device),
            torch.randint(CLASSES, (size,), generator=g).to(self.device),
            torch.randn(size, OFFLINE, generator=g, dtype=self.dtype).to(self.device),
            torch.randint(2, (size,), generator=g).bool().to(self.device),
        )

    def arguments(self, seed, *, two_batches=False):
        """Arguments of one call; its training, validation and selector batches are different."""
        inputs, labels, features, is_synthetic = self.draw(seed)
        val_inputs, val_labels, *_ = self.draw(seed + 1000, 9)
        arguments = {
            "inputs": inputs,
            "labels": labels,
            "features": features,
            "is_synthetic": is_synthetic,
            "val_inputs": val_inputs,
            "val_labels": val_labels,
        }
        if two_batches:
            arguments["selector_batch"] = mts_fast.SelectorBatch(*self.draw(seed + 2000, 10))
        return arguments

    def copy_of_plain_parts(self):
        """The classifier and its optimizer, for a run without selection beside this one."""
        return copy.deepcopy((self.model, self.optimizer))


def reference_step(run, arguments, **options):
    """The same step by reference.mts_step."""
    states = optimizer_states(run.optimizer)
    selector_batch = arguments.get("selector_batch")
    if selector_batch is not None:
        selector_batch = reference.Batch(
            *(getattr(selector_batch, k) for k in ("inputs", "labels", "is_synthetic", "features"))
        )
    return reference.mts_step(
        run.model,
        run.optimizer,
        {n: states[p] for n, p in run.model.named_parameters()},
        run.selector,
        run.selector_optimizer,
        reference.Batch(*(arguments[k] for k in ("inputs", "labels", "is_synthetic", "features"))),
        (arguments["val_inputs"], arguments["val_labels"]),
        selector_batch=selector_batch,
        **options,
    )
