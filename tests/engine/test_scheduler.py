# SPDX-License-Identifier: Apache-2.0
"""Which tokens a step computes: budget, chunks, order, preemption; on steps that compute nothing."""

import random
from typing import Any

import pytest

from executor.engine.scheduler import Batch
from executor.engine.sequence import Sequence
from ops.step import BLOCK_SIZE
from tests.engine.simulated import END, NOT_FINITE, Simulated, random_tokens, simulate

AHEAD = pytest.mark.parametrize("runs_ahead", [False, True])


@pytest.fixture(autouse=True)
def simulated_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch)


def is_prompt(work: Any) -> bool:
    return work.num_computed < len(work.sequence.prompt_token_ids)


def sizes(batch: Batch, sequences: list[Sequence]) -> list[tuple[int, int]]:
    """(index of the sequence, new tokens) of each part of a step."""
    return [(sequences.index(work.sequence), work.num_new) for work in batch]


# Budget, chunks and order


def test_prompts_share_the_budget_in_order_of_arrival() -> None:
    run = Simulated(max_step_tokens=100)
    sequences = [run.add(length, new_tokens=1) for length in (60, 30, 1, 150, 50)]
    run.run()
    found = [sizes(batch, sequences) for [batch] in run.steps]
    assert found == [[(0, 60), (1, 30), (2, 1), (3, 9)], [(3, 100)], [(3, 41), (4, 50)]]
    run.assert_all_free()


def test_prompts_get_what_decoding_sequences_leave_and_no_more_than_a_chunk() -> None:
    run = Simulated(max_step_tokens=10, chunk_tokens=7)
    sequences = [run.add(1, new_tokens=100) for _ in range(2)]
    sequences += [run.add(length, new_tokens=2) for length in (12, 5)]
    run.run()
    found = [sizes(batch, sequences) for [batch] in run.steps[:6]]
    decodes = [(0, 1), (1, 1)]
    assert found == [
        [*decodes, (2, 8)],  # nobody decodes yet: all of the budget
        [*decodes, (2, 4), (3, 3)],
        [*decodes, (2, 1), (3, 2)],
        [*decodes, (3, 1)],
        decodes,
        decodes,
    ]


def test_a_step_without_room_still_decodes_and_takes_a_token_of_a_prompt() -> None:
    run = Simulated(max_step_tokens=3, chunk_tokens=3)
    sequences = [run.add(1, new_tokens=10) for _ in range(5)] + [run.add(2, new_tokens=1)]
    run.run()
    assert sizes(run.steps[0][0], sequences) == [(0, 1), (1, 1), (2, 1)]
    assert sizes(run.steps[1][0], sequences) == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert sizes(run.steps[3][0], sequences) == [*((row, 1) for row in range(5)), (5, 1)]


@AHEAD
@pytest.mark.parametrize("num_groups", [1, 2])
def test_decoding_sequences_get_a_token_in_every_step(num_groups: int, runs_ahead: bool) -> None:
    """Long prompts come while they decode, in the same or in another attention DP group."""
    chunk = random.choice([1, 7, 40])
    run = Simulated(num_groups=num_groups, max_step_tokens=300, chunk_tokens=chunk, runs_ahead=runs_ahead)
    for _ in range(3):
        run.add(random.randint(1, 20), new_tokens=60)
    for _ in range(150):
        if random.random() < 0.1:
            run.add(random.randint(1, 300), new_tokens=random.randint(1, 30))
        run.engine.step()
    run.run()
    chunks = 0
    for step, batches in enumerate(run.steps):
        decoding = {id(work.sequence) for batch in batches for work in batch if not is_prompt(work)}
        for batch in batches:
            # one with a single token left counts as one that decodes
            tokens = sum(
                work.num_new for work in batch if is_prompt(work) and (work.num_new, work.samples) != (1, True)
            )
            assert tokens <= (chunk if decoding else 300)
            chunks += bool(decoding) and any(is_prompt(work) and not work.samples for work in batch)
        before = [work for batch in run.steps[step - 1] for work in batch if step and work.samples]
        for work in before:
            generated = work.end - len(work.sequence.prompt_token_ids) + 1
            assert generated == work.sequence.sampling.max_new_tokens or id(work.sequence) in decoding
    assert chunks > 3
    run.assert_all_free()


