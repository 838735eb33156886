# SPDX-License-Identifier: Apache-2.0
"""What the checks of quantised operations share: random operands and formulas in float64."""

import numpy as np
import torch

BF16, INT8 = torch.bfloat16, torch.int8
EXPERTS = 6
COUNTS = [3, 0, 5, 1, 0, 0]


def npu(name, *args, **kwargs):
    return getattr(torch.ops.npu, name)(*args, **kwargs)


def bf16(*shape):
    return torch.randn(*shape).to(BF16)


def int8(*shape):
    return torch.randint(-127, 128, shape, dtype=INT8)


def close(have, want, tolerance=1e-2):
    want = torch.as_tensor(want).double()
    torch.testing.assert_close(have.double(), want, rtol=tolerance, atol=tolerance * want.abs().max().item())


def rows_of(counts):
    return np.repeat(np.arange(len(counts)), counts)


def quantised(values, scales, exact):
    """Asserts int8 rows and fp32 scales of the exact rows: largest |x| / 127, to the nearest integer."""
    exact = np.asarray(exact, dtype=np.float64)
    assert values.dtype == INT8 and scales.dtype == torch.float32
    assert values.shape == exact.shape and scales.shape == exact.shape[:-1]
    want = np.abs(exact).max(-1) / 127
    np.testing.assert_allclose(scales.numpy(), want, rtol=1e-4)
    live = want > 0
    assert not values[torch.from_numpy(~live)].any()
    ratio = exact[live] / want[live][..., None]
    # fp32 may round a tie the other way
    assert np.abs(values.numpy()[live] - ratio).max(initial=0) <= 0.5 + 0.02


def nz(weight):
    torch.npu.config.allow_internal_format = True
    try:
        return npu("npu_format_cast", weight, 29)
    finally:
        torch.npu.config.allow_internal_format = False


def packed(values):
    """[..., N] in [-8, 7] to int32 [..., N / 8], byte by byte: the first column in the low nibble."""
    nibbles = (values.numpy() & 15).astype(np.uint8)
    data = (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).view("<i4")
    return torch.from_numpy(np.ascontiguousarray(data))


def swiglu(wide):
    gate, up = np.split(wide, 2, -1)
    return gate / (1 + np.exp(-gate)) * up
