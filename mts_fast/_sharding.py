"""Parameters under `fully_shard` (FSDP2): this rank's shards as plain tensors.

A shard lies in the memory that FSDP gathers parameters from, so what is written to it in place is
seen by the next forward, once the modules are resharded. Everything that is elementwise in the
parameters works on shards; gradients come from a backward, whose hooks sum them over ranks, into
`.grad`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mts_fast._check import fail

# by class name: importing it would import torch.distributed
SHARDED_MODULE = "FSDPModule"


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over ranks (a DTensor)."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "to_local")


class Sharding:
    """The shards of a model's parameters on this rank.

    Raises:
        RuntimeError: parameters that are not sharded along their first axis over one group of
            ranks, all of them the same.
    """

    def __init__(self, op: str, model: nn.Module) -> None:
        self._op = op
        self._modules: list[Any] = [m for m in model.modules() if is_a(m, SHARDED_MODULE)]
        self._shards: dict[Tensor, Tensor] = {}
        self._mesh: Any = None
        self._paths: dict[Tensor, str] = {}
        self._wholes: dict[int, Tensor] = {}
        self._model = model
        # whether other ranks may be waiting inside of a forward or backward of this one
        self.in_pass = False
        for module in self._modules:
            policy = getattr(_parameters_of(module), "offload_policy", None)
            if type(policy).__name__ == "CPUOffloadPolicy":
                hint = "shard it without offload_policy="
                fail(RuntimeError, op, "model", "sharded on its device", "CPU offload", hint)
        self.reshard()
        for path, parameter in model.named_parameters():
            self._paths[parameter] = path
            placements: tuple[Any, ...] = getattr(parameter, "placements", ())
            on_first_axis = len(placements) == 1 and placements[0].is_shard(0)
            mesh = getattr(parameter, "device_mesh", None)
            if not on_first_axis or self._mesh not in (None, mesh):
                hint = "call fully_shard(model) with one mesh of one dimension, without exceptions"
                expected = "sharded along its first axis over one group of ranks, as all others"
                fail(RuntimeError, op, f"parameter {path!r}", expected, str(placements), hint)
            self._mesh = mesh
            self._shards[parameter] = parameter.to_local().detach()  # type: ignore[attr-defined]
        self._originals = {id(shard): p for p, shard in self._shards.items()}

    @staticmethod
    def of(op: str, model: nn.Module) -> Sharding | None:
        """That of a model; None where it is not sharded."""
        sharded = any(is_a(m, SHARDED_MODULE) for m in model.modules())
        return Sharding(op, model) if sharded else None

    @property
    def group(self) -> Any:
        """The ranks that the parameters are spread over."""
        return self._mesh.get_group()

    @property
    def precision(self) -> torch.dtype | None:
        """The dtype that FSDP casts parameters to; None where it leaves them as they are."""
        for module in self._modules:
            dtype: torch.dtype | None = module._get_fsdp_state()._mp_policy.param_dtype
            if dtype is not None:
                return dtype
        return None

    def local(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The shard of each, always the same object.

        Raises:
            RuntimeError: a parameter of something else.
        """
        if any(p not in self._shards for p in parameters):
            hint = "train other parameters, as those of a loss, by an optimizer of their own"
            expected = "of parameters of the sharded model"
            fail(RuntimeError, self._op, "optimizer", expected, "one with others", hint)
        return [self._trainable(p) for p in parameters]

    def _trainable(self, parameter: Tensor) -> Tensor:
        return self._shards[parameter].requires_grad_(parameter.requires_grad)

    def originals(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """The sharded parameter of each."""
        return [self._originals[id(s)] for s in shards]

    def whole(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """What modules hold in place of these shards while they are gathered, always the same
        objects; their values are there only within a forward or backward."""
        if not self._wholes:
            shards = {path: self._shards[p] for p, path in self._paths.items()}
            for module in self._modules:
                module.unshard()
            named = self._model.named_parameters()
            self._wholes = {id(shards[path]): gathered for path, gathered in named}
            self.reshard()
        return [self._wholes[id(p)] for p in parameters]

    def gathered(self, parameter: Tensor, value: Tensor) -> Tensor:
        """A tensor of which this is the shard at a parameter's place, whole, in the dtype that FSDP
        computes in. Every rank asks for the same in the same order."""
        whole = self._originals[id(parameter)]
        full: Tensor = self._spread(whole, value).full_tensor()  # type: ignore[attr-defined]
        return full if self.precision is None else full.to(self.precision)

    def reshard(self) -> None:
        """Free what is gathered, so that the next forward gathers the shards as they are now."""
        self.in_pass = False
        for module in self._modules:
            module.reshard()

    def optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """A view of an optimizer whose parameters and state are the shards; only to be read."""
        view = object.__new__(type(optimizer))
        view.__dict__.update(optimizer.__dict__)
        view.param_groups = [
            {**group, "params": [self._trainable(p) for p in group["params"]]}
            for group in optimizer.param_groups
        ]
        view.state = {  # type: ignore[assignment]
            self._shards[p]: {
                name: value.to_local() if is_sharded(value) else value
                for name, value in state.items()
            }
            for p, state in optimizer.state.items()
        }
        return view

    def gradients(
        self, parameters: Sequence[Tensor], outputs: Tensor, cotangent: Tensor | None
    ) -> list[Tensor | None]:
        """The gradient's shard of each shard, summed over ranks; `.grad` is left as it was.

        FSDP divides its sums by the number of ranks; the cotangent makes up for that.
        """
        cotangent = torch.ones_like(outputs) if cotangent is None else cotangent
        with self._without_gradients():
            torch.autograd.backward(outputs, cotangent.to(outputs.dtype) * self._divisor())
            self.in_pass = False
            gradients = [self._originals[id(p)].grad for p in parameters]
            return [None if g is None else g.to_local().detach() for g in gradients]  # type: ignore[attr-defined]

    def spread(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
    ) -> None:
        """Set `.grad` of the optimizer's parameters from these of shards; of others to None."""
        of_shard = dict(zip(map(id, parameters), gradients, strict=True))
        for whole in (p for group in optimizer.param_groups for p in group["params"]):
            g = of_shard.get(id(self._shards[whole]))
            whole.grad = None if g is None else self._spread(whole, g)

    def _spread(self, whole: Tensor, shard: Tensor) -> Tensor:
        """The sharded tensor of which this is the shard, laid out as a sharded parameter."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            shard,
            whole.device_mesh,  # type: ignore[attr-defined]
            whole.placements,  # type: ignore[attr-defined]
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )

    def total(self, value: Tensor) -> Tensor:
        """A number of every rank, summed."""
        return self._reduced(value, "SUM")

    def largest(self, value: Tensor) -> Tensor:
        """The largest of a number of every rank."""
        return self._reduced(value, "MAX")

    def any_rank(self, flags: Sequence[bool]) -> list[bool]:
        """Which are set on one of the ranks; between hosts, so that no device is waited for."""
        import torch.distributed as dist

        from mts_fast._hosts import hosts_of

        told = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(told, dist.ReduceOp.MAX, group=hosts_of(self.group))
        return [bool(flag) for flag in told.tolist()]

    def _reduced(self, value: Tensor, operation: str) -> Tensor:
        import torch.distributed as dist

        result = value.detach().clone()
        dist.all_reduce(result, getattr(dist.ReduceOp, operation), group=self.group)
        return result

    @contextmanager
    def _without_gradients(self) -> Iterator[None]:
        before = [(p, p.grad) for p in self._shards]
        try:
            for p, _ in before:
                p.grad = None
            yield
        finally:
            for p, g in before:
                p.grad = g

    def _divisor(self) -> float:
        """What FSDP divides its sums by."""
        for module in self._modules:
            factor = getattr(_parameters_of(module), "gradient_divide_factor", None)
            if factor is not None:
                return float(factor)
        return float(self._mesh.size())


def _parameters_of(module: Any) -> Any:
    """FSDP's own record of a module's parameters."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    return (groups or [None])[0] if groups is not None else state._fsdp_param_group


def is_a(module: nn.Module, name: str) -> bool:
    """Whether a module is of a class of that name, which need not be imported."""
    return any(cls.__name__ == name for cls in type(module).__mro__)
