# SPDX-License-Identifier: Apache-2.0
"""Reference-counted blocks of the KV cache, and the prefix cache: blocks found again by the hash of their tokens."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from ops.step import BLOCK_SIZE, NULL_BLOCK


def block_digest(previous: bytes, token_ids: Sequence[int]) -> bytes:
    """Digest of a full block's tokens and, by the previous block's digest (b"" for none), of all tokens before it."""
    assert len(token_ids) == BLOCK_SIZE
    return hashlib.sha256(previous + array("q", token_ids).tobytes()).digest()


class BlockPool:
    """Blocks of one attention DP group's cache.

    A block without references keeps its tokens until it is evicted, least recently used first. A block whose contents
    may not be finite is listed in `to_zero` when it becomes free: attention multiplies masked positions by 0, and 0
    times NaN is NaN.
    """

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self.references = [0] * (num_blocks + 1)
        # without references, in order of eviction
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(NULL_BLOCK + 1, num_blocks + 1))
        self.block_of: dict[bytes, int] = {}
        self.digest_of: dict[int, bytes] = {}
        self.suspects: set[int] = set()
        self.to_zero: list[int] = []

    @property
    def num_free(self) -> int:
        return len(self.free)

    def cached(self, digests: Iterable[bytes]) -> list[int]:
        """Blocks of the longest prefix of `digests` that is in the cache."""
        found = []
        for digest in digests:
            block = self.block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, blocks: Iterable[int]) -> None:
        """Adds a reference to each of these cached blocks."""
        for block in blocks:
            self.references[block] += 1
            self.free.pop(block, None)

    def take(self, count: int) -> list[int] | None:
        """Allocates `count` blocks, evicting cached ones; None if fewer are free."""
        if count > len(self.free):
            return None
        taken = []
        for _ in range(count):
            block, _ = self.free.popitem(last=False)
            self._forget(block)
            self.references[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[int], suspect: bool = False) -> None:
        """Drops a reference to each of a sequence's blocks. suspect: they may hold NaN or infinity."""
        for block in reversed(blocks):  # the end of a sequence is evicted before its beginning
            if suspect:
                self.suspects.add(block)
                self._forget(block)
            self.references[block] -= 1
            if self.references[block]:
                continue
            self.free[block] = None
            if block not in self.digest_of:
                self.free.move_to_end(block, last=False)
            if block in self.suspects:
                self.suspects.remove(block)
                self.to_zero.append(block)

    def register(self, block: int, digest: bytes) -> None:
        """Makes a full, computed block available to other sequences, unless another block has the same tokens."""
        if digest not in self.block_of and block not in self.digest_of:
            self.block_of[digest] = block
            self.digest_of[block] = digest

    def _forget(self, block: int) -> None:
        digest = self.digest_of.pop(block, None)
        if digest is not None:
            del self.block_of[digest]
