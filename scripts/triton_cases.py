"""Launches of every Triton kernel in every configuration, recorded without a GPU."""

from collections.abc import Callable, Iterator

import torch

from mts_fast.backends.triton.kernels.cross_entropy import cross_entropy, cross_entropy_backward
from mts_fast.backends.triton.kernels.hypergradient_dot import hypergradient_dot
from mts_fast.backends.triton.kernels.linear_cross_entropy import linear_cross_entropy
from mts_fast.backends.triton.kernels.linear_cross_entropy_backward import (
    linear_cross_entropy_backward,
    linear_cross_entropy_tangent,
)
from mts_fast.backends.triton.kernels.logits_tile import Problem
from mts_fast.backends.triton.kernels.norm_sample_gradients import (
    group_norm_sample_gradients,
    layer_norm_sample_gradients,
    longest_row,
)
from mts_fast.backends.triton.kernels.perturb import global_norm, perturb
from mts_fast.backends.triton.kernels.sample_dot import sample_dot
from mts_fast.backends.triton.kernels.scale import scale_
from mts_fast.backends.triton.kernels.virtual_update import virtual_update
from mts_fast.backends.triton.launch import Launch, recorded_launches
from mts_fast.reference import Target
from mts_fast.reference.virtual_update import AdamState, SGDState

HALF, FULL, DOUBLE = torch.bfloat16, torch.float32, torch.float64
IGNORED = -100
# several short rows per tile; a whole row, aligned to 8; rows in tiles; rows that are not aligned
CLASSES = (10, 1000, 32_000, 50_257)
# channels of a layer norm: several rows per tile; the longest rows of float64 and of float32
ROW_CHANNELS = (64, 768, 4096, 8192)
# (C, S) and groups: in registers with several warps, the largest there, of few positions, in tiles
GROUPED = (((64, 1024), 32), ((64, 4096), 32), ((512, 16), 32), ((256, 3136), 32), ((96, 1024), 1))


def new(*shape: int, dtype: torch.dtype = FULL) -> torch.Tensor:
    """A meta tensor: a launch is recorded from sizes and dtypes, without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def cross_entropy_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every tile in every dtype: the loss, with its gradient, and with all options."""
    labels, rows = new(64, dtype=torch.int64), new(64)
    for classes in CLASSES:
        for dtype in (HALF, FULL, DOUBLE):
            x = new(64, classes, dtype=dtype)
            statistic = new(64, dtype=torch.promote_types(dtype, FULL))
            for outputs in ("loss", "gradient", "everything"):
                full = outputs == "everything"
                weight = new(classes) if full else None
                target = Target(labels, weight, 0.1 if full else 0.0, IGNORED)
                cotangent = None if outputs == "loss" else rows

                def run(x=x, y=target, c=cotangent, full=full, statistic=statistic) -> None:
                    cross_entropy(x, y, c, full)
                    cross_entropy_backward(x, y, statistic, statistic, rows)

                yield f"C={classes} {_name(dtype)} {outputs}", run
    # one class, one sample: triton compiles sizes of 1 as constants
    one_label = Target(new(1, dtype=torch.int64))
    yield "C=1", lambda: cross_entropy(new(1, 1), one_label, new(1), True)
    half = new(64, 1000, dtype=torch.float16)
    yield "float16", lambda: cross_entropy(half, Target(labels), None, True)
    yield "scale", lambda: scale_(new(64, 1000, dtype=HALF), new())


def linear_cross_entropy_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """A language model's head, with and without bias, class weights and smoothing."""
    labels = new(1024, dtype=torch.int64)
    for kind, dtype in (("bfloat16", HALF), ("float32", FULL), ("tf32", FULL), ("float64", DOUBLE)):
        hidden, weight = new(1024, 768, dtype=dtype), new(50_304, 768, dtype=dtype)
        row = new(1024, dtype=torch.promote_types(dtype, FULL))
        for full in (False, True):
            bias = new(50_304, dtype=dtype) if full else None
            scales = (new(50_304), 0.1) if full else (None, 0.0)
            problem = Problem(hidden, weight, bias, Target(labels, *scales, IGNORED))

            def run(p=problem, row=row, kind=kind) -> None:
                _precision(kind)
                linear_cross_entropy(p)
                linear_cross_entropy_backward(p, row, row, row, [True, False, False])
                linear_cross_entropy_tangent(p, row, row, p.weight, p.bias)

            yield f"{kind} {'everything' if full else 'plain'}", run


