"""Checks of the arguments that MTSStep is built from: types, ranges, ownership."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mts_fast._check import (
    check_bool,
    check_callable,
    check_choice,
    check_finite,
    check_int,
    check_module,
    check_number,
    describe,
    fail,
)
from mts_fast.backends.registry import BACKENDS
from mts_fast.distributed import check_wrappers
from mts_fast.ops.update_rules import check_optimizer
from mts_fast.training.validation import VALIDATION_OBJECTIVES

OP = "MTSStep"
CHOICES = {
    "schedule": ("exact", "reuse"),
    "backend": BACKENDS,
    "validation_mode": ("eval", "train"),
    "val_objective": VALIDATION_OBJECTIVES,
    "check": ("auto", "always", "never"),
}
# smallest value of each
COUNTS = {"accumulate": 1, "selector_every": 1, "online_k": 1, "warmup_steps": 0}
FLAGS = ("online_features", "track_gsnr", "clip_virtual_step")
# bounds of numbers that may be None
NUMBERS: dict[str, dict[str, float]] = {
    "hypergradient_lr": {"above": 0.0},
    "max_grad_norm": {"above": 0.0},
    "online_momentum": {"at_least": 0.0, "below": 1.0},
}


def check_options(options: Mapping[str, object]) -> None:
    """Check every option of MTSStep by itself."""
    for name, choices in CHOICES.items():
        check_choice(OP, name, options[name], choices)
    for name, low in COUNTS.items():
        check_int(OP, name, options[name], low=low, hint="pass a number of calls or samples")
    for name in FLAGS:
        check_bool(OP, name, options[name])
    for name, bounds in NUMBERS.items():
        if options[name] is not None:
            check_number(OP, name, options[name], **bounds)  # type: ignore[arg-type]
    if options["clip_virtual_step"] and options["max_grad_norm"] is None:
        hint = "pass max_grad_norm= with it"
        fail(ValueError, OP, "clip_virtual_step", "False without max_grad_norm", "True", hint)
    for name in ("loss", "val_loss"):
        if options[name] is not None:
            check_callable(OP, name, options[name])
    graph = options["cuda_graph"]
    if not isinstance(graph, bool) and graph != "step":
        hint = "True records the selector's part of a step, 'step' all of it"
        fail(TypeError, OP, "cuda_graph", "True, False or 'step'", describe(graph), hint)
    if options["atomic"] is not None:
        check_bool(OP, "atomic", options["atomic"])
    dtype = options["candidate_dtype"]
    if dtype not in (None, torch.bfloat16, torch.float16):
        hint = "leave it out to look at candidates in the precision of the call"
        expected = "None, torch.bfloat16 or torch.float16"
        got = str(dtype) if isinstance(dtype, torch.dtype) else describe(dtype)
        fail(TypeError, OP, "candidate_dtype", expected, got, hint)
    layer, scaler = options["feature_layer"], options["scaler"]
    if layer is not None and not isinstance(layer, str):
        hint = "see model.named_modules()"
        fail(TypeError, OP, "feature_layer", "None or a module path", describe(layer), hint)
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        hint = "make one with torch.amp.GradScaler()"
        fail(TypeError, OP, "scaler", "None or a torch.amp.GradScaler", describe(scaler), hint)


def check_parts(
    model: object,
    optimizer: object,
    selector: object,
    selector_optimizer: object,
    selector_scheduler: object,
    loss_modules: list[nn.Module],
) -> None:
    """Refuse what cannot be trained, or could not be undone when a step raises."""
    module = check_module(OP, "model", model)
    selector_module = check_module(OP, "selector", selector)
    check_wrappers(OP, "model", module)
    check_wrappers(OP, "selector", selector_module)
    for arg, part in (("model", module), ("selector", selector_module)):
        _check_initialised(arg, part)
    if module is selector_module:
        hint = "build a Selector of its own"
        fail(ValueError, OP, "selector", "another module than model", "the model itself", hint)
    first = _check_torch_optimizer("optimizer", optimizer)
    check_optimizer(first, op=OP)
    second = _check_torch_optimizer("selector_optimizer", selector_optimizer)
    _check_undoable(second)
    model_parameters = {id(p) for m in (module, *loss_modules) for p in m.parameters()}
    _check_owner(first, model_parameters, "optimizer", "model")
    learning = {id(p) for p in selector_module.parameters() if p.requires_grad}
    if not learning:
        hint = "set requires_grad on what shall learn"
        fail(ValueError, OP, "selector", "given trainable parameters", "none", hint)
    _check_owner(second, learning, "selector_optimizer", "selector")
    shared = {id(p) for p in _parameters(first)} & {id(p) for p in _parameters(second)}
    if shared:
        hint = "give each optimizer the parameters of its own module"
        got = f"{len(shared)} parameters that optimizer holds, too"
        fail(ValueError, OP, "selector_optimizer", "apart from optimizer", got, hint)
    if selector_scheduler is not None:
        check_scheduler(selector_scheduler, second)


def _check_initialised(arg: str, module: nn.Module) -> None:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            hint = "run it on a batch first, before its optimizer is made"
            fail(ValueError, OP, arg, "initialised", f"{name!r} without a shape", hint)


def check_scheduler(scheduler: object, optimizer: torch.optim.Optimizer) -> None:
    """Require a scheduler of this optimizer whose step() takes no metric."""
    arg = "selector_scheduler"
    if not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
        hint = "make one of torch.optim.lr_scheduler, or step your own outside"
        fail(TypeError, OP, arg, "a torch LRScheduler", describe(scheduler), hint)
    required = [
        name
        for name, p in inspect.signature(scheduler.step).parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if required:
        hint = "step it yourself, after the call"
        got = f"{type(scheduler).__name__}, whose step wants {', '.join(required)}"
        fail(ValueError, OP, arg, "stepped without arguments", got, hint)
    if scheduler.optimizer is not optimizer:
        hint = "build it with selector_optimizer"
        fail(ValueError, OP, arg, "of selector_optimizer", "one of another optimizer", hint)


def check_class_weight(value: object, num_classes: int | None, like: Tensor) -> Tensor | None:
    """[C] on the device and in the dtype of the selector: finite, 0 or more."""
    if value is None:
        return None
    arg = "class_weight"
    expected = "[C] numbers, one per class"
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        message = f"{OP}: {arg} must be {expected}, got {describe(value)} ({error}); pass a tensor"
        raise TypeError(message) from error
    if tensor.dtype == torch.bool or tensor.is_complex():
        fail(TypeError, OP, arg, expected, describe(tensor), "pass real numbers")
    if tensor.ndim != 1 or not len(tensor):
        fail(ValueError, OP, arg, expected, describe(tensor), "pass a vector")
    if num_classes is not None and len(tensor) != num_classes:
        hint = "see num_classes of Selector"
        fail(ValueError, OP, arg, f"of length {num_classes}", describe(tensor), hint)
    check_finite(OP, arg, tensor.double(), "give an absent class 0 or 1 (not 1 / 0)")
    if bool((tensor < 0).any()):
        got = f"values from {float(tensor.min()):g} to {float(tensor.max()):g}"
        fail(ValueError, OP, arg, "0 or more", got, "a class of weight 0 is left out")
    dtype = torch.promote_types(like.dtype, torch.float32)
    return tensor.detach().to(like.device, dtype, copy=True)


def _check_torch_optimizer(arg: str, value: object) -> torch.optim.Optimizer:
    if not isinstance(value, torch.optim.Optimizer):
        hint = "pass one of torch.optim; of a wrapper, the optimizer inside"
        fail(TypeError, OP, arg, "a torch.optim.Optimizer", describe(value), hint)
    return value


def _check_undoable(optimizer: torch.optim.Optimizer) -> None:
    """Refuse a selector's optimizer whose step is known to raise, or needs a closure."""
    arg, name = "selector_optimizer", type(optimizer).__name__
    step: Callable[..., object] = optimizer.step
    closure = inspect.signature(step).parameters.get("closure")
    if isinstance(optimizer, torch.optim.LBFGS) or (
        closure is not None and closure.default is inspect.Parameter.empty
    ):
        hint = "take AdamW, or another that steps without a closure"
        fail(ValueError, OP, arg, "stepped without a closure", name, hint)
    for group in optimizer.param_groups:
        if group.get("differentiable"):
            hint = f"make it with {name}(..., differentiable=False)"
            fail(ValueError, OP, arg, "without differentiable", "differentiable=True", hint)
        on_cpu = any(p.device.type == "cpu" for p in group["params"])
        if group.get("capturable") and on_cpu:
            hint = f"make it with {name}(..., capturable=False), or move the selector to a GPU"
            fail(ValueError, OP, arg, "capturable on a GPU only", "parameters on the CPU", hint)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _check_owner(optimizer: torch.optim.Optimizer, ids: set[int], arg: str, owner: str) -> None:
    if not any(id(p) in ids for p in _parameters(optimizer)):
        hint = f"build it with {owner}.parameters(), after {owner} was sharded or moved"
        got = "one that holds none of them"
        fail(ValueError, OP, arg, f"of the trainable parameters of {owner}", got, hint)
