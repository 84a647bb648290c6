"""Five runs to interrupt, all of their state, and exceptions at chosen or random moments."""

import copy
import random
import signal

import numpy as np
import torch
from step_run import StepRun
from torch.utils._python_dispatch import TorchDispatchMode

# what differs between paths through a step
RUNS = {
    "ghost": {"model": "dropout", "optimizer": "momentum"},
    "batchnorm": {"model": "dense", "optimizer": "nesterov"},
    "reuse": {"model": "mlp", "optimizer": "momentum", "step_schedule": "reuse"},
    "adamw_scheduler": {
        "model": "mlp",
        "optimizer": "adamw",
        "online_momentum": 0.9,
        "max_grad_norm": 0.1,
        "schedule": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    },
    "micro_batch": {"model": "dropout", "optimizer": "adamw", "micro_batch": 5},
}


class Interrupted(BaseException):
    """Like KeyboardInterrupt no Exception, so that no `except Exception` catches it."""


def begun(name, **options):
    """A run after two undisturbed steps, so that every buffer and moment exists."""
    run = StepRun(torch.device("cpu"), **RUNS[name], **options)
    for seed in range(2):
        run.step(**run.arguments(seed))
    return run


def whole_state(run):
    """All that a step may touch, as plain comparable values and tensors."""
    step = run.step
    scheduler = step.selector_scheduler
    parameters = [*run.model.parameters(), *run.selector.parameters()]
    return copy.deepcopy(
        {
            "model": run.model.state_dict(),
            "modes": [m.training for m in run.model.modules()],
            "optimizer": run.optimizer.state_dict(),
            "selector": run.selector.state_dict(),
            "selector_optimizer": run.selector_optimizer.state_dict(),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "online": step._features.state_dict(),
            "engines": step._engines.state_dict(),
            "steps": step.steps,
            "skipped": step.skipped_steps,
            "gradients": [None if p.grad is None else p.grad for p in parameters],
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state(),
            "python": random.getstate(),
        }
    )


def same(a, b):
    """Whether two states are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def differences(a, b):
    """The parts of two states that differ."""
    return [name for name in a if not same(a[name], b[name])]


class RaisingAt(TorchDispatchMode):
    """Raises at the n-th dispatched operators, counted from 1; counting goes on after a raise."""

    def __init__(self, *numbers, error=Interrupted):
        super().__init__()
        self.numbers, self.error, self.count = set(numbers), error, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count in self.numbers:
            raise self.error
        return func(*args, **(kwargs or {}))


class After:
    """Calls a function once in the main thread, some seconds after the block is entered."""

    def __init__(self, seconds, action):
        self.seconds, self.action = seconds, action

    def __enter__(self):
        self.before = signal.signal(signal.SIGALRM, lambda *_: self.action())
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)
