# SPDX-License-Identifier: Apache-2.0
"""Tests that the ranks' shards cover every tensor of the checkpoint, and that impossible layouts are refused."""

import time

import pytest
import torch
from safetensors.torch import load_file

from executor.config import CONFIG_FOLDER, load_settings
from executor.loading.before_loading import check_before_launch
from executor.loading.loader import load_parameters
from executor.loading.stored_model import check_tensors
from models.quantization.scheme import Scheme
from models.qwen3_moe.sharding import Layout, check_layout
from models.qwen3_moe.weights import parameter_specs
from ops.comm import group_members
from tests.checkpoints import make_checkpoint, make_model

CONFIG = {
    "vocab_size": 208,
    "num_attention_heads": 8,
    "num_experts": 16,
    "mlp_only_layers": [1],
    "attention_bias": True,
}


def layouts(world_size: int, **sizes: int) -> list[Layout]:
    """Lists the layouts of all ranks."""
    members = group_members(world_size, **sizes)
    return [
        Layout(
            **{
                name: next((ranks.index(rank), len(ranks)) for ranks in members[name] if rank in ranks)
                for name in ("attn_tp", "moe_tp", "moe_ep", "embed_tp", "lmhead_tp")
            }
        )
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        {"attn_tp": 1, "moe_tp": 1, "embed_tp": 1, "lmhead_tp": 1},
        {"attn_tp": 8, "moe_tp": 8, "embed_tp": 8, "lmhead_tp": 8},
        {"attn_tp": 4, "moe_tp": 2, "embed_tp": 2, "lmhead_tp": 4},
        {"attn_tp": 2, "moe_tp": 1, "embed_tp": 8, "lmhead_tp": 2},
    ],
)
def test_parts_glued_together_are_the_checkpoint(sizes, stacked, tmp_path):
    model = make_checkpoint(tmp_path, stacked=stacked, **CONFIG)
    stored = load_file(tmp_path / "model.safetensors")
    full = {}
    checked = check_tensors(tmp_path, parameter_specs(model.config, Layout()), Scheme())
    for layout in layouts(8, **sizes):
        specs = parameter_specs(model.config, layout)
        loaded = load_parameters(checked, specs, torch.float32, torch.device("cpu"))
        for spec in specs:
            value = loaded[spec.name]
            tensor = value if isinstance(value, torch.Tensor) else value.data
            assert tensor.shape == spec.shape
            for source in stacked and spec.stacked or spec.sources:
                glued = full.setdefault(source.name, torch.full(source.shape, torch.nan))
                glued[source.part] = tensor[source.region]
    assert full.keys() == stored.keys()
    for name, glued in full.items():
        assert torch.equal(glued, stored[name]), name


def test_ranks_share_kv_heads_where_there_are_fewer():
    config = make_model(num_attention_heads=8, num_key_value_heads=2).config
    shape = (2 * config.head_dim, config.hidden_size)
    parts = [
        layout.part("model.layers.0.self_attn.k_proj.weight", shape, config)
        for layout in layouts(8, attn_tp=8, moe_tp=1, embed_tp=1, lmhead_tp=1)
    ]
    assert parts == [(slice(0, 16),)] * 4 + [(slice(16, 32),)] * 4


@pytest.mark.parametrize(
    ("changed", "key", "possible"),
    [
        ({"attn_tp_size": 3}, "attn_tp_size", "1, 2, 4, 8"),
        ({"attn_tp_size": 16}, "attn_tp_size", "1, 2, 4, 8"),
        ({"moe_tp_size": 16}, "moe_tp_size", "1, 2, 4, 8"),
        ({"embed_tp_size": 5}, "embed_tp_size", "1, 2, 4, 8, 16"),
        ({"lmhead_tp_size": 32}, "lmhead_tp_size", "1, 2, 4, 8, 16"),
        ({"attn_dp_size": 4}, "attn_dp_size", "= 16"),
        ({"moe_ep_size": 2}, "moe_ep_size", "= 16"),
    ],
)
def test_impossible_layouts_name_the_possible_sizes(changed, key, possible):
    config = make_model(**CONFIG, moe_intermediate_size=40).config
    sizes = {"attn_tp_size": 1, "moe_tp_size": 1, "embed_tp_size": 1, "lmhead_tp_size": 1}
    check_layout(config, 16, sizes)
    with pytest.raises(ValueError, match=rf"parallel_config\.{key}: .*{possible}$"):
        check_layout(config, 16, sizes | changed)


@pytest.mark.parametrize("world_size", [0, -1, 10**12, 10**30])
def test_world_sizes_that_no_job_has_are_refused_at_once(world_size):
    sizes = {"attn_tp_size": 1, "moe_tp_size": 1, "embed_tp_size": 1, "lmhead_tp_size": 1}
    start_s = time.perf_counter()
    with pytest.raises(ValueError, match=f"^world_size: {world_size} is impossible, must be from 1 to"):
        check_layout(make_model().config, world_size, sizes)
    assert time.perf_counter() - start_s < 1


@pytest.mark.parametrize("yaml_file", sorted(CONFIG_FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_layouts_of_the_yaml_files_are_possible(yaml_file):
    check_before_launch(load_settings(yaml_file))
