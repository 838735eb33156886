# SPDX-License-Identifier: Apache-2.0
"""Calls of the NPU backend broken one at a time: the checks of test_meta.py must notice each."""

import json

import pytest

from tests.npu.schemas import BACKEND
from tests.npu.test_meta import CASES, check_case, meta_run
from tests.npu.wheels import VERSIONS

MUTANTS = [
    ("renorm=int(renormalize)", "renorm=0"),
    ("row_idx_type=0,", "row_idx_type=1,"),
    ("None, drop_pad_mode=2)", "None)"),
    ("group_list_type=0 if counts.shape[0] == 1 else 1,", ""),
    ("0 if counts.shape[0] == 1 else 1,", "1,"),
    ("active_expert_range=[0, num_groups],", ""),
    ("expert_tokens_num_flag=True,", ""),
    ("softmax_scale=query.shape[2] ** -0.5,", ""),
    ("atten_mask=mask,", "atten_mask=mask[:128, :128],"),
    ("num_key_value_heads=num_kv_heads,", ""),
    ("sparse_mode=3,", "sparse_mode=2,"),
    ("lengths, paged = step.seq_lens_list,", "lengths, paged = step.query_ends,"),
    ("list(accumulate(step.query_lens_list))", "step.query_lens_list"),
    ("step.block_table.int()", "step.block_table"),
    ("value = value.contiguous()", "pass"),
    ("(part.to(dtype)[:, None] for part in cos_sin)", "(part[:, None] for part in cos_sin)"),
    (', cache_mode="Norm")', ")"),
    ("routing.topk_weights.to(output.dtype)", "routing.topk_weights.float()"),
    ("routing.topk_ids.int(),", "routing.topk_ids.long(),"),
    ("(residual, hidden_states, norm_weight, eps)", "(residual, hidden_states, norm_weight)"),
    ("if step.num_tokens == 0:", "if False:"),
]


@pytest.fixture(scope="module")
def mutants(tmp_path_factory) -> list[dict]:
    sources = {file.stem: file.read_text(encoding="utf-8") for file in BACKEND.glob("*.py")}
    mutated = [sources]
    for old, new in MUTANTS:
        [changed] = [name for name, source in sources.items() if old in source]
        mutated.append(sources | {changed: sources[changed].replace(old, new, 1)})
    file = tmp_path_factory.mktemp("mutants") / "sources.json"
    file.write_text(json.dumps(mutated), encoding="utf-8")
    return meta_run(VERSIONS[0], file)


@pytest.mark.parametrize("index", range(len(MUTANTS)), ids=[old for old, _ in MUTANTS])
def test_a_broken_call_is_noticed(mutants, index):
    original, mutant = mutants[0], mutants[1 + index]
    cases = [case for case in CASES if case in original]
    for case in cases:
        check_case(original, case)
    noticed = 0
    for case in cases:
        try:
            check_case(mutant, case)
        except (AssertionError, KeyError):
            noticed += 1
    assert noticed
