# SPDX-License-Identifier: Apache-2.0
"""Fused dispatch: which experts' weights ranks read in the shipped layouts, and what ranks select at start."""

import pytest
import torch

from executor.config import load_settings
from tests.npu.dispatch_runs import CONFIGS, Case, dispatch_all, many_ranks, refuses_masks, swaps_tokens, two_ranks
from tests.npu.test_demo import needed_wheel
from tests.npu.wheels import VERSIONS
from tests.parallel.ranks import run_ranks

DISPATCH, COMBINE = "npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2"


def shipped_layouts() -> dict[str, int]:
    """The YAMLs whose decode steps may use fused dispatch, with their attention DP groups."""
    layouts = {}
    for file in sorted(CONFIGS.glob("*.yaml")):
        settings = load_settings(str(file), [])
        groups = settings.world_size // settings.parallel_config.attn_tp_size
        if groups > 1 and settings.parallel_config.moe_tp_size == 1:
            layouts[file.name] = groups
    return layouts


def spread(sequences: int, groups: int) -> list[int]:
    return [sequences // groups + (group < sequences % groups) for group in range(groups)]


LAYOUTS = shipped_layouts()
CASES = [
    Case(yaml, "A2" if yaml.startswith("demo") else "A3", tokens, padded)
    for yaml, groups in LAYOUTS.items()
    for tokens in (spread(1, groups), spread(4, groups), spread(groups + 1, groups), [0] * (groups - 1) + [5])
    for padded in (False, True)
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    [found] = run_ranks(1, dispatch_all, tmp_path_factory.mktemp("dispatch"), str(needed_wheel(VERSIONS[0])), CASES)
    return found


def test_there_are_layouts():
    assert {"qwen3_235b_4tp_4dp_16ep.yaml", "qwen3_30b_4tp_2dp_8ep.yaml", "demo_2dp_2ep.yaml"} < set(LAYOUTS)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{c.yaml}-{c.tokens}-{c.padded}" for c in CASES])
def test_ranks_read_only_the_experts_of_tokens(found, index):
    """Neither idle ranks nor padding rows add an expert, and all ranks send equally many rows."""
    calls, wanted, sizes = found[index]
    tokens = [experts for group in wanted for experts in group]
    assert len(calls) == sizes.ranks and len({len(call.mask) for call in calls}) == 1
    read = {expert for call in calls for expert in call.ids[call.mask].flatten().tolist()}
    assert read == {expert for experts in tokens for expert in experts}
    assert sorted(row for call in calls for row in call.ids[call.mask].tolist()) == sorted(tokens)  # each token once
    for ids, mask in calls:
        assert bool(mask[: int(mask.sum())].all()), "tokens come first"
        assert ids.dtype == torch.int32 and len(ids) == len(mask) >= 1
        assert all(len(set(row)) == sizes.top_k for row in ids.tolist()), "an expert twice"


def select(replaced, tmp_path):
    return run_ranks(2, two_ranks, tmp_path, str(needed_wheel(VERSIONS[0])), replaced)


def test_the_start_up_call_sends_unequally_many_tokens(tmp_path):
    found = select({}, tmp_path)
    assert [rank["name"] for rank in found] == ["dispatch and combine (fullmesh_v2)"] * 2
    assert [rank["calls"] for rank in found] == [[("fullmesh_v2", 3, 3)], [("fullmesh_v2", 3, 2)]]


def test_fullmesh_v1_where_fullmesh_v2_refuses_masks(tmp_path):
    found = select({DISPATCH: refuses_masks}, tmp_path)
    assert [rank["name"] for rank in found] == ["dispatch and combine (fullmesh_v1)"] * 2
    assert [[name for name, *_ in rank["calls"]] for rank in found] == [["fullmesh_v2", "fullmesh_v1"]] * 2


def test_gather_where_tokens_come_back_changed(tmp_path):
    assert [rank["name"] for rank in select({COMBINE: swaps_tokens}, tmp_path)] == ["GatherExchange"] * 2


def test_every_algorithm_on_16_ranks(tmp_path):
    """hierarchy takes no fewer."""
    [found] = run_ranks(1, many_ranks, tmp_path, str(needed_wheel(VERSIONS[0])), 16)
    assert list(found) == ["A2 fullmesh", "A3 fullmesh_v2", "A3 fullmesh_v1", "A3 hierarchy"]
    assert all(works == [True] * 16 for works in found.values())