def dot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Linear layers and 1 x 1 convolutions; operands of b's dtype, or cast from float32."""
    for kind, dtype in (("bfloat16", HALF), ("float32", FULL), ("tf32", FULL), ("float64", DOUBLE)):
        for cast in (False, True) if dtype == HALF else (False,):
            operand = FULL if cast else dtype
            a, v = new(8, 196, 768, dtype=operand), new(768, 768, dtype=operand)
            b, bias = new(8, 196, 768, dtype=dtype), new(768, dtype=operand)
            image = new(8, 768, 196, dtype=operand).transpose(1, 2)
            back = new(8, 768, 196, dtype=dtype).transpose(1, 2)
            name = f"{kind}{' from float32' if cast else ''}"

            def rows(a=a, v=v, b=b, bias=bias, kind=kind) -> None:
                _precision(kind)
                hypergradient_dot(a, v, b, bias)

            def channels(a=image, v=v, b=back, kind=kind) -> None:
                _precision(kind)
                hypergradient_dot(a, v, b, None)

            yield f"rows {name}", rows
            yield f"channels first {name}", channels
    tiny = new(1, 1, 1)
    yield "sizes of one", lambda: hypergradient_dot(tiny, new(1, 1), tiny, new(1))
    doubles = new(8, 4, 64, dtype=DOUBLE), new(64, 64, dtype=DOUBLE)
    yield "float32 from float64", lambda: hypergradient_dot(*doubles, new(8, 4, 64), None)
    for dtype in (HALF, FULL, DOUBLE):
        x = new(8, 4096, dtype=dtype)
        yield f"sample_dot {_name(dtype)}", lambda x=x: sample_dot(x, x)


def norm_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Rows of a layer and an RMS norm; groups in registers, in tiles, by passed statistics."""
    for kind, x_dtype, b_dtype in (
        ("bfloat16", HALF, HALF),
        ("float32", FULL, FULL),
        ("float64", DOUBLE, DOUBLE),
        # under autocast a norm computes in float32
        ("float32 from bfloat16", HALF, FULL),
    ):
        for channels in ROW_CHANNELS:
            if channels > longest_row(torch.promote_types(x_dtype, FULL)):
                continue
            x, b = (new(8, 200, channels, dtype=dtype) for dtype in (x_dtype, b_dtype))

            def rows(x=x, b=b) -> None:
                layer_norm_sample_gradients(x, b, 1e-5, True, True)
                layer_norm_sample_gradients(x, b, 1e-5, False, False)

            yield f"rows C={channels} {kind}", rows
        for shape, groups in GROUPED:
            image, back = (new(8, *shape, dtype=dtype) for dtype in (x_dtype, b_dtype))
            moment = new(shape[0])

            def grouped(x=image, b=back, groups=groups, moment=moment) -> None:
                group_norm_sample_gradients(x, b, groups, 1e-5, None, None)
                group_norm_sample_gradients(x, b, groups, 1e-5, moment, moment)
                # channels last
                x, b = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, b))
                group_norm_sample_gradients(x, b, groups, 1e-5, None, None)

            yield f"{groups} groups of {' x '.join(map(str, shape))} {kind}", grouped
    one = new(1, 1, 1)
    yield "rows of one", lambda: layer_norm_sample_gradients(one, one, 1e-5, True, True)
    yield "groups of one", lambda: group_norm_sample_gradients(one, one, 1, 1e-5, None, None)


def update_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """theta', kappa v and both, of aligned and unaligned tensors; the norm and the perturbation.

    These launches depend on the tensors' pointers, so the tensors are real.
    """
    for dtype in (HALF, FULL, DOUBLE):
        for aligned in (True, False):
            first = 0 if aligned else 1
            x, s = (torch.zeros(65, dtype=dtype)[first : first + 64] for _ in "xs")
            sgd = SGDState(lr=0.1, momentum=0.9, buffer=s)
            adam = AdamState(lr=0.1, exp_avg=s, exp_avg_sq=s, step=1.0)
            name = f"{_name(dtype)} {'aligned' if aligned else 'unaligned'}"
            for rule, state in (("sgd", sgd), ("adam", adam)):
                for update, along in ((True, None), (False, [x]), (True, [x])):
                    labels = {(True, False): "update", (False, True): "direction"}
                    label = labels.get((update, along is not None), "update and direction")

                    def run(x=x, state=state, update=update, along=along) -> None:
                        virtual_update([x], [x], [state], update=update, along=along)

                    yield f"{rule} {label} {name}", run
            yield f"norm {name}", lambda x=x: global_norm([x])
            yield f"perturb {name}", lambda x=x: perturb([x], [x], torch.ones(()))


GROUPS = {
    "cross_entropy": cross_entropy_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
    "hypergradient_dot": dot_cases,
    "norm_sample_gradients": norm_cases,
    "virtual_update": update_cases,
}


def launches_of(group: str) -> Iterator[tuple[str, Launch]]:
    """(case, launch) of every case in a group."""
    before = torch.get_float32_matmul_precision()
    try:
        for name, run in GROUPS[group]():
            with recorded_launches() as launches:
                run()
            yield from ((name, launch) for launch in launches)
    finally:
        torch.set_float32_matmul_precision(before)


def _precision(kind: str) -> None:
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
