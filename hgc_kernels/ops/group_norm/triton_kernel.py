"""Moments of chunks of pixels first, then the norm. Both walk tiles of pixels by channels of whole
groups; a group has any number of channels, so sums go from channels to groups and back through a
table of which channel is of which group.

Variances are of distances to the mean: of a chunk by distances to the mean of its first tile, and
chunks and channels are joined as Chan, Golub and LeVeque do (Algorithms for computing the sample
variance, 1983). So a large mean costs no digits.
"""

import triton
import triton.language as tl


@triton.jit
def _members(GROUPS_A_TILE: tl.constexpr, GROUP: tl.constexpr, BLOCK_C: tl.constexpr):
    """Whether a channel of a tile is of a group of it, [BLOCK_C, GROUPS_A_TILE]."""
    c = tl.arange(0, BLOCK_C)
    g = tl.arange(0, GROUPS_A_TILE)
    return (c // GROUP)[:, None] == g[None, :]


@triton.jit
def _to_groups(member, of_channel):
    return tl.sum(tl.where(member, of_channel[:, None], 0.0), 0)


@triton.jit
def _to_channels(member, of_group):
    return tl.sum(tl.where(member, of_group[None, :], 0.0), 1)


@triton.jit
def _load(x_ptr, offsets, mask, shift, HAS_SHIFT: tl.constexpr):
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    if HAS_SHIFT:
        x = (x.to(tl.float32) + shift.to(tl.float32)).to(x_ptr.dtype.element_ty)
    return x.to(tl.float32)


@triton.jit
def group_moments_kernel(
    x_ptr,  # [B, C, H * W]
    shift_ptr,  # [B, C]
    moments_ptr,  # [B, G, chunks, 2] in fp32: the mean of a chunk, the squared distances to it
    pixels,
    channels,
    chunk_pixels,  # a multiple of BLOCK_P
    stride_xb,
    stride_xc,
    stride_xp,
    stride_sb,
    GROUP: tl.constexpr,  # channels of a group
    GROUPS_A_TILE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    if CHANNELS_LAST:
        stride_xc = 1
    else:
        stride_xp = 1
    chunk = tl.program_id(0)
    tile = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    first = tile * (GROUPS_A_TILE * GROUP)
    in_c = (c < GROUPS_A_TILE * GROUP) & (c < channels - first)
    begin = chunk * chunk_pixels
    count = tl.minimum(chunk_pixels, pixels - begin)

    x_ptr += b * stride_xb + first.to(tl.int64) * stride_xc + begin.to(tl.int64) * stride_xp
    shift = 0.0
    if HAS_SHIFT:
        shift = tl.load(shift_ptr + b * stride_sb + first + c, mask=in_c, other=0.0)[None, :]
    offsets = p[:, None] * stride_xp + c[None, :] * stride_xc
    x = _load(x_ptr, offsets, (p < count)[:, None] & in_c[None, :], shift, HAS_SHIFT)
    x = tl.where((p < count)[:, None], x, 0.0)  # a shift would count where there is no pixel
    origin = tl.sum(x, 0) / tl.minimum(count, BLOCK_P)
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, count, BLOCK_P):
        mask = (start + p < count)[:, None] & in_c[None, :]
        x = _load(x_ptr, offsets, mask, shift, HAS_SHIFT)
        distance = tl.where(mask, x - origin[None, :], 0.0)
        sums += distance
        squares += distance * distance
        x_ptr += tl.full((), BLOCK_P, tl.int64) * stride_xp

    size = count.to(tl.float32)
    total = tl.sum(sums, 0)
    mean = origin + total / size
    square = tl.sum(squares, 0) - total * total / size
    member = _members(GROUPS_A_TILE, GROUP, BLOCK_C)
    group_mean = _to_groups(member, mean) / GROUP
    apart = mean - _to_channels(member, group_mean)
    group_square = _to_groups(member, square + size * apart * apart)

    g = tl.arange(0, GROUPS_A_TILE)
    groups = channels // GROUP
    row = b * groups + tile * GROUPS_A_TILE + g
    in_g = g < groups - tile * GROUPS_A_TILE
    place = moments_ptr + (row * tl.num_programs(0) + chunk) * 2
    tl.store(place, group_mean, mask=in_g)
    tl.store(place + 1, group_square, mask=in_g)


@triton.jit
def group_norm_kernel(
    x_ptr,  # [B, C, H * W]
    shift_ptr,  # [B, C]
    moments_ptr,  # [B, G, chunks, 2], of group_moments_kernel
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    out_ptr,  # [B, C, H * W], dense in x's order
    eps,
    pixels,
    channels,
    chunk_pixels,
    chunks,
    stride_xb,
    stride_xc,
    stride_xp,
    stride_sb,
    GROUP: tl.constexpr,
    GROUPS_A_TILE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,  # of chunks, all of them
    HAS_SHIFT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SILU: tl.constexpr,
):
    # of an image without gaps
    stride_oc = pixels
    stride_op = 1
    if CHANNELS_LAST:
        stride_xc = 1
        stride_oc = 1
        stride_op = channels
    else:
        stride_xp = 1
    begin = tl.program_id(0) * BLOCK_P
    tile = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    g = tl.arange(0, GROUPS_A_TILE)
    k = tl.arange(0, BLOCK_K)
    first = tile * (GROUPS_A_TILE * GROUP)
    in_c = (c < GROUPS_A_TILE * GROUP) & (c < channels - first)

    groups = channels // GROUP
    row = b * groups + tile * GROUPS_A_TILE + g
    in_g = g < groups - tile * GROUPS_A_TILE
    found = in_g[:, None] & (k < chunks)[None, :]
    places = moments_ptr + (row[:, None] * chunks + k[None, :]) * 2
    means = tl.load(places, mask=found, other=0.0)
    squares = tl.load(places + 1, mask=found, other=0.0)
    sizes = tl.minimum(chunk_pixels, pixels - k * chunk_pixels).to(tl.float32)
    sizes = tl.where(k < chunks, sizes, 0.0)[None, :]
    mean = tl.sum(means * sizes, 1) / pixels
    apart = means - mean[:, None]
    square = tl.sum(squares, 1) + tl.sum(sizes * apart * apart, 1) * GROUP
    rstd = 1.0 / tl.sqrt(square / (pixels * 1.0 * GROUP) + eps)

    member = _members(GROUPS_A_TILE, GROUP, BLOCK_C)
    weight = tl.load(weight_ptr + first + c, mask=in_c, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + first + c, mask=in_c, other=0.0).to(tl.float32)
    scale = _to_channels(member, rstd) * weight
    center = _to_channels(member, mean)

    x_ptr += b * stride_xb + first.to(tl.int64) * stride_xc + begin.to(tl.int64) * stride_xp
    out_ptr += b * channels * pixels + first.to(tl.int64) * stride_oc
    out_ptr += begin.to(tl.int64) * stride_op
    shift = 0.0
    if HAS_SHIFT:
        shift = tl.load(shift_ptr + b * stride_sb + first + c, mask=in_c, other=0.0)[None, :]
    mask = (p < pixels - begin)[:, None] & in_c[None, :]
    offsets = p[:, None] * stride_xp + c[None, :] * stride_xc
    x = _load(x_ptr, offsets, mask, shift, HAS_SHIFT)
    y = (x - center[None, :]) * scale[None, :] + bias[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    offsets = p[:, None] * stride_op + c[None, :] * stride_oc
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)
