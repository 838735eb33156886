# SPDX-License-Identifier: Apache-2.0
"""What sequences find in the prefix cache, and what those that fail leave in it; on steps that compute nothing."""

import pytest

from executor.engine.block_pool import MIN_COPIED
from ops.step import BLOCK_SIZE
from tests.engine.simulated import END, NOT_FINITE, Simulated, random_tokens, simulate

AHEAD = pytest.mark.parametrize("runs_ahead", [False, True])


@pytest.fixture(autouse=True)
def simulated_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch)


@AHEAD
def test_the_prompt_of_a_finished_sequence_is_found(runs_ahead: bool) -> None:
    """Whole blocks, then a copy of what the last one has in common, but a token is left to compute; also where an end
    token came in a step ahead."""

    def found(num_tokens: int) -> int:
        rest = num_tokens % BLOCK_SIZE
        return num_tokens if rest >= MIN_COPIED else num_tokens - rest

    for length in (1, 127, 128, 129, 256, 300):
        run = Simulated(runs_ahead=runs_ahead)
        prompt = random_tokens(length)
        first = run.add(prompt, new_tokens=20, special={4: END})
        run.run()
        assert first.finish_reason == "stop" and len(first.token_ids) == 5 and first.num_cached == 0
        second = run.add(prompt + random_tokens(40, other_than=first.token_ids[0]), new_tokens=2)
        third = run.add(prompt, new_tokens=2)
        run.run()
        assert second.num_cached == found(length)
        assert third.num_cached == found(length - 1)
        run.assert_all_free()


def test_a_prompt_that_needs_every_block_takes_that_of_which_it_would_copy_the_beginning() -> None:
    for length in (3 * BLOCK_SIZE, 2 * BLOCK_SIZE):
        run = Simulated(num_blocks=3)
        prompt = random_tokens(100)
        run.add(prompt, new_tokens=1)
        run.run()
        sequence = run.add(prompt[:50] + random_tokens(length - 50, other_than=prompt[50]), new_tokens=1)
        run.run()
        assert sequence.finish_reason == "length"
        assert sequence.num_cached == (0 if length == 3 * BLOCK_SIZE else 50)
        run.assert_all_free()


@AHEAD
def test_an_unfinished_prompt_leaves_the_prefix_that_it_has_found(runs_ahead: bool) -> None:
    """Whether it is cancelled or preempted; what it has computed itself is not verified yet, and not found."""
    run = Simulated(runs_ahead=runs_ahead, max_step_tokens=400, chunk_tokens=50)
    prefix = random_tokens(280)
    run.add(prefix, new_tokens=1)
    run.run()
    decoding = run.add(5, new_tokens=30)
    run.engine.step()
    cancelled = run.add(prefix + random_tokens(300), new_tokens=1)
    for _ in range(4):
        run.engine.step()
    assert cancelled.num_cached == 280 and cancelled.num_computed > 384
    run.engine.cancel(cancelled.request_id)
    again = run.add(cancelled.prompt_token_ids, new_tokens=1)
    run.run()
    assert again.num_cached == 280 and len(decoding.token_ids) == 30
    run.assert_all_free()


def test_generated_tokens_are_found_too() -> None:
    run = Simulated()
    first = run.add(100, new_tokens=200)
    run.run()
    second = run.add(first.prompt_token_ids + first.token_ids, new_tokens=1)
    run.run()
    assert second.num_cached == 299


def test_running_sequences_share_their_prefix() -> None:
    run = Simulated()
    prompt = random_tokens(256)
    first = run.add(prompt + [1], new_tokens=9)
    run.engine.step()
    others = [run.add(prompt + [number], new_tokens=9) for number in (2, 3)]
    different = run.add([prompt[0] + 1, *prompt[1:]], new_tokens=9)
    run.engine.step()
    pool = run.scheduler.pool
    assert all(sequence.blocks[:2] == first.blocks[:2] for sequence in others)
    assert [pool.references[block] for block in first.blocks] == [3, 3, 1]
    assert not {*different.blocks} & {*first.blocks} and different.num_cached == 0
    run.run()
    run.assert_all_free()


def test_blocks_are_shared_only_when_they_are_computed() -> None:
    """Sequences of one step, and of a prompt that is computed in chunks, share nothing."""
    run = Simulated(chunk_tokens=100, max_step_tokens=300)
    prompt = random_tokens(280)
    sequences = [run.add(prompt, new_tokens=2) for _ in range(2)]
    run.engine.step()
    sequences.append(run.add(prompt, new_tokens=2))
    run.run()
    assert [sequence.num_cached for sequence in sequences] == [0, 0, 279]


def test_without_prefix_cache_nothing_is_found() -> None:
    run = Simulated(prefix_cache=False)
    prompt = random_tokens(300)
    for _ in range(2):
        sequence = run.add(prompt, new_tokens=2)
        run.run()
        assert sequence.num_cached == 0
    assert not run.scheduler.pool.block_of


def test_logits_of_all_prompt_positions_need_the_whole_prompt() -> None:
    run = Simulated()
    prompt = random_tokens(300)
    run.add(prompt, new_tokens=1)
    run.run()
    sequence = run.add(prompt, new_tokens=1)
    sequence.collects_logits = True
    run.run()
    assert sequence.num_cached == 0 and sum(work.num_new for work in run.steps[-1][0]) == 300


@AHEAD
def test_samples_of_a_request_share_its_prompt(runs_ahead: bool) -> None:
    run = Simulated(runs_ahead=runs_ahead)
    samples = run.add(300, new_tokens=5, n=4)
    run.run()
    assert [sample.num_cached for sample in samples] == [0, 256, 256, 256]
    assert all(len(sample.token_ids) == 5 for sample in samples)
    [cancelled, *others] = run.add(300, new_tokens=5, n=3)
    run.engine.cancel(cancelled.request_id)
    events = run.run()
    assert {id(event.sequence) for event in events} == {id(sample) for sample in (cancelled, *others)}
    assert all(event.is_last for event in events)
    run.assert_all_free()


@AHEAD
def test_a_failed_sequence_leaves_nothing(runs_ahead: bool) -> None:
    """Its blocks are zeroed before others get them and are not found again, those that it shares included."""
    for index in (0, 1, 5):
        run = Simulated(runs_ahead=runs_ahead, num_blocks=12)
        prompt = random_tokens(300)
        sound = run.add(prompt, new_tokens=30)
        run.engine.step()
        failing = run.add(prompt, new_tokens=30, special={index: NOT_FINITE})
        third = run.add(prompt, new_tokens=30)
        run.run()
        assert (failing.finish_reason, len(failing.token_ids), failing.num_cached) == ("error", index, 256)
        assert [len(sequence.token_ids) for sequence in (sound, third)] == [30, 30]
        again = run.add(prompt, new_tokens=1)
        fillers = [run.add(random_tokens(200), new_tokens=5) for _ in range(20)]
        run.run()
        assert again.num_cached == 0 and all(len(filler.token_ids) == 5 for filler in fillers)
        run.assert_all_free()


def test_blocks_to_zero_do_not_pile_up_in_other_groups() -> None:
    run = Simulated(num_groups=2)
    for group in (0, 1, 1):
        run.add(200, new_tokens=9, special={3: NOT_FINITE}, group=group)
        run.run()
        run.add(5, new_tokens=1)
        run.run()
        assert [scheduler.pool.to_zero for scheduler in run.engine.schedulers] == [[], []]
