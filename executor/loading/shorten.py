# SPDX-License-Identifier: Apache-2.0
"""Truncation of long prompts: drops the oldest turns of a conversation, cuts the middle of texts."""

import os
import re
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Generator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from executor.loading.chat_template import RenderTimeout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Piece = tuple[int, int]  # (start, end) offsets of a span of text
Render = Callable[[Sequence[dict[str, Any]]], str]
MARGIN = 16  # characters left uncut at an end of a rendered message whose exact boundary is unknown
MAX_HALVED = 32  # groups of messages, for each offset: two renderings each
PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
ANY_PRIVATE_USE = re.compile("([\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd])")
THOUGHT_MARKS = ("<think>", "</think>")


def oldest_turns(messages: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Turns before the last user message, oldest first, as lists of message indices.

    A turn is a user message and what follows it, so that roles still alternate after it is dropped. System messages
    are in no turn. Tool results given as user messages start no turn: they stay with the call.
    """
    starts = [
        index
        for index, message in enumerate(messages)
        if message["role"] == "user" and not message["content"].lstrip().startswith("<tool_response>")
    ] or list(range(len(messages)))
    turns: list[list[int]] = []
    for index in range(starts[-1]):
        if messages[index]["role"] not in ("system", "developer"):
            if not turns or index in starts:
                turns.append([])
            turns[-1].append(index)
    return turns


def fewest_turns_left_out(
    messages: Sequence[dict[str, Any]], fits: Callable[[Sequence[dict[str, Any]]], bool]
) -> tuple[Sequence[dict[str, Any]], int, int]:
    """Drops the fewest oldest turns that make the messages fit, or all.

    Returns the remaining messages, the number of dropped turns, and that of all turns.
    """
    turns = oldest_turns(messages)

    def without(count: int) -> list[dict[str, Any]]:
        left_out = {index for turn in turns[:count] for index in turn}
        return [message for index, message in enumerate(messages) if index not in left_out]

    count = bisect_left(range(len(turns)), True, key=lambda count: fits(without(count)))
    return without(count), count, len(turns)


def shown_pieces(
    messages: Sequence[dict[str, Any]], text: str, render: Render, tokenizer: "PreTrainedTokenizerBase"
) -> list[Piece]:
    """Spans of the rendered `text` that may be cut: the messages' contents, as far as the template renders them.

    Assistant messages are split at added tokens and thinking tags, which are kept. All messages are searched at once,
    so that the number of renderings hardly depends on that of the messages.
    """
    marking = Marking(messages, text, render)
    searches = {index: shown_spans(messages[index]["content"], text) for index in marking.markers}
    spans: dict[int, list[Piece]] = {}
    answers: dict[int, list[int]] = {}
    while searches:
        offsets: dict[int, int] = {}
        for index, search in list(searches.items()):
            try:
                offsets[index] = search.send(answers[index]) if answers else next(search)
            except StopIteration as ended:
                spans[index] = ended.value
                del searches[index]
        answers = marking.positions(offsets)
    names = sorted({*tokenizer.get_added_vocab(), *THOUGHT_MARKS}, key=len, reverse=True)
    any_mark = re.compile("|".join(map(re.escape, names)))
    pieces: list[Piece] = []
    for index, found in spans.items():
        for start, end in found:
            marks = any_mark.finditer(text, start, end) if messages[index]["role"] == "assistant" else ()
            bounds = [start, *(bound for mark in marks for bound in mark.span()), end]
            pieces += zip(bounds[::2], bounds[1::2], strict=True)
    pieces.sort()
    return [piece for before, piece in zip([(0, 0), *pieces], pieces, strict=False) if before[1] <= piece[0] < piece[1]]


class Marking:
    """Finds where the template renders messages, by a marker in each: a character that `text` does not have."""

    def __init__(self, messages: Sequence[dict[str, Any]], text: str, render: Render):
        self.messages = messages
        self.text = text
        self.render = render
        used = set(text)
        free = (chr(code) for code in chain(*PRIVATE_USE) if chr(code) not in used)
        self.markers = dict(zip(range(len(messages)), free, strict=False))
        self.index_of = {marker: index for index, marker in self.markers.items()}

    def positions(self, offsets: dict[int, int]) -> dict[int, list[int]]:
        """Positions in `text` of markers inserted into the messages' contents.

        offsets: message index -> offset in its content. Returns message index -> positions; none for a marker that is
        not rendered or changes anything else. Groups with such a marker are halved, at most MAX_HALVED of them.
        """
        kinds = {index: (self.messages[index]["role"], self.messages[index]["content"][:MARGIN]) for index in offsets}
        groups = deque([sorted(offsets, key=kinds.__getitem__)] if offsets else [])  # a template treats a kind alike
        found: dict[int, list[int]] = {}
        halved = 0
        while groups:
            group = groups.popleft()
            answer = self._positions_if_unchanged({index: offsets[index] for index in group})
            if answer is None and len(group) > 1 and halved < MAX_HALVED:
                halved += 1
                groups += [group[: len(group) // 2], group[len(group) // 2 :]]
            else:
                found |= answer or {index: [] for index in group}
        return found

    def _positions_if_unchanged(self, offsets: dict[int, int]) -> dict[int, list[int]] | None:
        """`positions` of one rendering; None if a marker changes anything else."""
        marked = list(self.messages)
        for index, offset in offsets.items():
            content = marked[index]["content"]
            marked[index] = {**marked[index], "content": content[:offset] + self.markers[index] + content[offset:]}
        try:
            rendered = self.render(marked)
        except RenderTimeout:  # how a conversation is cut must not depend on the machine's speed
            raise
        except ValueError:  # the template rejects the marked text
            return None
        found: dict[int, list[int]] = {index: [] for index in offsets}
        parts, length = [], 0
        for part in ANY_PRIVATE_USE.split(rendered):
            if part in self.index_of:
                found[self.index_of[part]].append(length)
            else:
                parts.append(part)
                length += len(part)
        return found if "".join(parts) == self.text else None


def shown_spans(content: str, text: str) -> Generator[int, list[int], list[Piece]]:
    """Spans of `text` where the template renders `content`, or a part of it, unchanged.

    Yields offsets in `content`; takes the positions in `text` of a marker inserted there, as `Marking.positions`.
    """
    found: list[int] = []
    offset = 0
    for offset in probed_offsets(len(content)):
        found = yield offset
        if found:
            break
    spans = []
    for position in found:
        shown = text[max(0, position - offset) : position], text[position : position + len(content) - offset]
        before = len(os.path.commonprefix([content[:offset][::-1], shown[0][::-1]]))
        after = len(os.path.commonprefix([content[offset:], shown[1]]))
        # adjacent template text may coincide with the dropped part of the content
        start = yield from margin([(offset - before + m, position - before + m) for m in (0, 1, 2)])
        end = yield from margin([(offset + after - m, position + after - m) for m in (0, 1, 2)])
        if start + end < before + after:
            spans.append((position - before + start, position + after - end))
    return spans


def margin(probes: list[tuple[int, int]]) -> Generator[int, list[int], int]:
    """Number of the first (offset in a content, position in the text) that belong together, MARGIN if none do."""
    for number, (offset, position) in enumerate(probes):
        if position in (yield offset):
            return number
    return MARGIN


def probed_offsets(length: int) -> list[int]:
    """Offsets to probe in a text: its middle, then towards its end (after any thinking), then its beginning."""
    shares = [length >> shift for shift in range(1, length.bit_length())]
    return [*(length - share for share in shares), *shares]


def shorten(
    text: str,
    token_ids: list[int],
    pieces: Sequence[Piece],
    limit: int,
    encode: Callable[[str], list[int]],
    tokenizer: "PreTrainedTokenizerBase",
) -> tuple[list[int], int]:
    """Cuts the middles of the longest pieces of `text` until it has at most `limit` tokens.

    token_ids: those of the whole text. Returns the remaining tokens and the number of pieces cut; more than `limit`
    tokens, or none, if the pieces are too short.
    """
    parts = [tokenizer.encode(text[start:end], add_special_tokens=False) for start, end in pieces]
    budget, cut = sum(map(len, parts)), 0
    while len(token_ids) > limit:
        budget -= len(token_ids) - limit
        level = longest_allowed([len(part) for part in parts], budget)
        if level < 1:
            break
        shortened, cut, last = [], 0, 0
        for (start, end), part in zip(pieces, parts, strict=True):
            if len(part) > level:
                shortened += [text[last:start], without_middle(part, level, tokenizer)]
                last, cut = end, cut + 1
        token_ids = encode("".join([*shortened, text[last:]]))
        budget = sum(min(len(part), level) for part in parts)
    return token_ids, cut


def longest_allowed(lengths: Sequence[int], budget: int) -> int:
    """Largest n for which the sum of the lengths, each capped at n, is within `budget`."""
    return bisect_right(range(max(lengths, default=0)), budget, key=lambda n: sum(min(m, n) for m in lengths)) - 1


def without_middle(token_ids: list[int], keep: int, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Decodes the first and last tokens, `keep` in all, without replacement characters at the cut."""
    head, tail = token_ids[: keep - keep // 2], token_ids[len(token_ids) - keep // 2 :]
    replacement = "\N{REPLACEMENT CHARACTER}"
    return tokenizer.decode(head).rstrip(replacement) + tokenizer.decode(tail).lstrip(replacement)
