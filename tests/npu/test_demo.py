# SPDX-License-Identifier: Apache-2.0
"""The real NPU backend generates the demo's tokens on emulated operations: one rank, heads and experts split."""

import pytest
import torch

from tests.npu.emulated import run_demo, run_demo_emulated
from tests.npu.wheels import VERSIONS, wheel
from tests.parallel.ranks import run_ranks

LAYOUTS = {
    "one": (1, {}),
    "tp": (2, {"attn_tp_size": 2, "moe_tp_size": 2, "embed_tp_size": 2, "lmhead_tp_size": 2}),
    "ep": (2, {"attn_tp_size": 2, "moe_tp_size": 1}),
    "dp_ep": (2, {"attn_tp_size": 1, "moe_tp_size": 1}),
}


@pytest.fixture(scope="module")
def reference():
    return {dtype: run_demo(dtype=dtype) for dtype in ("float32", "bfloat16", "float16")}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("version", VERSIONS)
def test_tokens_equal_the_reference(version, layout, reference, tmp_path):
    path = wheel(version)
    if path is None:
        pytest.skip(f"torch_npu {version} is neither in the cache folder nor to be had from a package index")
    world_size, sizes = LAYOUTS[layout]
    settings = {"dtype": "float16", "world_size": world_size, **sizes}
    exact, rounded = reference["float32"], reference["float16"]
    assert exact["margin"] > 0.05, "a tie that rounding may turn is no test"
    for found in run_ranks(world_size, run_demo_emulated, tmp_path, str(path), settings):
        error = (found["logits"] - exact["logits"]).norm()
        assert error <= 1.5 * (rounded["logits"] - exact["logits"]).norm()
        assert found["tokens"] == exact["tokens"]
        assert found["called"]["npu_moe_init_routing_v2"] == found["called"]["npu_swiglu"] > 0  # experts, each layer


def test_bfloat16(reference, tmp_path):
    path = wheel(VERSIONS[0])
    if path is None:
        pytest.skip(f"torch_npu {VERSIONS[0]} is neither in the cache folder nor to be had from a package index")
    [found] = run_ranks(1, run_demo_emulated, tmp_path, str(path), {"dtype": "bfloat16"})
    exact, rounded = reference["float32"]["logits"], reference["bfloat16"]["logits"]
    # the residual is in bfloat16, as the vendor's add_rms_norm wants it; the reference's is in float32
    assert (found["logits"] - exact).norm() <= 3 * (rounded - exact).norm()
    assert torch.isfinite(found["logits"]).all()
