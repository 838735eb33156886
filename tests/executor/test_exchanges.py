# SPDX-License-Identifier: Apache-2.0
"""Sizes of a fused dispatch."""

from executor.config import settings_from_dict
from executor.loading.before_loading import load_config
from executor.loading.exchanges import dispatch_sizes
from ops.ascend import ExchangeSizes
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
