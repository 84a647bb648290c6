"""The element maths of theta' and kappa v under SGD and Adam, for rows of a pointer table.

A row belongs to one parameter p. Its tensors are p, its gradient, v, theta', kappa v and the
optimizer's state; its scalars are listed below. In both optimizers

    g = sign gradient + decay p

with sign -1 under `maximize`, and decay the weight decay that is added to the gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mts_fast.backends.triton.kernels.arithmetic import divide
from mts_fast.backends.triton.kernels.pointer_table import (
    block,
    load_pointer,
    load_raw_pointer,
    load_scalar,
    locate,
    where_present,
)

# columns of a row's tensors
P_COLUMN = tl.constexpr(0)
G_COLUMN = tl.constexpr(1)
V_COLUMN = tl.constexpr(2)
UPDATED_COLUMN = tl.constexpr(3)
DIRECTION_COLUMN = tl.constexpr(4)
STATE_COLUMN = tl.constexpr(5)  # SGD: momentum buffer; Adam: first moment
SECOND_STATE_COLUMN = tl.constexpr(6)  # Adam: second moment
# columns of a row's scalars, of both optimizers
LR = tl.constexpr(0)
KAPPA_LR = tl.constexpr(1)
SIGN = tl.constexpr(2)
DECAY = tl.constexpr(3)
# of SGD
GRADIENT_SHARE = tl.constexpr(4)
BUFFER_SHARE = tl.constexpr(5)
# of Adam
DECOUPLED_DECAY = tl.constexpr(4)
BETA1 = tl.constexpr(5)
BETA2 = tl.constexpr(6)
EPS = tl.constexpr(7)
CORRECTION1 = tl.constexpr(8)
CORRECTION2 = tl.constexpr(9)
NOISE_FLOOR = tl.constexpr(10)


@triton.jit
def effective_gradient(g, p, sign, decay):
    """sign g + decay p; without decay exactly sign g, even where the parameter is infinite."""
    return sign * g + tl.where(decay != 0, decay * p, 0.0)


@triton.jit
def exact_sqrt(x):
    """sqrt(x) rounded to nearest, also for subnormal x, which the approximate sqrt flushes to 0."""
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
    raw_buffer_ptr,
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
    """One block of theta' and kappa v under SGD.

    buffer' = momentum buffer + (1 - dampening) g       (g alone at the first step)
    theta'  = p - lr buffer'                            (with nesterov g + momentum buffer')
            = p - lr (gradient_share g + buffer_share buffer)
    kappa   = sign kappa_lr gradient_share
    """
    offs, mask = block(first, size, WHOLE, BLOCK)
    if UPDATE:
        p = tl.load(p_ptr + offs, mask=mask, other=0.0).to(ACC)
        g = tl.load(g_ptr + offs, mask=mask, other=0.0).to(ACC)
        has_buffer = where_present(mask, raw_buffer_ptr)
        buffer = tl.load(buffer_ptr + offs, mask=has_buffer, other=0.0).to(ACC)
        # theta'
        step = gradient_share * effective_gradient(g, p, sign, decay) + buffer_share * buffer
        tl.store(updated_ptr + offs, (p - lr * step).to(updated_ptr.dtype.element_ty), mask=mask)
    if DIRECTION:
        v = tl.load(v_ptr + offs, mask=mask, other=0.0).to(ACC)
        tl.store(direction_ptr + offs, (kappa * v).to(direction_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sgd_kernel(
    program_map_ptr,
    table_ptr,
    scalars_ptr,
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

    Grid [programs]; tiles [BLOCK], BLOCKS of them a program. UPDATE reads parameter, gradient and
    momentum buffer and writes theta', DIRECTION reads v and writes kappa v, each once.
    """
    # 1. locate this program's chunk, load the pointers and scalars of its row
    row, row_ptr, size, start = locate(program_map_ptr, table_ptr, WIDTH, BLOCK * BLOCKS)
    p_ptr = load_pointer(row_ptr, P_COLUMN, PARAMETER, ALIGNED)
    g_ptr = load_pointer(row_ptr, G_COLUMN, GRADIENT, ALIGNED)
    v_ptr = load_pointer(row_ptr, V_COLUMN, ALONG, ALIGNED)
    updated_ptr = load_pointer(row_ptr, UPDATED_COLUMN, PARAMETER, ALIGNED)
    direction_ptr = load_pointer(row_ptr, DIRECTION_COLUMN, PARAMETER, ALIGNED)
    buffer_ptr = load_pointer(row_ptr, STATE_COLUMN, STATE, ALIGNED)
    raw_buffer_ptr = load_raw_pointer(row_ptr, STATE_COLUMN)
    sign = load_scalar(scalars_ptr, row, SIGN, WIDTH)
    gradient_share = load_scalar(scalars_ptr, row, GRADIENT_SHARE, WIDTH)
    lr = load_scalar(scalars_ptr, row, LR, WIDTH).to(ACC)
    kappa = (load_scalar(scalars_ptr, row, KAPPA_LR, WIDTH) * sign * gradient_share).to(ACC)
    decay = load_scalar(scalars_ptr, row, DECAY, WIDTH).to(ACC)
    buffer_share = load_scalar(scalars_ptr, row, BUFFER_SHARE, WIDTH).to(ACC)
    sign, gradient_share = sign.to(ACC), gradient_share.to(ACC)
    # 2. update block by block; the last block of a tensor is masked
    for i in range(BLOCKS):
        first = start + i * BLOCK
        if first + BLOCK <= size:
            sgd_block(
                *(first, size, p_ptr, g_ptr, v_ptr, updated_ptr, direction_ptr),
                *(buffer_ptr, raw_buffer_ptr, lr, kappa, sign, decay, gradient_share, buffer_share),
                *(True, UPDATE, DIRECTION, BLOCK, ACC),
            )
        elif first < size:
            sgd_block(
                *(first, size, p_ptr, g_ptr, v_ptr, updated_ptr, direction_ptr),
                *(buffer_ptr, raw_buffer_ptr, lr, kappa, sign, decay, gradient_share, buffer_share),
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
    raw_state_ptr,
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
    """One block of theta' and kappa v under Adam, from the old moments m0 and v0.

    Returns the number of entries whose kappa is masked as noise: r < noise_floor, or r = 0.

        m      = (beta1 m0 + (1 - beta1) g) / correction1   = mean m0 + fresh_mean g
        r^2    = (beta2 v0 + (1 - beta2) g^2) / correction2 = square v0 + fresh_square g^2
        theta' = shrink p - lr m / (r + eps)
        slope  = d/dg [m / (r + eps)]
               = (fresh_mean (r + eps) - m fresh_square g / r) / (r + eps)^2
               = (eps fresh_mean + (fresh_mean square v0 - mean fresh_square m0 g) / r)
                 / (r + eps)^2                              (the terms in g^2 cancel)
        kappa  = kappa_lr slope, 0 where masked             (kappa_lr has the sign of the gradient)

    step_mean = lr mean, step_fresh = lr fresh_mean, root_square = square, root_fresh =
    fresh_square, slope_eps = eps fresh_mean, slope_square = fresh_mean square, slope_mean = mean
    fresh_square.
    """
    # 1. load parameter, gradient and moments
    offs, mask = block(first, size, WHOLE, BLOCK)
    p = tl.load(p_ptr + offs, mask=mask, other=0.0).to(ACC)
    g = tl.load(g_ptr + offs, mask=mask, other=0.0).to(ACC)
    # before the first step there is no state: zeros
    has_state = where_present(mask, raw_state_ptr)
    old_mean = tl.load(mean_ptr + offs, mask=has_state, other=0.0).to(ACC)
    old_square = tl.load(square_ptr + offs, mask=has_state, other=0.0).to(ACC)
    # 2. the root r of the second moment, and where it is noise
    g = effective_gradient(g, p, sign, decay)
    root = exact_sqrt(root_square * old_square + root_fresh * g * g)
    below = root + eps
    masked = tl.full((), 0, tl.int32)
    if DIRECTION:
        noise = (root < noise_floor) | (root == 0)
        # counted before v is loaded, so that fewer registers are live; in float64 that makes ptxas
        # (triton 3.6, sm_80) aim at 128 registers and spill 8 bytes
        if tl.float64 != ACC:
            masked = tl.sum((noise & mask).to(tl.int32))
    # 3. theta'
    if UPDATE:
        updated = shrink * p - divide(step_mean * old_mean + step_fresh * g, below, ACC)
        tl.store(updated_ptr + offs, updated.to(updated_ptr.dtype.element_ty), mask=mask)
    # 4. kappa v
    if DIRECTION:
        v = tl.load(v_ptr + offs, mask=mask, other=0.0).to(ACC)
        old = slope_square * old_square - slope_mean * old_mean * g
        slope = (slope_eps + divide(old, tl.where(noise, 1.0, root), ACC)) / (below * below)
        kappa = kappa_lr * tl.where(noise, 0.0, slope)
        tl.store(direction_ptr + offs, (kappa * v).to(direction_ptr.dtype.element_ty), mask=mask)
        if tl.float64 == ACC:
            masked = tl.sum((noise & mask).to(tl.int32))
    return masked


@triton.jit
def adam_kernel(
    program_map_ptr,
    table_ptr,
    scalars_ptr,
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

    Grid [programs]; tiles [BLOCK], BLOCKS of them a program. Reads parameter, gradient and both
    moments once, for DIRECTION v as well, and writes each result once; 4 bytes a program for the
    count.
    """
    # 1. locate this program's chunk, load the pointers and scalars of its row
    row, row_ptr, size, start = locate(program_map_ptr, table_ptr, WIDTH, BLOCK * BLOCKS)
    p_ptr = load_pointer(row_ptr, P_COLUMN, PARAMETER, ALIGNED)
    g_ptr = load_pointer(row_ptr, G_COLUMN, GRADIENT, ALIGNED)
    v_ptr = load_pointer(row_ptr, V_COLUMN, ALONG, ALIGNED)
    updated_ptr = load_pointer(row_ptr, UPDATED_COLUMN, PARAMETER, ALIGNED)
    direction_ptr = load_pointer(row_ptr, DIRECTION_COLUMN, PARAMETER, ALIGNED)
    mean_ptr = load_pointer(row_ptr, STATE_COLUMN, STATE, ALIGNED)
    square_ptr = load_pointer(row_ptr, SECOND_STATE_COLUMN, STATE, ALIGNED)
    raw_state_ptr = load_raw_pointer(row_ptr, STATE_COLUMN)
    lr = load_scalar(scalars_ptr, row, LR, WIDTH)
    sign = load_scalar(scalars_ptr, row, SIGN, WIDTH)
    kappa_lr = (sign * load_scalar(scalars_ptr, row, KAPPA_LR, WIDTH)).to(ACC)
    decay = load_scalar(scalars_ptr, row, DECAY, WIDTH).to(ACC)
    shrink = (1 - lr * load_scalar(scalars_ptr, row, DECOUPLED_DECAY, WIDTH)).to(ACC)
    beta1 = load_scalar(scalars_ptr, row, BETA1, WIDTH)
    beta2 = load_scalar(scalars_ptr, row, BETA2, WIDTH)
    eps = load_scalar(scalars_ptr, row, EPS, WIDTH)
    correction1 = load_scalar(scalars_ptr, row, CORRECTION1, WIDTH)
    correction2 = load_scalar(scalars_ptr, row, CORRECTION2, WIDTH)
    # 2. products of scalars, in float64 and rounded once
    mean, fresh_mean = beta1 / correction1, (1 - beta1) / correction1
    square, fresh_square = beta2 / correction2, (1 - beta2) / correction2
    step_mean, step_fresh = (lr * mean).to(ACC), (lr * fresh_mean).to(ACC)
    root_square, root_fresh = square.to(ACC), fresh_square.to(ACC)
    slope_eps, slope_square = (eps * fresh_mean).to(ACC), (fresh_mean * square).to(ACC)
    slope_mean = (mean * fresh_square).to(ACC)
    eps, sign = eps.to(ACC), sign.to(ACC)
    noise_floor = load_scalar(scalars_ptr, row, NOISE_FLOOR, WIDTH).to(ACC)
    # 3. update block by block; the last block of a tensor is masked
    masked = tl.full((), 0, tl.int32)
    for i in range(BLOCKS):
        first = start + i * BLOCK
        if first + BLOCK <= size:
            masked += adam_block(
                *(first, size, p_ptr, g_ptr, v_ptr, updated_ptr, direction_ptr, mean_ptr),
                *(square_ptr, raw_state_ptr, kappa_lr, sign, decay, shrink, eps),
                *(step_mean, step_fresh, root_square, root_fresh),
                *(slope_eps, slope_square, slope_mean, noise_floor),
                *(True, UPDATE, DIRECTION, BLOCK, ACC),
            )
        elif first < size:
            masked += adam_block(
                *(first, size, p_ptr, g_ptr, v_ptr, updated_ptr, direction_ptr, mean_ptr),
                *(square_ptr, raw_state_ptr, kappa_lr, sign, decay, shrink, eps),
                *(step_mean, step_fresh, root_square, root_fresh),
                *(slope_eps, slope_square, slope_mean, noise_floor),
                *(False, UPDATE, DIRECTION, BLOCK, ACC),
            )
    # 4. store the number of masked entries
    if DIRECTION:
        tl.store(counts_ptr + tl.program_id(0), masked)
