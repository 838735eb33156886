# SPDX-License-Identifier: Apache-2.0
"""Sizes of a fused dispatch, and validation of NPU options."""

import pytest

from executor import LLM
from executor.config import settings_from_dict
from executor.loading.before_loading import load_config
from executor.loading.exchanges import check_npu_options, dispatch_sizes
from ops.ascend import ExchangeSizes
from ops.reference import ReferenceOps
from tests.checkpoints import make_checkpoint


def settings_of(world_size: int = 1, **sections):
    return settings_from_dict({"model_name": "m", "model_path": "p", "world_size": world_size, **sections}, "test")


def test_dispatch_sizes(tmp_path):
    make_checkpoint(tmp_path)
    config = load_config(tmp_path, None)
    data = {"batch_size": 9}
    found = dispatch_sizes(settings_of(8, data_config=data, parallel_config={"attn_tp_size": 2}), config)
    # at most three sequences per group, split over two ranks
    assert found == ExchangeSizes(ranks=8, tokens=2, experts=10, top_k=3, hidden_size=48)
    assert dispatch_sizes(settings_of(8, parallel_config={"attn_tp_size": 8}), config) is None
    assert dispatch_sizes(settings_of(8, parallel_config={"moe_tp_size": 2}), config) is None
    assert dispatch_sizes(settings_of(), config) is None


class SomeNpuOps(ReferenceOps):
    name = "npu"

    def refuses_linear_all_reduce(self, ranks):
        return None if ranks == 2 else "two ranks"


@pytest.mark.parametrize(
    ("sections", "plan", "named"),
    [
        ({"model_config": {"npu_prefetch": True}, "exe_mode": "graph"}, None, "exe_mode: eager"),
        ({"parallel_config": {"npu_mm_all_reduce_base": True}}, None, "two ranks"),
        (
            {"parallel_config": {"npu_mm_all_reduce_base": True, "attn_tp_size": 2, "sequence_parallel": True}},
            None,
            "sequence_parallel",
        ),
        ({"parallel_config": {"npu_mm_all_reduce_base": True, "attn_tp_size": 2}}, "a plan", "dispatch and combine"),
    ],
)
def test_unsupported_npu_options(sections, plan, named):
    with pytest.raises(ValueError, match=named):
        check_npu_options(settings_of(2, **sections), SomeNpuOps(), plan)


def test_supported_npu_options():
    sections = {"model_config": {"npu_prefetch": True}}
    sections["parallel_config"] = {"npu_mm_all_reduce_base": True, "attn_tp_size": 2}
    check_npu_options(settings_of(2, **sections), SomeNpuOps(), None)


@pytest.mark.parametrize(
    ("option", "section"), [("npu_prefetch", "model_config"), ("npu_mm_all_reduce_base", "parallel_config")]
)
def test_npu_options_on_another_device(option, section, tmp_path):
    make_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=rf"^{section}\.{option}: only possible on device npu; leave it out$"):
        LLM(tmp_path, device="cpu", **{option: True})
