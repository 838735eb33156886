# SPDX-License-Identifier: Apache-2.0
"""Inputs of steps: packed tensors, the block table on the device, rows of decode steps; graph batch sizes."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from executor import LLM, SamplingParams
from executor.engine.block_table import BlockTable
from executor.engine.decode_inputs import DecodeInputs, Unread
from executor.engine.graph_runner import GraphRunner, graph_sizes
from executor.engine.scheduler import Scheduled
from executor.engine.sequence import Sequence
from ops.comm import Group, ParallelContext
from ops.step import BLOCK_SIZE, NULL_BLOCK, Span, StepLayout, block_table_of, blocks_for, step_inputs
from tests.checkpoints import make_checkpoint

CPU = torch.device("cpu")


def random_spans(count: int) -> list[Span]:
    """Spans of any length at any place, in shuffled blocks."""
    blocks = random.sample(range(1, 1000), 5 * count)
    spans = []
    for row in range(count):
        end = random.randint(1, 5 * BLOCK_SIZE)
        num_new = random.choice([1, min(end, 3), end, random.randint(1, end)])
        spans.append(Span(end - num_new, num_new, blocks[5 * row : 5 * row + 5], random.randint(1, end)))
    return spans


# step_inputs


def test_tensors_of_a_mixed_step() -> None:
    """A decode token, a prompt across a block border, the rest of a prompt whose beginning is cached."""
    spans = [Span(128, 1, [4, 9], 100), Span(0, 130, [2, 7], 130), Span(126, 4, [3, 5, 8], 500)]
    ids = [[50], list(range(1000, 1130)), [7, 8, 9, 10]]
    token_ids, step = step_inputs(spans, ids, CPU)
    assert token_ids.tolist() == [50, *range(1000, 1130), 7, 8, 9, 10]
    assert step.positions.tolist() == [128, *range(130), 126, 127, 128, 129]
    first, prompt = [9 * 128], [*range(2 * 128, 3 * 128), 7 * 128, 7 * 128 + 1]
    assert step.slot_mapping.tolist() == [*first, *prompt, 3 * 128 + 126, 3 * 128 + 127, 5 * 128, 5 * 128 + 1]
    assert step.block_table.tolist() == [[4, 9], [2, 7], [3, 5]] and step.block_table.dtype == torch.int32
    assert step.query_starts.tolist() == [0, 1, 131, 135] and step.seq_lens.tolist() == [129, 130, 130]
    assert (step.query_lens_list, step.seq_lens_list) == ([1, 130, 4], [129, 130, 130])
    assert step.prompt_lens_list == [100, 130, 500] and step.dp_num_tokens == [135] and step.max_dp_tokens == 135
    assert (step.is_decode, step.starts_fresh, step.sequence_parallel, step.num_tokens) == (False, False, False, 135)
    for tensor in (token_ids, step.positions, step.slot_mapping, step.query_starts, step.seq_lens):
        assert tensor.dtype == torch.int64 and tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


def test_kinds_of_steps() -> None:
    decode, prompt, chunk = Span(5, 1, [1], 3), Span(0, 2, [2], 2), Span(5, 3, [3], 9)
    kinds = {}
    for name, spans in {"d": [decode], "p": [prompt], "pp": [prompt] * 2, "c": [chunk], "dp": [decode, prompt]}.items():
        _, step = step_inputs(spans, [[0] * span.num_new for span in spans], CPU)
        kinds[name] = step.is_decode, step.starts_fresh
    assert kinds["d"] == (True, False) and kinds["p"] == kinds["pp"] == (False, True)
    assert kinds["c"] == kinds["dp"] == (False, False)
    for one_of_a_prompt in (Span(5, 1, [1], 9), Span(0, 1, [1], 9)):
        assert not step_inputs([decode, one_of_a_prompt], [[1], [2]], CPU)[1].is_decode
    single = step_inputs([Span(0, 1, [1], 1)], [[3]], CPU)[1]
    assert (single.is_decode, single.starts_fresh) == (False, True)
    stated = step_inputs([decode], [[1]], CPU, is_decode=False, dp_num_tokens=[1, 7], sequence_parallel=True)[1]
    assert (stated.is_decode, stated.starts_fresh, stated.sequence_parallel) == (False, False, True)
    assert stated.dp_num_tokens == [1, 7] and stated.max_dp_tokens == 7


def test_a_step_without_tokens() -> None:
    token_ids, step = step_inputs([], [], CPU, dp_num_tokens=[0, 3], is_decode=False)
    assert token_ids.shape == step.positions.shape == step.slot_mapping.shape == step.seq_lens.shape == (0,)
    assert step.query_starts.tolist() == [0] and step.block_table.shape == (0, 0) and step.starts_fresh


def test_tokens_on_the_device_are_left_out() -> None:
    token_ids, step = step_inputs([Span(5, 2, [1], 3), Span(9, 1, [2], 3)], [[], [4]], CPU)
    assert token_ids.shape == (3,) and token_ids[2] == 4 and step.positions.tolist() == [5, 6, 9]
    with pytest.raises(AssertionError, match="disagree"):
        step_inputs([Span(5, 2, [1], 3)], [[1]], CPU)


def test_every_token_has_the_slot_of_its_position() -> None:
    spans = random_spans(6)
    _, step = step_inputs(spans, [[0] * span.num_new for span in spans], CPU)
    expected = [
        span.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        for span in spans
        for position in range(span.num_computed, span.end)
    ]
    assert step.slot_mapping.tolist() == expected
    layout = StepLayout(step.num_tokens, len(spans))
    packed = layout.pack(spans, [[3] * span.num_new for span in spans])
    assert packed.shape == (layout.length,) and torch.equal(layout.split(packed).slot_mapping, step.slot_mapping)


# The block table


def test_block_table_equals_one_made_anew() -> None:
    """Sequences grow, leave, come back with other blocks and change places; padding rows repeat the first."""
    table = BlockTable(max_rows=8, max_blocks=6, device=CPU)
    running: list[tuple[list[int], int]] = []  # blocks, cached tokens
    for _ in range(300):
        for row, (blocks, length) in enumerate(running):
            length = min(length + random.choice([0, 1, 1, 100]), 6 * BLOCK_SIZE)
            blocks += random.sample(range(1, 1000), max(0, blocks_for(length) - len(blocks)))
            running[row] = blocks, length
        if running and random.random() < 0.2:
            running.pop(random.randrange(len(running)))
        if len(running) < 6 and random.random() < 0.3:
            length = random.randint(1, 300)
            running.append((random.sample(range(1, 1000), blocks_for(length)), length))
        if random.random() < 0.1:
            random.shuffle(running)
        spans = [Span(length - 1, 1, blocks, 1) for blocks, length in running]
        spans += spans[:1] * random.choice([0, 0, 2])
        width = random.choice([None, 6])
        view, expected = table.update(spans, width), block_table_of(spans, CPU)
        assert view.dtype == torch.int32 and view.shape == (len(spans), width or expected.shape[1])
        assert view.stride() == table.table.stride()
        for row, span in enumerate(spans):
            used = blocks_for(span.end)
            assert torch.equal(view[row, :used], expected[row, :used])


def written(table: BlockTable, spans: list[Span]) -> list[tuple[int, int]]:
    """Entries that an update writes."""
    table.table.fill_(-1)
    table.update(spans)
    return [tuple(place) for place in (table.table >= 0).nonzero().tolist()]


def test_block_table_writes_only_what_has_changed() -> None:
    table, first, second, third = BlockTable(4, 5, CPU), [11, 12, 13], [21, 22], [31]
    assert written(table, [Span(0, 130, first, 1), Span(0, 1, second, 1)]) == [(0, 0), (0, 1), (1, 0)]
    assert written(table, [Span(130, 1, first, 1), Span(1, 1, second, 1)]) == []
    assert written(table, [Span(131, 126, first, 1), Span(2, 127, second, 1)]) == [(0, 2), (1, 1)]
    assert written(table, [Span(5, 1, first, 1)]) == written(table, [Span(257, 1, first, 1)]) == []
    assert written(table, [Span(257, 1, first, 1), Span(0, 9, third, 1)]) == [(1, 0)]
    assert written(table, [Span(9, 1, third, 1), Span(257, 1, first, 1)]) == [(0, 0), (1, 0), (1, 1), (1, 2)]
    assert written(table, [Span(10, 1, third, 1)] * 3) == [(1, 0), (2, 0)]
    assert written(table, [Span(11, 1, third, 1)] * 3) == written(table, []) == []
    equal = [31]  # another sequence may hold the same blocks later
    assert written(table, [Span(11, 1, equal, 1)]) == [(0, 0)]


# Decode steps


def decoding(*lengths: int) -> tuple[list[Sequence], list[Scheduled]]:
    """Sequences with `lengths` tokens in the cache and one more that is not."""
    blocks = random.sample(range(1, 100), sum(map(blocks_for, lengths)) + len(lengths))
    sequences = []
    for length in lengths:
        sequence = Sequence(request_id="", prompt_token_ids=[5] * length, sampling=SamplingParams(), token_ids=[6])
        sequence.blocks = [blocks.pop() for _ in range(blocks_for(length + 1))]
        sequence.num_computed = length
        sequences.append(sequence)
    return sequences, [Scheduled(sequence, sequence.num_computed, 1, True) for sequence in sequences]


def test_rows_of_a_decode_step_and_padding_rows() -> None:
    sequences, batch = decoding(130, 7, 127)
    sequences[1].token_ids = [8]
    inputs, table = DecodeInputs(5, [5, 4], CPU), BlockTable(5, 4, CPU)
    token_ids, step = inputs.fill(batch, None, table, 4)
    assert token_ids.tolist() == [6, 8, 6, 6, 6] and step.positions.tolist() == [130, 7, 127, 130, 130]
    assert step.seq_lens.tolist() == step.seq_lens_list == [131, 8, 128, 131, 131]
    slots = [s.blocks[-1] * BLOCK_SIZE + offset for s, offset in zip(sequences, (2, 7, 127), strict=True)]
    assert step.slot_mapping.tolist() == [*slots, NULL_BLOCK * BLOCK_SIZE + 3, NULL_BLOCK * BLOCK_SIZE + 4]
    assert step.query_starts.tolist() == [0, 1, 2, 3, 4, 5] and step.query_lens_list == [1] * 5
    assert step.is_decode and not step.starts_fresh and step.dp_num_tokens == [5, 4]
    for row, sequence in enumerate([*sequences, sequences[0], sequences[0]]):
        assert step.block_table[row, : len(sequence.blocks)].tolist() == sequence.blocks
    addresses = [tensor.data_ptr() for tensor in (token_ids, step.positions, step.block_table)]
    token_ids, step = inputs.fill(batch[1:2], None, table, 4)  # fewer rows: the previous ones are overwritten
    assert token_ids.tolist() == [8] * 5 and step.seq_lens.tolist() == [8] * 5
    assert step.block_table[:, 0].tolist() == sequences[1].blocks * 5
    assert addresses == [tensor.data_ptr() for tensor in (token_ids, step.positions, step.block_table)]
    token_ids, step = inputs.fill([], None, table, 4)  # of a group without sequences
    assert token_ids.tolist() == [0] * 5 and step.seq_lens.tolist() == step.seq_lens_list == [1] * 5
    assert step.slot_mapping.tolist() == [NULL_BLOCK * BLOCK_SIZE + row for row in range(5)]
    assert step.block_table[:, 0].tolist() == [NULL_BLOCK] * 5  # not somebody's blocks, which may hold NaN


def test_padding_rows_write_to_slots_of_their_own_as_long_as_there_are_enough() -> None:
    _, batch = decoding(3)
    step = DecodeInputs(200, [200], CPU).fill(batch, None, BlockTable(200, 1, CPU), 1)[1]
    assert step.slot_mapping[1:].tolist() == [row % BLOCK_SIZE for row in range(1, 200)]


def test_unread_tokens_come_from_the_step_that_sampled_them() -> None:
    """In any order, beside tokens that the host knows, and for padding rows."""
    sequences, batch = decoding(130, 7, 127)
    table = BlockTable(5, 4, CPU)
    sampled = torch.tensor([100, 101, 102, 103])
    for unread, num_rows in ((sequences, 3), (sequences[1:], 3), (sequences[::-1], 5), (sequences[:1], 5)):
        for sequence in sequences:
            sequence.token_ids, sequence.num_unread = ([], 1) if sequence in unread else ([6], 0)
        rows = {id(sequence): row for row, sequence in enumerate(unread)}
        token_ids, _ = DecodeInputs(num_rows, [num_rows], CPU).fill(batch, Unread(sampled, rows), table, 4)
        expected = [100 + rows[id(sequence)] if sequence in unread else 6 for sequence in sequences]
        assert token_ids.tolist() == expected + expected[:1] * (num_rows - 3)


@torch.inference_mode()
def test_padding_rows_do_not_affect_other_rows(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, num_hidden_layers=2, num_experts=4)
    llm = LLM(tmp_path, device="cpu", dtype="float32", batch_size=3)
    prompts = [torch.randint(0, 211, (length,)).tolist() for length in (130, 7, 128)]
    for request in llm.requests([("", prompt) for prompt in prompts], SamplingParams(max_new_tokens=5)):
        llm.engine.add(request.samples)
    llm.engine.step()
    [scheduler] = llm.engine.schedulers
    batch = scheduler.schedule(False, True)
    assert batch is not None and [work.end for work in batch] == [131, 8, 129]
    before = [keys.clone() for keys, _ in llm.kv_caches]
    expected = llm.runner.decode([batch], None).local.clone()
    after = [keys.clone() for keys, _ in llm.kv_caches]
    for (keys, _), old in zip(llm.kv_caches, before, strict=True):
        keys.copy_(old)

    inputs, table = DecodeInputs(5, [5], llm.device), BlockTable(5, 4, llm.device)
    logits = llm.runner.decode_step(*inputs.fill(batch, None, table, 4)).local
    torch.testing.assert_close(logits[:3], expected, atol=1e-5, rtol=0)
    for (keys, _), new in zip(llm.kv_caches, after, strict=True):
        torch.testing.assert_close(keys[NULL_BLOCK + 1 :], new[NULL_BLOCK + 1 :], atol=1e-5, rtol=0)
    repeated = expected[:1].expand(5, -1)
    torch.testing.assert_close(logits[3:], repeated[3:], atol=1e-5, rtol=0)  # padding activates no additional experts
    logits = llm.runner.decode_step(*inputs.fill(batch[:1], None, table, 4)).local
    torch.testing.assert_close(logits, repeated, atol=1e-5, rtol=0)


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
def test_batch_sizes_with_a_graph(largest: int, sizes: list[int]) -> None:
    assert graph_sizes(largest) == sizes


@pytest.mark.parametrize(
    ("largest", "max_graphs", "sizes"),
    [
        (5, 6, [1, 2, 3, 4, 5]),
        (8, 6, [1, 2, 3, 4, 6, 8]),
        (32, 6, [1, 2, 4, 8, 16, 32]),
        (64, 6, [1, 4, 8, 16, 32, 64]),
        (8, 2, [1, 8]),
        (8, 1, [8]),
    ],
)
def test_a_limited_number_of_graphs(largest: int, max_graphs: int, sizes: list[int]) -> None:
    assert graph_sizes(largest, max_graphs) == sizes


def test_graphs_of_several_ranks_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphRunner, "capture", lambda self, size: size)
    recorder: Any = SimpleNamespace(max_graphs=2)
    for ranks, sizes in (((0,), [1, 2, 3]), ((0, 1), [1, 3])):
        parallel = ParallelContext(world=Group(name="world", ranks=ranks))
        model: Any = None
        runner = GraphRunner(model, [], parallel, False, CPU, 3, 512, recorder, 512)
        assert sorted(runner.graphs) == sizes
