"""One training step of a task in every arm: plain, published, by double backward, and MTSStep.

An arm has its own copy of the classifier, a selector and their optimizers. `step()` takes one step;
`selector_gradient` is the gradient that the selector's optimizer used.
"""

import copy
import importlib.util

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import mts_fast
from mts_fast import reference

LR = 0.05
ONLINE = 4
# step of the published code's finite differences, along v / ||v||
FD_STEP = 1e-2


def per_sample(output, labels):
    """Cross-entropy [B]; of a sequence, the mean over its positions."""
    if output.ndim == 3:
        return F.cross_entropy(output.transpose(1, 2), labels, reduction="none").mean(1)
    return F.cross_entropy(output, labels, reduction="none")


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=LR),
    "momentum": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, weight_decay=1e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-4),
    "capturable adamw": lambda p: torch.optim.AdamW(p, lr=1e-4, capturable=True),
}


class Arm:
    """Classifier, selector and optimizers; all arms of a task start equal."""

    def __init__(self, task, optimizer="sgd"):
        self.task = task
        self.model = copy.deepcopy(task.model)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        torch.manual_seed(1)
        width = ONLINE + task.features.shape[1]
        device = task.features.device
        self.selector = mts_fast.Selector(width, task.num_classes).to(device)
        on_gpu = device.type == "cuda"  # where a graph may hold its step
        self.selector_optimizer = torch.optim.AdamW(
            self.selector.parameters(), lr=1e-4, capturable=on_gpu
        )
        labels = task.train.labels
        self.classes = torch.zeros(len(labels), dtype=torch.int64, device=device)
        if labels.ndim == 1:
            self.classes = labels
        self.flags = torch.arange(len(labels), device=device) % 2 == 0

    @property
    def selector_gradient(self):
        return torch.cat([p.grad.flatten() for p in self.selector.parameters()])


class Plain(Arm):
    """Training without selection."""

    def step(self):
        batch = self.task.train
        loss = per_sample(self.model(batch.inputs), batch.labels).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class SelectionArm(Arm):
    """The parts that the published and the double-backward arms share."""

    def penultimate(self, model, inputs):
        seen = []
        handle = model.get_submodule(self.head).register_forward_pre_hook(
            lambda _, args: seen.append(args[0])
        )
        model(inputs)
        handle.remove()
        return seen[0] if seen[0].ndim == 2 else seen[0].mean(1)

    @property
    def head(self):
        return [n for n, m in self.model.named_modules() if isinstance(m, nn.Linear)][-1]

    def selector_features(self, batch):
        """Online features from passes in eval mode, then the offline ones."""
        self.model.eval()
        with torch.no_grad():
            val = self.penultimate(self.model, self.task.validation.inputs)
            train = self.penultimate(self.model, batch.inputs)
        self.model.train()
        online = [reference.standardize(x) for x in reference.online_features(train, val)]
        return torch.cat([*online, self.task.features], 1)

    def weights(self, h):
        z = self.selector(h, self.classes, self.flags)
        return F.logsigmoid(z).softmax(0)

    def train_classifier(self, h):
        """Row 9, with a separate forward and backward."""
        with torch.no_grad():
            p = self.weights(h)
        batch = self.task.train
        loss = (p * per_sample(self.model(batch.inputs), batch.labels)).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def train_selector(self, gradients):
        for parameter, g in zip(self.selector.parameters(), gradients, strict=True):
            parameter.grad = g
        self.selector_optimizer.step()


class Published(SelectionArm):
    """Eval-mode features, a copied network for the virtual step, graph-building differences."""

    two_batches = False

    def step(self):
        task, batch = self.task, self.task.train
        h = self.selector_features(batch)
        with torch.no_grad():
            p = self.weights(h)
        virtual = copy.deepcopy(self.model)
        virtual_optimizer = torch.optim.SGD(virtual.parameters(), lr=LR)
        loss = (p * per_sample(virtual(batch.inputs), batch.labels)).sum()
        virtual_optimizer.zero_grad()
        loss.backward()
        virtual_optimizer.step()
        virtual.eval()
        virtual_optimizer.zero_grad()
        per_sample(virtual(task.validation.inputs), task.validation.labels).mean().backward()
        v = [q.grad for q in virtual.parameters()]
        del virtual, loss
        selector_batch, selector_h = batch, h
        if self.two_batches:
            selector_batch = task.selector_batch
            selector_h = self.selector_features(selector_batch)
        self.train_selector(self.differences(selector_batch, selector_h, v))
        self.train_classifier(h)

    def differences(self, batch, h, v):
        """d(-<kappa v, sum p_i grad l_i>)/dphi from losses at theta + e v and theta - e v."""
        moved = copy.deepcopy(self.model)
        epsilon = FD_STEP / torch.stack([g.norm() for g in v]).norm()
        p = self.weights(h)
        parts = []
        for sign in (1, -1):
            with torch.no_grad():
                for q, theta, g in zip(moved.parameters(), self.model.parameters(), v, strict=True):
                    q.copy_(theta + sign * epsilon * g)
            loss = (p * per_sample(moved(batch.inputs), batch.labels)).sum()
            parts.append(
                torch.autograd.grad(loss, list(self.selector.parameters()), retain_graph=sign == 1)
            )
        return [-LR * (a - b) / (2 * epsilon) for a, b in zip(*parts, strict=True)]