@AHEAD
def test_first_come_first_served(runs_ahead: bool) -> None:
    """A short prompt does not overtake one that waits for blocks, nor for a place in the batch."""
    for limits in ({"num_blocks": 4}, {"max_sequences": 2}):
        run = Simulated(prefix_cache=False, runs_ahead=runs_ahead, **limits)
        sequences = [run.add(length, new_tokens=9) for length in (200, 90, 300, 5, 1, 7, 250)]
        run.run()
        first = {
            index: step for step, [batch] in reversed([*enumerate(run.steps)]) for index, _ in sizes(batch, sequences)
        }
        assert [first[index] for index in range(7)] == sorted(first.values()) and len({*first.values()}) > 2
        assert max(len(batch) for [batch] in run.steps) <= limits.get("max_sequences", 4)
        run.assert_all_free()


def test_new_requests_go_to_the_group_with_the_least_load() -> None:
    """Number of sequences first, then the tokens they still need."""
    run = Simulated(num_groups=3)
    groups = [scheduler.waiting for scheduler in run.engine.schedulers]
    sequences = [run.add(prompt, new_tokens) for prompt, new_tokens in ((300, 5), (200, 1), (5, 20), (9, 9), (1, 1))]
    assert [[*group] for group in groups] == [
        [sequences[0]],
        [sequences[1], sequences[4]],
        [sequences[2], sequences[3]],
    ]
    first = run.add(1, new_tokens=1, group=1)
    assert groups[1][-1] is first
    run.engine.cancel(sequences[1].request_id)
    run.engine.cancel(sequences[4].request_id)
    run.engine.cancel(first.request_id)
    assert run.add(500, new_tokens=9) in groups[1]
    run.run()
    run.assert_all_free()


def test_groups_step_together() -> None:
    """What one group computes, is_decode included, follows from the batches of all."""
    run = Simulated(num_groups=2, max_step_tokens=50, chunk_tokens=10)
    decoding, prompt = run.add(3, new_tokens=12, group=0), run.add(60, new_tokens=1, group=1)
    run.run()
    assert [len(batches) for batches in run.steps] == [2] * 12
    found = [[[work.num_new for work in batch] for batch in batches] for batches in run.steps]
    assert found == [[[3], [50]], [[1], [10]], *[[[1], []]] * 10]
    assert (len(decoding.token_ids), len(prompt.token_ids)) == (12, 1)


# Steps ahead of their tokens


def test_a_request_is_admitted_while_tokens_are_unread() -> None:
    run = Simulated(runs_ahead=True, chunk_tokens=16)
    first = run.add(5, new_tokens=40)
    for _ in range(3):
        run.engine.step()
    assert run.engine.in_flight and first.num_unread == 1
    second = run.add(30, new_tokens=3)
    run.engine.step()
    [batch] = run.steps[-1]
    assert run.ahead[-1] and sizes(batch, [first, second]) == [(0, 1), (1, 16)]
    run.engine.step()  # tokens of a step with prompts are read at once
    assert not run.ahead[-1] and sizes(run.steps[-1][0], [first, second]) == [(0, 1), (1, 14)]
    run.run()
    assert (len(first.token_ids), len(second.token_ids)) == (40, 3)
    run.assert_all_free()


def test_no_step_is_launched_for_tokens_beyond_the_limit() -> None:
    for runs_ahead in (False, True):
        run = Simulated(runs_ahead=runs_ahead)
        sequences = [run.add(7, new_tokens) for new_tokens in (1, 2, 6)]
        events = run.run()
        assert len(run.steps) == 6 and sum(len(batch) for [batch] in run.steps) == 1 + 2 + 6
        assert [event.position for event in events if event.sequence is sequences[2]] == [0, 1, 2, 3, 4, 5]
        assert [event.is_last for event in events if event.sequence is sequences[1]] == [False, True]
        assert run.ahead[2:] == [runs_ahead] * 4


def test_tokens_that_the_choice_depends_on_are_read_first() -> None:
    run = Simulated(runs_ahead=True)
    sequence = run.add(7, new_tokens=5)
    sequence.sampling = type(sequence.sampling)(max_new_tokens=5, repetition_penalty=1.1)
    run.run()
    assert len(run.steps) == 5 and not any(run.ahead)


