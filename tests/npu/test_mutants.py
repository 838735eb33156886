# SPDX-License-Identifier: Apache-2.0
"""Mutation tests of the NPU backend: the checks of test_meta.py must detect each broken call."""

import pytest

from tests.npu.meta_run import run_mutants
from tests.npu.schemas import BACKEND
from tests.npu.test_meta import CASES, check_case, run_meta
from tests.npu.wheels import VERSIONS

CACHED_LENS = "[total - new for total, new in zip(step.seq_lens_list, step.query_lens_list)]"
MUTANTS = [
    ("renorm=int(renormalize)", "renorm=0"),
    ("row_idx_type=0,", "row_idx_type=1,"),
    ("None, drop_pad_mode=2)", "None)"),
    ("group_list_type=0 if tokens_per_expert.shape[0] == 1 else 1,", ""),
    ("0 if tokens_per_expert.shape[0] == 1 else 1,", "1,"),
    ("active_expert_range=experts,", ""),
    ("None, drop_pad_mode=3)", "None, drop_pad_mode=2)"),
    ("rows.view(weights.shape[1], *weights.shape[:1], -1)", "rows.view(*weights.shape, -1)"),
    ("expert_tokens_num_flag=True,", ""),
    ("softmax_scale=query.shape[2] ** -0.5,", ""),
    ("atten_mask=mask,", "atten_mask=mask[:128, :128],"),
    ("num_key_value_heads=num_kv_heads,", ""),
    ("sparse_mode=3,", "sparse_mode=2,"),
    ("lengths, paged = step.seq_lens_list,", "lengths, paged = step.query_ends,"),
    ("lengths, paged = step.seq_lens_list,", f"lengths, paged = {CACHED_LENS},"),
    ("list(accumulate(step.query_lens_list))", "step.query_lens_list"),
    ("list(accumulate(step.query_lens_list))", "list(range(1, 1 + len(step.query_lens_list)))"),
    ("step.starts_fresh and not step.is_decode", "not step.is_decode"),
    ("step.block_table.contiguous()", "step.block_table"),
    ("value = value.contiguous()", "pass"),
    ("(part.to(dtype) for part in cos_sin)", "cos_sin"),
    ("cos, sin = cos[:, None], sin[:, None]", "pass"),
    ("qkv_size=[1, num_tokens,", "qkv_size=[num_tokens, 1,"),
    ("head_nums=[num_heads, num_kv_heads, num_kv_heads],", "head_nums=[all_heads, num_kv_heads, num_kv_heads],"),
    ("        epsilon=eps,\n        cache_mode", "        cache_mode"),
    ("else cache.flatten(2)\n", "else cache\n"),
    ("cache.unflatten(1, (-1, HEAD_DIM // TILE)) if tiled", "cache if tiled"),
    (', cache_mode="Norm")', ")"),
    (
        "self.combine(rows, row_index, cast(topk_weights, rows.dtype))",
        "self.combine(rows, row_index, topk_weights.float())",
    ),
    ("topk_ids.int(),\n", "topk_ids.long(),\n"),
    ("(residual, hidden_states, norm_weight, eps)", "(residual, hidden_states, norm_weight)"),
    ("npu_moe_re_routing(rows, tokens_per_rank)", "npu_moe_re_routing(rows, tokens_per_rank.int())"),
    ("expert_scales=weights if self.algorithm.takes_scales else None,", ""),
    ("expert_scales=weights if self.algorithm.takes_scales else None,", "expert_scales=weights,"),
    ("expand_scales=sent.expand_scales if self.algorithm.takes_scales else None,", ""),
    ("shared_expert_num=self.algorithm.shared_expert_num,", ""),
    ("            sent.expert_weights,", "            sent.expert_weights.bfloat16(),"),
    ("topk_ids.int(), topk_weights.float()", "topk_ids.long(), topk_weights.float()"),
    ("topk_ids.int(), topk_weights.float()", "topk_ids.int(), topk_weights"),
    ("x_active_mask=is_token,", ""),
    ("x_active_mask=sent.is_token,", ""),
    ("tp_world_size=self.algorithm.tp_world_size,\n            shared_expert_num", "shared_expert_num"),
    ("quant_mode=0,", "quant_mode=0, global_bs=hidden_states.shape[0] * self.sizes.ranks,"),
    ("if missing:\n            padding", "if False:\n            padding"),
    ("expert_token_nums_type=1,", "expert_token_nums_type=0,"),
    ("comm_alg=self.algorithm.name,", ""),
    ("comm_alg=self.algorithm.combine_name,", "comm_alg=self.algorithm.name,"),
    ("quant_mode=0,", "quant_mode=2,"),
    ("if num_tokens == 0:", "if False:"),
]


@pytest.fixture(scope="module")
def mutants(tmp_path_factory) -> list[dict]:
    sources = {file.stem: file.read_text(encoding="utf-8") for file in BACKEND.glob("*.py")}
    mutated = [sources]
    for old, new in MUTANTS:
        [changed] = [name for name, source in sources.items() if old in source]
        mutated.append(sources | {changed: sources[changed].replace(old, new, 1)})
    return run_meta(VERSIONS[0], run_mutants, tmp_path_factory.mktemp("mutants"), mutated)


@pytest.mark.parametrize("index", range(len(MUTANTS)), ids=[old for old, _ in MUTANTS])
def test_a_broken_call_is_detected(mutants, index):
    original, mutant = mutants[0], mutants[1 + index]
    cases = [case for case in CASES if case in original]
    for case in cases:
        check_case(original, case)
    detected = 0
    for case in cases:
        try:
            check_case(mutant, case)
        except (AssertionError, KeyError):
            detected += 1
    assert detected