class PublishedTwoBatches(Published):
    """The published scripts' form: the selector learns on an independent batch."""

    two_batches = True


class DoubleBackward(SelectionArm):
    """torch.func: differentiates through the graph of the virtual step."""

    def step(self):
        task = self.task
        h = self.selector_features(task.train)
        # fused attention has no second derivative
        with sdpa_kernel(SDPBackend.MATH):
            loss = self.virtual_validation_loss(h)
            self.train_selector(torch.autograd.grad(loss, list(self.selector.parameters())))
        self.train_classifier(h)

    def virtual_validation_loss(self, h):
        """Validation loss at theta', with its graph back to phi."""
        train, validation = self.task.train, self.task.validation
        theta = dict(self.model.named_parameters())
        buffers = {n: b.clone() for n, b in self.model.named_buffers()}
        output = functional_call(self.model, (theta, buffers), (train.inputs,))
        loss = (self.weights(h) * per_sample(output, train.labels)).sum()
        g = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        ahead = {n: q - LR * dq for (n, q), dq in zip(theta.items(), g, strict=True)}
        self.model.eval()
        output = functional_call(self.model, (ahead, buffers), (validation.inputs,))
        self.model.train()
        return per_sample(output, validation.labels).mean()


class Higher(DoubleBackward):
    """The package higher."""

    def virtual_validation_loss(self, h):
        import higher

        train, validation = self.task.train, self.task.validation
        with higher.innerloop_ctx(self.model, self.optimizer, copy_initial_weights=False) as (
            virtual,
            optimizer,
        ):
            output = virtual(train.inputs)
            optimizer.step((self.weights(h) * per_sample(output, train.labels)).sum())
            virtual.eval()
            return per_sample(virtual(validation.inputs), validation.labels).mean()


class TorchOpt(DoubleBackward):
    """The package torchopt."""

    def virtual_validation_loss(self, h):
        import torchopt

        train, validation = self.task.train, self.task.validation
        before = torchopt.extract_state_dict(self.model, by="reference")
        optimizer = torchopt.MetaSGD(self.model, lr=LR)
        output = self.model(train.inputs)
        optimizer.step((self.weights(h) * per_sample(output, train.labels)).sum())
        self.model.eval()
        loss = per_sample(self.model(validation.inputs), validation.labels).mean()
        self.model.train()
        torchopt.recover_state_dict(self.model, before)
        return loss


class Ours(Arm):
    """MTSStep with some options."""

    def __init__(self, task, optimizer="sgd", **options):
        super().__init__(task, optimizer)
        self.call = mts_fast.MTSStep(
            self.model, self.optimizer, self.selector, self.selector_optimizer, **options
        )

    def step(self):
        task = self.task
        self.call(
            task.train.inputs,
            task.train.labels,
            val_inputs=task.validation.inputs,
            val_labels=task.validation.labels,
            features=task.features,
            is_synthetic=self.flags,
            classes=self.classes,
        )


def arms_of(name):
    """label -> a function that makes the arm of a task, for one of the benchmark's models."""
    arms = {
        "plain": Plain,
        "published": Published,
        "published, two batches": PublishedTwoBatches,
        "double backward (torch.func)": DoubleBackward,
    }
    # higher and torchopt treat BatchNorm buffers differently
    if importlib.util.find_spec("higher") and name != "resnet18_batchnorm":
        arms["double backward (higher)"] = Higher
    if importlib.util.find_spec("torchopt") and name != "resnet18_batchnorm":
        arms["double backward (torchopt)"] = TorchOpt
    for schedule in ("exact", "reuse"):
        arms[f"auto, {schedule}"] = lambda t, s=schedule: Ours(t, schedule=s)
        if name != "resnet18_batchnorm":  # auto is forward mode under BatchNorm
            arms[f"auto, {schedule}, low memory"] = lambda t, s=schedule: Ours(
                t, schedule=s, memory="low"
            )
        for label, engine in (
            ("double_backward", "double_backward"),
            ("finite differences", "finite_difference"),
        ):
            arms[f"{label}, {schedule}"] = lambda t, s=schedule, e=engine: Ours(
                t, schedule=s, engine=e
            )
    return arms
