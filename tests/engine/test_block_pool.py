# SPDX-License-Identifier: Apache-2.0
"""Reference counts, eviction and prefix cache of the block pool; tensors of the cache."""

import random

import pytest
import torch

from executor.engine.block_pool import MIN_COPIED, BlockPool, block_digest
from executor.engine.kv_cache import cache_tensors, copy_blocks, zero_blocks
from ops import Ops
from ops.step import BLOCK_SIZE, NULL_BLOCK

A, B, C, D = (block_digest(b"", [number] * BLOCK_SIZE) for number in range(4))


def taken(pool: BlockPool, count: int) -> list[int]:
    blocks = pool.allocate(count)
    assert blocks is not None
    return blocks


def registered(pool: BlockPool, *digests: bytes) -> list[int]:
    """Blocks of a finished sequence, free but in the prefix cache."""
    blocks = taken(pool, len(digests))
    for block, digest in zip(blocks, digests, strict=True):
        pool.register(block, b"", [], digest)
    pool.release(blocks)
    return blocks


def test_each_block_has_its_holders() -> None:
    """Random allocation, sharing and release against counts of one's own."""
    pool, names = BlockPool(9), [block_digest(b"", [number] * BLOCK_SIZE) for number in range(30)]
    held: list[list[int]] = []
    for _ in range(500):
        choice = random.random()
        if held and choice < 0.4:
            pool.release(held.pop(random.randrange(len(held))), suspect=random.random() < 0.2)
        elif choice < 0.6:
            found = pool.cached(random.sample(names, 3))
            pool.share(found)
            held += [found] if found else []
        else:
            count, free = random.randint(1, 4), pool.num_free
            blocks = pool.allocate(count)
            assert (blocks is None) == (count > free)
            if blocks is not None:
                assert len(blocks) == count and not {block for other in held for block in other} & set(blocks)
                held.append(blocks)
                if random.random() < 0.7:
                    pool.register(blocks[0], b"", [], random.choice(names))
        in_use = [block for blocks in held for block in blocks]
        assert pool.references == [in_use.count(block) for block in range(10)] and not in_use.count(NULL_BLOCK)
        assert sorted({*in_use, *pool.free}) == list(range(1, 10)) and not set(in_use) & set(pool.free)
        assert pool.digest_of == {block: digest for digest, block in pool.block_of.items()}
        assert pool.suspects <= set(in_use)


def test_unknown_blocks_are_evicted_first_then_the_least_recently_used() -> None:
    pool = BlockPool(6)
    old = registered(pool, A, B)
    new = registered(pool, C)
    plain = taken(pool, 3)
    assert not {*plain} & {*old, *new}
    pool.release(plain)
    assert {*taken(pool, 3)} == {*plain}
    assert pool.cached([A, B]) == old
    pool.share(pool.cached([C]))
    pool.release(new)  # used again, and so the last one to go
    assert taken(pool, 1) == [old[1]]  # the end of a sequence before its beginning
    assert pool.cached([A, B]) == [old[0]] and pool.cached([C]) == new
    assert taken(pool, 1) == [old[0]] and pool.cached([A]) == [] and pool.cached([C]) == new
    assert taken(pool, 1) == new and pool.cached([C]) == [] and pool.allocate(1) is None


def test_shared_blocks_stay_until_the_last_reference_is_dropped() -> None:
    pool = BlockPool(3)
    blocks = registered(pool, A, B)
    for _ in range(2):
        pool.share(pool.cached([A, B]))
    assert [pool.references[block] for block in blocks] == [2, 2] and pool.num_free == 1
    pool.release(blocks)
    assert pool.num_free == 1 and pool.allocate(2) is None
    pool.release(blocks)
    assert pool.num_free == 3 and pool.cached([A, B]) == blocks


def test_cached_is_the_longest_prefix() -> None:
    pool = BlockPool(4)
    a, b = registered(pool, A, B)
    assert pool.cached([A, B, C]) == [a, b] and pool.cached([A, C, B]) == [a]
    assert pool.cached([C, A]) == pool.cached([]) == []


