# SPDX-License-Identifier: Apache-2.0
"""Block pool of the paged KV cache: reference counts, eviction, and the prefix cache, keyed by hashes of tokens."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice

from ops.step import BLOCK_SIZE, NULL_BLOCK

MIN_COPIED = 16  # tokens that a block must have in common with a prompt to be copied
COMPARED_BLOCKS = 8  # latest blocks after a prefix that are compared with a prompt


def block_digest(previous: bytes, token_ids: Sequence[int]) -> bytes:
    """Digest of a full block's tokens and, by the previous block's digest (b"" for none), of all tokens before it."""
    assert len(token_ids) == BLOCK_SIZE
    return hashlib.sha256(previous + array("q", token_ids).tobytes()).digest()


class BlockPool:
    """Block pool of one attention DP group.

    Full blocks are shared by sequences with the same prefix. A block that has only its first tokens in common with a
    prompt is copied. A block without references keeps its tokens until it is evicted, least recently used first. A
    suspect block, which may hold NaN or infinity, is listed in `to_zero` when it becomes free: attention multiplies
    masked positions by 0, and 0 times NaN is NaN.
    """

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self.references = [0] * (num_blocks + 1)
        # without references, in order of eviction
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(NULL_BLOCK + 1, num_blocks + 1))
        self.block_of: dict[bytes, int] = {}
        self.digest_of: dict[int, bytes] = {}
        self.children: dict[bytes, dict[int, list[int]]] = {}  # digest of a prefix -> blocks after it, their tokens
        self.prefix_of: dict[int, bytes] = {}  # block -> its key in `children`
        self.copies: list[tuple[int, int]] = []  # (source, target), before the next step
        self.suspects: set[int] = set()  # of the blocks with references
        self.to_zero: list[int] = []  # before the next step

    @property
    def num_free(self) -> int:
        return len(self.free)

    def cached(self, digests: Iterable[bytes]) -> list[int]:
        """Finds the cached blocks of the longest prefix of `digests`; takes no reference."""
        found = []
        for digest in digests:
            block = self.block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def partial_match(self, prefix: bytes, token_ids: list[int]) -> tuple[int | None, int]:
        """Finds the block after `prefix` (a digest) that has the most first tokens in common with `token_ids`.

        Returns the block and the number of these tokens; (None, 0) below MIN_COPIED.
        """
        best, most = None, MIN_COPIED - 1
        for block, cached in islice(reversed(self.children.get(prefix, {}).items()), COMPARED_BLOCKS):
            count = common_prefix_len(cached, token_ids)
            if count > most:
                best, most = block, count
        return best, most if best is not None else 0

    def pop_changes(self) -> tuple[list[int], list[tuple[int, int]]]:
        """Pops what must be done before the next step: blocks to zero, then copies (source, target)."""
        to_zero, self.to_zero = self.to_zero, []
        copies, self.copies = self.copies, []
        self.release([source for source, _ in copies])
        return to_zero, copies

    def share(self, blocks: Iterable[int]) -> None:
        """Adds a reference to each of these cached blocks."""
        for block in blocks:
            self.references[block] += 1
            self.free.pop(block, None)

    def allocate(self, count: int) -> list[int] | None:
        """Allocates `count` blocks, evicting cached ones; None if fewer are free."""
        if count > len(self.free):
            return None
        taken = []
        for _ in range(count):
            block, _ = self.free.popitem(last=False)
            self._unregister(block)
            self.references[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[int], suspect: bool = False) -> None:
        """Drops a reference to each of a sequence's blocks. suspect: they may hold NaN or infinity."""
        for block in reversed(blocks):  # the end of a sequence is evicted before its beginning
            if suspect:
                self.suspects.add(block)
                self._unregister(block)
            self.references[block] -= 1
            if self.references[block]:
                continue
            self.free[block] = None
            if block not in self.prefix_of:
                self.free.move_to_end(block, last=False)
            if block in self.suspects:
                self.suspects.remove(block)
                self.to_zero.append(block)

    def register(self, block: int, prefix: bytes, token_ids: list[int], digest: bytes | None) -> None:
        """Adds a computed block to the prefix cache; a full one only if no other block has the same tokens.

        prefix: digest of the blocks before it. digest: of the block, None if it is not full. token_ids: its tokens.
        """
        if block in self.prefix_of or digest in self.block_of:
            return
        if digest is not None:
            self.block_of[digest] = block
            self.digest_of[block] = digest
        self.children.setdefault(prefix, {})[block] = token_ids
        self.prefix_of[block] = prefix

    def _unregister(self, block: int) -> None:
        """Removes a block from the prefix cache, if it is there."""
        prefix, digest = self.prefix_of.pop(block, None), self.digest_of.pop(block, None)
        if prefix is not None:
            siblings = self.children[prefix]
            del siblings[block]
            if not siblings:
                del self.children[prefix]
        if digest is not None:
            del self.block_of[digest]


def common_prefix_len(one: list[int], other: list[int]) -> int:
    """Length of the longest common prefix of two lists."""
    shorter = min(len(one), len(other))
    return next((index for index in range(shorter) if one[index] != other[index]), shorter)