@AHEAD
def test_cancellation(runs_ahead: bool) -> None:
    """While waiting, in the prompt and while decoding; blocks of steps in flight are kept until these are read."""
    run = Simulated(runs_ahead=runs_ahead, max_sequences=2, max_step_tokens=140, chunk_tokens=64)
    decoding, prompt, waiting = run.add(130, new_tokens=20), run.add(3000, new_tokens=2), run.add(7, new_tokens=3)
    for _ in range(3):
        run.engine.step()
    assert not prompt.token_ids and prompt.num_computed > 0
    for sequence in (waiting, prompt, decoding):
        run.engine.cancel(sequence.request_id)
        run.engine.cancel(sequence.request_id)
        run.engine.cancel("unknown")
    events = run.run()
    assert [event.sequence for event in events] == [waiting, prompt, decoding]
    assert all(event.is_last and event.token_id is None for event in events)
    assert all(sequence.finish_reason == "cancelled" for sequence in (waiting, prompt, decoding))
    run.assert_all_free()
    sequence = run.add(130, new_tokens=20)
    for _ in range(5):
        run.engine.step()
    count = len(sequence.token_ids)
    run.engine.cancel(sequence.request_id)
    [event] = run.run()  # not the token in flight
    assert event.position == count == len(sequence.token_ids)
    run.assert_all_free()


@AHEAD
@pytest.mark.parametrize("failing", ["launch", "read"])
def test_abort_drops_everything(failing: str, runs_ahead: bool) -> None:
    """What is in flight, too. The failed step may have written anything, which must reach nobody."""
    run = Simulated(runs_ahead=runs_ahead, max_sequences=2, num_blocks=9)
    prompts = [random_tokens(length) for length in (300, 130, 7)]
    sequences = [*(run.add(prompt, new_tokens=9) for prompt in prompts), *run.add(20, new_tokens=5, n=3)]
    for _ in range(3):
        run.engine.step()
    run.failing = failing
    with pytest.raises(RuntimeError, match="the device is gone"):
        run.engine.step()
    run.engine.abort()
    assert all(sequence.finish_reason == "cancelled" for sequence in sequences) and not run.engine.has_work
    run.assert_all_free()
    run.failing = None
    again = [run.add(prompt, new_tokens=9) for prompt in prompts] + [run.add(128 * 9, new_tokens=1)]
    run.run()
    assert [len(sequence.token_ids) for sequence in again] == [9, 9, 9, 1]
    assert not any(sequence.num_cached for sequence in again)
    run.assert_all_free()


# Preemption


@AHEAD
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_the_one_admitted_last_is_preempted_and_resumed_before_later_ones(prefix_cache: bool, runs_ahead: bool) -> None:
    run = Simulated(num_blocks=5, prefix_cache=prefix_cache, runs_ahead=runs_ahead)
    first, second = run.add(120, new_tokens=300), run.add(120, new_tokens=200)
    for _ in range(5):
        run.engine.step()
    later = run.add(300, new_tokens=3)
    preempted = False
    while run.engine.has_work:
        if second in run.scheduler.waiting:
            preempted = True
            assert [*run.scheduler.waiting] == [second, later] and run.scheduler.running in ([first], [])
            assert second.blocks == [] and second.num_computed == 0
        run.engine.step()
    assert preempted
    assert [len(sequence.token_ids) for sequence in (first, second, later)] == [300, 200, 3]
    for sequence in (first, second, later):  # each token is what was sampled for its position
        assert sequence.prompt_token_ids + sequence.token_ids == run.tokens[id(sequence)]
    run.assert_all_free()


def test_a_preempted_sequence_waits_at_the_front() -> None:
    """Two are preempted one after the other: they come back in the order of their arrival."""
    run = Simulated(num_blocks=4, prefix_cache=False)
    first, second, third = (run.add(100, new_tokens=n) for n in (400, 200, 200))
    resumed: list[Sequence] = []
    waiting: list[Sequence] = []
    while run.engine.has_work:
        run.engine.step()
        resumed += [sequence for sequence in waiting if sequence in run.scheduler.running]
        waiting = [sequence for sequence in run.scheduler.waiting if sequence.token_ids]
        assert waiting in ([], [third], [second], [second, third])
    assert second in resumed and third in resumed and first not in resumed
    assert resumed.index(second) < resumed.index(third)
    assert [len(sequence.token_ids) for sequence in (first, second, third)] == [400, 200, 200]


