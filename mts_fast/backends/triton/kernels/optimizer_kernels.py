"""The element maths of theta' and kappa v under SGD and Adam, for rows of a pointer table.

Columns of a row: parameter, gradient, along, updated, direction, then the optimizer's state. Its
numbers start with lr, the lr of kappa, the sign of the gradient and the decay that is added to it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mts_fast.backends.triton.kernels.arithmetic import divide
from mts_fast.backends.triton.kernels.pointer_table import address, block, place, pointer, where_present


@triton.jit
def number(numbers_ptr, row, COLUMN: tl.constexpr, WIDTH: tl.constexpr):
    """A float64 of a row's numbers."""
    return tl.load(numbers_ptr + row * WIDTH + COLUMN)


@triton.jit
def effective_gradient(g, p, sign, decay):
    """sign g + decay p; without decay the parameter does not count, be it infinite."""
    return sign * g + tl.where(decay != 0, decay * p, 0.0)


@triton.jit
def exact_sqrt(x):
    """Rounded to nearest, also of subnormal x, which the fast one takes for 0."""
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def sgd_block(
    first,
    size,
    p_ptr,
    g_ptr,
    v_ptr,
    updated_ptr,
    direction_ptr,
    buffer_ptr,
    buffer_address,
    lr,
    kappa,
    sign,
    decay,
    gradient_share,
    buffer_share,
    WHOLE: tl.constexpr,
    UPDATE: tl.constexpr,
    DIRECTION: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """p - lr (gradient_share g' + buffer_share buffer) and kappa v, one block."""
    offs, mask = block(first, size, WHOLE, BLOCK)
    if UPDATE:
        p = tl.load(p_ptr + offs, mask=mask, other=0.0).to(ACC)
        g = tl.load(g_ptr + offs, mask=mask, other=0.0).to(ACC)
        has_buffer = where_present(mask, buffer_address)
        buffer = tl.load(buffer_ptr + offs, mask=has_buffer, other=0.0).to(ACC)
        step = gradient_share * effective_gradient(g, p, sign, decay) + buffer_share * buffer
        tl.store(updated_ptr + offs, (p - lr * step).to(updated_ptr.dtype.element_ty), mask=mask)
    if DIRECTION:
        v = tl.load(v_ptr + offs, mask=mask, other=0.0).to(ACC)
        tl.store(direction_ptr + offs, (kappa * v).to(direction_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sgd_kernel(
    places_ptr,
    table_ptr,
    numbers_ptr,
    counts_ptr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    UPDATE: tl.constexpr,
    DIRECTION: tl.constexpr,
    PARAMETER: tl.constexpr,
    GRADIENT: tl.constexpr,
    ALONG: tl.constexpr,
    STATE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """theta' (UPDATE) and kappa v (DIRECTION) of a chunk of one tensor under SGD.

    Grid [programs]; tiles [BLOCK], BLOCKS of them a program. Moves parameter, gradient, momentum
    buffer and theta' once for the one, v and kappa v once for the other.
    """
    row, row_ptr, size, start = place(places_ptr, table_ptr, WIDTH, BLOCK * BLOCKS)
    p_ptr = pointer(row_ptr, 0, PARAMETER, ALIGNED)
    g_ptr = pointer(row_ptr, 1, GRADIENT, ALIGNED)
    v_ptr = pointer(row_ptr, 2, ALONG, ALIGNED)
    updated_ptr = pointer(row_ptr, 3, PARAMETER, ALIGNED)
    direction_ptr = pointer(row_ptr, 4, PARAMETER, ALIGNED)
    buffer_ptr = pointer(row_ptr, 5, STATE, ALIGNED)
    buffer_address = address(row_ptr, 5)
    sign = number(numbers_ptr, row, 2, WIDTH)
    gradient_share = number(numbers_ptr, row, 4, WIDTH)
    lr = number(numbers_ptr, row, 0, WIDTH).to(ACC)
    kappa = (number(numbers_ptr, row, 1, WIDTH) * sign * gradient_share).to(ACC)
    decay = number(numbers_ptr, row, 3, WIDTH).to(ACC)
    buffer_share = number(numbers_ptr, row, 5, WIDTH).to(ACC)
    sign, gradient_share = sign.to(ACC), gradient_share.to(ACC)
    for i in range(BLOCKS):
        first = start + i * BLOCK
        if first + BLOCK <= size:
            sgd_block(
                *(first, size, p_ptr, g_ptr, v_ptr, updated_ptr, direction_ptr),
                *(buffer_ptr, buffer_address, lr, kappa, sign, decay, gradient_share, buffer_share),
                *(True, UPDATE, DIRECTION, BLOCK, ACC),
            )
        elif first < size:
            sgd_block(
                *(first, size, p_ptr, g_ptr, v_ptr, updated_ptr, direction_ptr),
                *(buffer_ptr, buffer_address, lr, kappa, sign, decay, gradient_share, buffer_share),
                *(False, UPDATE, DIRECTION, BLOCK, ACC),
            )


@triton.jit
def adam_block(
    first,
    size,
    p_ptr,
    g_ptr,
    v_ptr,
    updated_ptr,
    direction_ptr,
    mean_ptr,
    square_ptr,
    state_address,
    kappa_lr,
    sign,
    decay,
    shrink,
    eps,
    step_mean,
    step_fresh,
    root_square,
    root_fresh,
    slope_eps,
    slope_square,
    slope_mean,
    noise_floor,
    WHOLE: tl.constexpr,
    UPDATE: tl.constexpr,
    DIRECTION: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """shrink p - (step_mean m0 + step_fresh g) / (r + eps), r^2 = root_square v0 + root_fresh g^2,
    and kappa v, one block; `reference` derives the slope. Returns how many entries of kappa are
    noise: r < noise_floor, or r = 0."""
    offs, mask = block(first, size, WHOLE, BLOCK)
    p = tl.load(p_ptr + offs, mask=mask, other=0.0).to(ACC)
    g = tl.load(g_ptr + offs, mask=mask, other=0.0).to(ACC)
    # before the first step there is no state, and it counts as zeros
    has_state = where_present(mask, state_address)
    old_mean = tl.load(mean_ptr + offs, mask=has_state, other=0.0).to(ACC)
    old_square = tl.load(square_ptr + offs, mask=has_state, other=0.0).to(ACC)
    g = effective_gradient(g, p, sign, decay)
    root = exact_sqrt(root_square * old_square + root_fresh * g * g)
    below = root + eps
    masked = tl.full((), 0, tl.int32)
    if DIRECTION:
        # counted before v is loaded, which keeps registers free
        noise = (root < noise_floor) | (root == 0)
        masked = tl.sum((noise & mask).to(tl.int32))
    if UPDATE:
        updated = shrink * p - divide(step_mean * old_mean + step_fresh * g, below, ACC)
        tl.store(updated_ptr + offs, updated.to(updated_ptr.dtype.element_ty), mask=mask)
    if DIRECTION:
        v = tl.load(v_ptr + offs, mask=mask, other=0.0).to(ACC)
        old = slope_square * old_square - slope_mean * old_mean * g
        slope = (slope_eps + divide(old, tl.where(noise, 1.0, root), ACC)) / (below * below)
        kappa = kappa_lr * tl.where(noise, 0.0, slope)
        tl.store(direction_ptr + offs, (kappa * v).to(direction_ptr.dtype.element_ty), mask=mask)
    return masked


@triton.jit
def adam_kernel(
    places_ptr,
    table_ptr,
    numbers_ptr,
    counts_ptr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    UPDATE: tl.constexpr,
    DIRECTION: tl.constexpr,
    PARAMETER: tl.constexpr,
    GRADIENT: tl.constexpr,
    ALONG: tl.constexpr,
    STATE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """theta' (UPDATE) and kappa v (DIRECTION) of a chunk of one tensor under Adam or AdamW.

    Grid [programs]; tiles [BLOCK], BLOCKS of them a program. Moves parameter, gradient and both
    moments once for both, and each result (and v) once.
    """
    row, row_ptr, size, start = place(places_ptr, table_ptr, WIDTH, BLOCK * BLOCKS)
    p_ptr = pointer(row_ptr, 0, PARAMETER, ALIGNED)
    g_ptr = pointer(row_ptr, 1, GRADIENT, ALIGNED)
    v_ptr = pointer(row_ptr, 2, ALONG, ALIGNED)
    updated_ptr = pointer(row_ptr, 3, PARAMETER, ALIGNED)
    direction_ptr = pointer(row_ptr, 4, PARAMETER, ALIGNED)
    mean_ptr = pointer(row_ptr, 5, STATE, ALIGNED)
    square_ptr = pointer(row_ptr, 6, STATE, ALIGNED)
    state_address = address(row_ptr, 5)
    lr = number(numbers_ptr, row, 0, WIDTH)
    sign = number(numbers_ptr, row, 2, WIDTH)
    kappa_lr = (sign * number(numbers_ptr, row, 1, WIDTH)).to(ACC)
    decay = number(numbers_ptr, row, 3, WIDTH).to(ACC)
    shrink = (1 - lr * number(numbers_ptr, row, 4, WIDTH)).to(ACC)
    beta1 = number(numbers_ptr, row, 5, WIDTH)
    beta2 = number(numbers_ptr, row, 6, WIDTH)
    eps = number(numbers_ptr, row, 7, WIDTH)
    correction1 = number(numbers_ptr, row, 8, WIDTH)
    correction2 = number(numbers_ptr, row, 9, WIDTH)
    # all that does not change in a tensor is multiplied in float64, rounded once
    mean, fresh_mean = beta1 / correction1, (1 - beta1) / correction1
    square, fresh_square = beta2 / correction2, (1 - beta2) / correction2
    step_mean, step_fresh = (lr * mean).to(ACC), (lr * fresh_mean).to(ACC)
    root_square, root_fresh = square.to(ACC), fresh_square.to(ACC)
    slope_eps, slope_square = (eps * fresh_mean).to(ACC), (fresh_mean * square).to(ACC)
    slope_mean = (mean * fresh_square).to(ACC)
    eps, sign = eps.to(ACC), sign.to(ACC)
    noise_floor = number(numbers_ptr, row, 10, WIDTH).to(ACC)
    masked = tl.full((), 0, tl.int32)
    for i in range(BLOCKS):
        first = start + i * BLOCK
        if first + BLOCK <= size:
            masked += adam_block(
                *(first, size, p_ptr, g_ptr, v_ptr, updated_ptr, direction_ptr, mean_ptr),
                *(square_ptr, state_address, kappa_lr, sign, decay, shrink, eps),
                *(step_mean, step_fresh, root_square, root_fresh),
                *(slope_eps, slope_square, slope_mean, noise_floor),
                *(True, UPDATE, DIRECTION, BLOCK, ACC),
            )
        elif first < size:
            masked += adam_block(
                *(first, size, p_ptr, g_ptr, v_ptr, updated_ptr, direction_ptr, mean_ptr),
                *(square_ptr, state_address, kappa_lr, sign, decay, shrink, eps),
                *(step_mean, step_fresh, root_square, root_fresh),
                *(slope_eps, slope_square, slope_mean, noise_floor),
                *(False, UPDATE, DIRECTION, BLOCK, ACC),
            )
    if DIRECTION:
        tl.store(counts_ptr + tl.program_id(0), masked)
