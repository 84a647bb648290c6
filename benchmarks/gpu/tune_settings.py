"""The cases of tune.py: for each kernel the sizes, the calls and the tiles.

The first setting of a case is the one in the source. Triton is imported when the cases are made.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from gpu_models import BUILD
from on_gpu import DEVICE, choose
from torch import Tensor
from update_baselines import draw_update

from mts_fast.reference import Target

Setting = list[tuple[ModuleType, str, object]]  # module, constant, value
# rows of classes that are read in tiles
VOCABULARIES = ((8192, 32_000), (8192, 50_257), (4096, 128_256))
HALF, FULL = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    """A call, and the settings to run it under."""

    size: str
    dtype: torch.dtype  # of the results
    run: Callable[[], tuple[Tensor, ...]]
    settings: dict[str, Setting]


def randn(*shape, dtype=FULL):
    return torch.randn(shape, device=DEVICE).to(dtype)


def first(value, alternatives):
    """The value in the source, then the alternatives to it."""
    return [value, *(a for a in alternatives if a != value)]


def cross_entropy_cases():
    """Rows in registers: the longest such row, rows a program, warps. Rows in tiles: the tiles."""
    from mts_fast.backends.triton.kernels import cross_entropy as kernel

    def table(name, alternatives):
        tiles_by_dtype = getattr(kernel, name)
        return {
            f"{name} {tile}": [(kernel, name, tiles_by_dtype | {FULL: tile})]
            for tile in first(tiles_by_dtype[FULL], alternatives)
        }

    def constant(name, alternatives):
        return {
            f"{name} {value}": [(kernel, name, value)]
            for value in first(getattr(kernel, name), alternatives)
        }

    tiles = ((8192, 4), (8192, 8), (16_384, 16), (32_768, 8), (32_768, 16))
    whole = constant("WHOLE_BYTES", (16_384, 65_536))
    short = constant("SMALL_BYTES", (1024, 4096, 8192)) | constant("BYTES_PER_WARP", (512, 1024))
    for dtype in (HALF, FULL):
        for rows, classes in choose(((16_384, 1000), (16_384, 100)), ((5, 11),)):
            yield _cross_entropy(kernel, rows, classes, dtype, False, short)
        for rows, classes in choose(((8192, 8000), (8192, 16_000)), ((2, 300),)):
            yield _cross_entropy(kernel, rows, classes, dtype, False, whole)
        for rows, classes in choose(VOCABULARIES, ((2, 8200),)):
            yield _cross_entropy(kernel, rows, classes, dtype, False, table("LOOP", tiles))
        for rows, classes in choose(VOCABULARIES[1:2], ((2, 8200),)):
            sums = table("LOOP_WITH_SUMS", tiles)
            yield _cross_entropy(kernel, rows, classes, dtype, True, sums)
            yield _backward(kernel, rows, classes, dtype, constant("GRADIENT_BYTES", (2048, 8192)))


def _rows(rows, classes, dtype):
    x = 2 * randn(rows, classes, dtype=dtype)
    return x, torch.randint(classes, (rows,), device=DEVICE), randn(rows).softmax(0)


def _cross_entropy(kernel, rows, classes, dtype, statistics, settings):
    x, labels, p = _rows(rows, classes, dtype)

    def run():
        result = kernel.cross_entropy(x, Target(labels), p, statistics)
        return result.losses, result.gradient

    suffix = ", statistics" if statistics else ""
    return Case(f"{rows} x {classes}{suffix}", dtype, run, settings)


def _backward(kernel, rows, classes, dtype, settings):
    x, labels, p = _rows(rows, classes, dtype)
    row = kernel.cross_entropy(x, Target(labels), None, False)

    def run():
        return (kernel.cross_entropy_backward(x, Target(labels), row.maximum, row.total, p),)

    return Case(f"{rows} x {classes}, backward", dtype, run, settings)


# (rows, columns, step of the inner loop, warps) of a tile
ONE_PRODUCT = {
    "half": (
        *((128, 128, 32, 4), (128, 128, 32, 8), (128, 128, 64, 4), (128, 256, 64, 8)),
        *((256, 128, 64, 8), (64, 128, 64, 4), (128, 64, 64, 4)),
    ),
    "tf32": ((128, 64, 32, 4), (64, 128, 32, 4), (128, 128, 32, 8), (128, 128, 16, 8)),
}
TWO_PRODUCTS = {
    "half": ((128, 128, 64, 8), (128, 64, 32, 4), (64, 64, 64, 4), (128, 128, 32, 8)),
    "tf32": ((64, 64, 32, 4), (64, 64, 32, 8), (128, 32, 32, 4)),
}
STAGES = (2, 4)


def _product_settings(kind, products):
    """Tiles for kernels that hold one or two products, and pipeline stages."""
    from mts_fast.backends.triton.kernels import product

    pair = product.TILES[kind]
    alternatives = (ONE_PRODUCT, TWO_PRODUCTS)[products - 1][kind]
    settings = {}
    for tile in first(tuple(pair[products - 1]), choose(alternatives, alternatives[:1])):
        changed = list(pair)
        changed[products - 1] = product.ProductTile(*tile)
        settings[f"tile {tile}"] = [(product, "TILES", product.TILES | {kind: tuple(changed)})]
    return settings | {f"stages {stages}": [(product, "STAGES", stages)] for stages in STAGES}


def hypergradient_dot_cases():
    """A layer of a ViT-S, of a GPT, and a 1 x 1 convolution."""
    from mts_fast.backends.triton.kernels.hypergradient_dot import hypergradient_dot

    sizes = choose(
        ((256, 197, 384, 1536), (16, 512, 3072, 768), (256, 196, 1024, 256)), ((2, 5, 8, 12),)
    )
    for kind, dtype in (("half", HALF), ("tf32", FULL)):
        for i, (samples, positions, inputs, outputs) in enumerate(sizes):
            a, b = (randn(samples, positions, n, dtype=dtype) for n in (inputs, outputs))
            if i == 2:  # channels first
                a, b = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (a, b))
            v = randn(outputs, inputs, dtype=dtype)

            def run(a=a, v=v, b=b):
                return (hypergradient_dot(a, v, b, None),)

            size = f"{samples} x {positions} x {inputs} x {outputs}"
            yield Case(size, dtype, run, _product_settings(kind, 1))


def linear_cross_entropy_cases():
    """The forward, which holds one product, and the tangent, which holds two."""
    from mts_fast.backends.triton.kernels.linear_cross_entropy import linear_cross_entropy
    from mts_fast.backends.triton.kernels.linear_cross_entropy_backward import (
        linear_cross_entropy_tangent,
    )
    from mts_fast.backends.triton.kernels.logits_tile import Problem

    for rows, width, classes in choose(((8192, 768, 50_257),), ((5, 16, 70),)):
        hidden, weight, tangent = (
            randn(n, width, dtype=HALF) * width**-0.25 for n in (rows, classes, classes)
        )
        labels = torch.randint(classes, (rows,), device=DEVICE)
        problem = Problem(hidden, weight, None, Target(labels))
        losses = linear_cross_entropy(problem)

        def forward(problem=problem):
            return (linear_cross_entropy(problem).losses,)

        def along(problem=problem, losses=losses, tangent=tangent):
            rest = (losses.maximum, losses.total, tangent, None)
            return (linear_cross_entropy_tangent(problem, *rest),)

        size = f"{rows} x {width} x {classes}"
        yield Case(size, HALF, forward, _product_settings("half", 1))
        yield Case(f"{size}, tangent", HALF, along, _product_settings("half", 2))


# (entries per block, blocks per program, warps)
POINTER_TABLES = (
    *((1024, 4, 4), (1024, 8, 4), (2048, 2, 8)),
    *((2048, 8, 8), (4096, 2, 8), (4096, 4, 8)),
)


def pointer_table_cases():
    """theta' under SGD and AdamW, and the perturbation."""
    from mts_fast.backends.triton.kernels import perturb, pointer_table, virtual_update

    users = pointer_table, perturb, virtual_update
    current = pointer_table.BLOCK, pointer_table.BLOCKS, pointer_table.WARPS
    settings = {}
    for block, blocks, warps in first(current, choose(POINTER_TABLES, POINTER_TABLES[:1])):
        constants = {"BLOCK": block, "BLOCKS": blocks, "WARPS": warps}
        # the program map is cached by tensor sizes, but depends on CHUNK: one cache per setting
        places = functools.lru_cache(pointer_table._program_map.__wrapped__)
        settings[f"block {block} x {blocks}, {warps} warps"] = [
            *((module, name, n) for module in users for name, n in constants.items()),
            (pointer_table, "CHUNK", block * blocks),
            (pointer_table, "_program_map", places),
        ]
    for model in choose(("resnet50_batchnorm", "vit_s", "gpt_125m"), ("vit_s",)):
        with torch.device("meta"):
            shapes = [p.shape for p in BUILD[model]().parameters()]
        for optimizer in ("sgd", "adamw"):
            update = draw_update(shapes, optimizer, DEVICE)

            def run(update=update):
                return virtual_update.virtual_update(*update.arguments)[0]

            yield Case(f"{model}, {optimizer}", FULL, run, settings)
        along, scale = [torch.randn_like(p) for p in update.parameters], randn()

        def moved(update=update, along=along, scale=scale):
            return perturb.perturb(update.parameters, along, scale)

        yield Case(f"{model}, perturb", FULL, moved, settings)


SAMPLE_DOTS = ((1024, 4), (1024, 8), (2048, 2), (2048, 8), (4096, 2), (4096, 4))


def sample_dot_cases():
    """Entries per load, and loads per program."""
    from mts_fast.backends.triton.kernels import sample_dot as kernel

    settings = {
        f"{block} x {loads}": [(kernel, "BLOCK", block), (kernel, "LOADS", loads)]
        for block, loads in first(
            (kernel.BLOCK, kernel.LOADS), choose(SAMPLE_DOTS, SAMPLE_DOTS[:1])
        )
    }
    for dtype in (HALF, FULL):
        for samples, entries in choose(((256, 197 * 384), (256, 64 * 56 * 56)), ((3, 9),)):
            x, y = randn(samples, entries, dtype=dtype), randn(samples, entries, dtype=dtype)

            def run(x=x, y=y):
                return (kernel.sample_dot(x, y),)

            yield Case(f"{samples} x {entries}", dtype, run, settings)


GROUPS = {
    "cross_entropy": cross_entropy_cases,
    "hypergradient_dot": hypergradient_dot_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
    "pointer_table": pointer_table_cases,
    "sample_dot": sample_dot_cases,
}