def test_a_second_block_of_the_same_tokens_is_not_registered() -> None:
    pool = BlockPool(3)
    [first] = registered(pool, A)
    [second] = registered(pool, A)
    assert first != second and pool.cached([A]) == [first]
    pool.register(first, b"", [], B)  # nor does a block change its name
    assert pool.cached([B]) == []
    assert second in taken(pool, 2) and pool.cached([A]) == [first]


@pytest.mark.parametrize("is_suspect_last", [False, True])
def test_suspect_blocks_are_forgotten_at_once_and_zeroed_when_they_are_free(is_suspect_last: bool) -> None:
    pool = BlockPool(3)
    [block] = registered(pool, A)
    for _ in range(2):
        pool.share([block])
    pool.release([block], suspect=not is_suspect_last)
    assert (pool.cached([A]) == [block]) == is_suspect_last and pool.to_zero == []
    pool.release([block], suspect=is_suspect_last)
    assert pool.cached([A]) == [] and pool.to_zero == [block] and not pool.suspects
    [again] = registered(pool, B)
    assert again == block and pool.cached([B]) == [block]  # it is an ordinary block again
    pool.share([block])
    pool.release([block])
    assert pool.to_zero == [block] and pool.cached([B]) == [block]


def test_a_block_that_begins_alike_is_copied() -> None:
    pool, tokens = BlockPool(6), [random.randrange(1000) for _ in range(BLOCK_SIZE)]
    full, part, elsewhere = taken(pool, 3)
    pool.register(full, A, tokens, B)
    pool.register(part, A, [*tokens[:60], -1], None)
    pool.register(elsewhere, C, tokens, D)
    pool.release([full, part, elsewhere])
    assert pool.partial_match(A, tokens[:100]) == (full, 100)
    assert pool.partial_match(A, [*tokens[:60], -1, 5]) == (part, 61)
    assert pool.partial_match(A, [*tokens[: MIN_COPIED - 1], -2]) == (None, 0) == pool.partial_match(B, tokens)
    assert pool.partial_match(A, [*tokens[:MIN_COPIED], -2])[1] == MIN_COPIED
    pool.share([part])
    pool.copies.append((part, 5))
    assert part not in taken(pool, 5) and pool.allocate(1) is None  # a source stays until it is copied
    assert pool.pop_changes() == ([], [(part, 5)]) and pool.num_free == 1
    assert taken(pool, 1) == [part] and pool.partial_match(A, tokens) == (None, 0)
    assert not pool.children and not pool.prefix_of


def test_copied_blocks_hold_what_their_sources_do() -> None:
    caches = cache_tensors(2, 4, 2, 8, torch.float32, torch.device("cpu"), Ops())
    for tensor in (tensor for pair in caches for tensor in pair):
        tensor.normal_()
    before = [tuple(tensor.clone() for tensor in pair) for pair in caches]
    copy_blocks(caches, [(1, 3), (4, 2)])
    for pair, old in zip(caches, before, strict=True):
        for tensor, was in zip(pair, old, strict=True):
            torch.testing.assert_close(tensor, was[[0, 1, 4, 1, 4]], atol=0, rtol=0)


def test_digests_depend_on_all_tokens_before() -> None:
    tokens = [random.randrange(2**31) for _ in range(BLOCK_SIZE)]
    other = list(tokens)
    other[random.randrange(BLOCK_SIZE)] += 1
    digests = {block_digest(before, ids) for before in (b"", A, B) for ids in (tokens, other)}
    assert len(digests) == 6 and block_digest(A, tuple(tokens)) == block_digest(A, list(tokens))


def test_cache_tensors() -> None:
    layers = cache_tensors(2, 9, 1, 4, torch.float32, torch.device("cpu"), Ops())
    assert len(layers) == 2
    for layer in layers:
        for cache in layer:
            assert cache.shape == (10, BLOCK_SIZE, 1, 4) and not cache.any()
            cache.fill_(torch.nan)
    zero_blocks(layers, [3, 9, 3])
    for cache in (cache for layer in layers for cache in layer):
        zeros = [block for block in range(10) if torch.equal(cache[block], torch.zeros(BLOCK_SIZE, 1, 4))]
        assert zeros == [NULL_BLOCK, 3, 9]
