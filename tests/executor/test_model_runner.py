# SPDX-License-Identifier: Apache-2.0
"""Inputs of a decode step: padding rows of captured steps do not affect the other rows; graph batch sizes."""

import pytest
import torch

from executor import LLM, SamplingParams
from executor.engine.graph_runner import graph_sizes
from executor.engine.kv_cache import BLOCK_SIZE, NULL_BLOCK
from executor.engine.model_runner import DecodeInputs
from tests.checkpoints import make_checkpoint


@torch.inference_mode()
def test_padding_rows_do_not_affect_other_rows(tmp_path):
    make_checkpoint(tmp_path)
    llm = LLM(tmp_path, device="cpu", dtype="float32", batch_size=3)
    [scheduler] = llm.engine.schedulers
    prompts = [torch.randint(0, 211, (length,)).tolist() for length in (130, 7, 128)]
    for sequence in llm.requests([("", prompt) for prompt in prompts], SamplingParams(max_new_tokens=5)):
        scheduler.add(sequence)
    sequences = scheduler.start_waiting()
    llm.runner.prefill([sequences])
    for sequence in sequences:
        sequence.token_ids.append(3)
    before = [keys.clone() for keys, _ in llm.kv_caches]
    expected = llm.runner.decode([sequences]).local.clone()
    after = [keys.clone() for keys, _ in llm.kv_caches]
    for (keys, _), old in zip(llm.kv_caches, before, strict=True):
        keys.copy_(old)

    inputs = DecodeInputs(5, 4, [5], llm.device)  # two rows and two cache blocks more than needed
    inputs.fill(sequences)
    logits = llm.runner.decode_step(inputs.token_ids, inputs.step).local
    torch.testing.assert_close(logits[:3], expected, atol=1e-5, rtol=0)
    for (keys, _), new in zip(llm.kv_caches, after, strict=True):
        torch.testing.assert_close(keys[NULL_BLOCK + 1 :], new[NULL_BLOCK + 1 :], atol=1e-5, rtol=0)
    assert inputs.step.slot_mapping[3:].tolist() == [NULL_BLOCK * BLOCK_SIZE, NULL_BLOCK * BLOCK_SIZE + 1]
    assert inputs.step.seq_lens.tolist() == [131, 8, 129, 131, 131]
    repeated = expected[:1].expand(5, -1)
    torch.testing.assert_close(logits[3:], repeated[3:], atol=1e-5, rtol=0)  # padding activates no additional experts

    inputs.fill(sequences[1:2])  # fewer rows: the previous ones are overwritten
    assert inputs.step.block_table.tolist() == [[*sequences[1].blocks[:1], 0, 0, 0]] * 5
    inputs.fill(sequences[:1], torch.tensor([3]))  # a token still on the device
    assert inputs.token_ids.tolist() == [3] * 5 and inputs.step.seq_lens_list == [132] * 5
    sequences[0].token_ids.pop()
    inputs.fill(sequences[:1], torch.tensor([3]))
    logits = llm.runner.decode_step(inputs.token_ids, inputs.step).local
    torch.testing.assert_close(logits, repeated, atol=1e-5, rtol=0)

    inputs.fill([])
    assert not inputs.step.block_table.any() and inputs.step.seq_lens_list == [1] * 5


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (9, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (40, [1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 40]),
    ],
)
def test_batch_sizes_with_a_graph(largest, sizes):
    assert graph_sizes(largest) == sizes