def test_preempted_tokens_are_not_computed_again_where_the_cache_still_has_them() -> None:
    totals = {}
    for prefix_cache in (False, True):
        run = Simulated(num_blocks=8, prefix_cache=prefix_cache)
        first, second = run.add(500, new_tokens=200), run.add(380, new_tokens=100)
        run.run()
        totals[prefix_cache] = sum(work.num_new for [batch] in run.steps for work in batch)
        assert (len(first.token_ids), len(second.token_ids)) == (200, 100)
        assert second.num_cached == 0  # these blocks are its own
    assert totals[True] <= totals[False] - 2 * BLOCK_SIZE


# Everything at once


def random_run(num_groups: int, runs_ahead: bool) -> tuple[Simulated, list[Sequence]]:
    """Requests come, end, fail and are cancelled at any time; those of a crowded run do not fit side by side."""
    chunk, crowded = random.choice([3, 40, 100, 2048]), random.random() < 0.3
    run = Simulated(
        num_blocks=5 if crowded else random.choice([6, 8, 12]),
        num_groups=num_groups,
        max_sequences=8 if crowded else random.choice([1, 3, 8]),
        max_step_tokens=max(chunk, random.choice([20, 150, 8192])),
        chunk_tokens=chunk,
        prefix_cache=random.random() < 0.8,
        runs_ahead=runs_ahead,
    )
    prefixes = [random_tokens(random.choice([100, 128, 256, 300])) for _ in range(2)]
    added = [run.add(100, new_tokens=200) for _ in range(4 * num_groups * crowded)]
    for _ in range(20):
        prompt = random.choice([[], *prefixes]) + random_tokens(random.choice([1, 2, 40, 127, 128, 129]))
        special = {random.randrange(30): random.choice([END, NOT_FINITE])} if random.random() < 0.4 else None
        new_tokens = random.choice([1, 2, 30, 200])
        if random.random() < 0.1:  # all blocks are needed for the prompt
            prompt, new_tokens = prompt + random_tokens(run.num_blocks * BLOCK_SIZE - len(prompt)), 1
        samples = run.add(prompt, new_tokens, special, n=random.choice([1, 1, 1, 3]))
        added += samples if isinstance(samples, list) else [samples]
        for _ in range(random.choice([0, 0, 1, 5, 30])):
            run.engine.step()
        if random.random() < 0.2:
            run.engine.cancel(random.choice(added).request_id)
    run.run()
    return run, added


def num_preemptions(run: Simulated) -> int:
    count, ends = 0, dict.fromkeys(run.tokens, 0)
    for work in (work for batches in run.steps for batch in batches for work in batch):
        count += work.num_computed < ends[id(work.sequence)]
        ends[id(work.sequence)] = work.end
    return count


@AHEAD
@pytest.mark.parametrize("num_groups", [1, 2])
def test_random_requests(num_groups: int, runs_ahead: bool) -> None:
    """Every access to the cache is checked by the simulation. Runs until all that is to be tested has happened."""
    happened = {"length": 0, "stop": 0, "error": 0, "cancelled": 0, "preempted": 0, "cached": 0}
    while min(happened.values()) < 3:
        run, added = random_run(num_groups, runs_ahead)
        run.assert_all_free()
        happened["preempted"] += num_preemptions(run)
        for sequence in added:
            known = run.tokens[id(sequence)][len(sequence.prompt_token_ids) :]
            assert sequence.token_ids == known[: len(sequence.token_ids)]
            if sequence.finish_reason == "length":
                assert len(sequence.token_ids) == sequence.sampling.max_new_tokens
            elif sequence.finish_reason == "stop":
                assert sequence.token_ids.index(END) == len(sequence.token_ids) - 1
            elif sequence.finish_reason == "error":
                assert known[len(sequence.token_ids)] is NOT_FINITE
            assert sequence.finish_reason is not None
            happened[sequence.finish_reason] += 1
            happened["cached"] += sequence.num_cached > 0
