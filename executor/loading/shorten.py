# SPDX-License-Identifier: Apache-2.0
"""Truncation of long prompts: drops the oldest turns of a conversation, cuts the middle of texts."""

import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

from executor.loading.chat_template import RenderTimeout

Piece = tuple[int, int]  # (start, end) offsets of a span of text
MARGIN = 16  # characters left uncut at an end of a rendered message whose exact boundary is unknown
MAX_CUT = 64  # at most this many of the longest messages are cut: each costs several renderings
PRIVATE_USE = range(0xE000, 0xF900)
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
    messages: Sequence[dict[str, Any]],
    text: str,
    render: Callable[[Sequence[dict[str, Any]]], str],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Piece]:
    """Spans of the rendered `text` that may be cut: the messages' contents, as far as the template renders them.

    Assistant messages are split at added tokens and thinking tags, which are kept.
    """
    marker = next((chr(code) for code in PRIVATE_USE if chr(code) not in text), None)
    if marker is None:
        return []
    names = sorted({*tokenizer.get_added_vocab(), *THOUGHT_MARKS}, key=len, reverse=True)
    any_mark = re.compile("|".join(map(re.escape, names)))
    pieces: list[Piece] = []
    for index in sorted(range(len(messages)), key=lambda index: -len(messages[index]["content"]))[:MAX_CUT]:
        content = messages[index]["content"]

        def positions_of(offset: int, index: int = index, content: str = content) -> list[int]:
            marked = {**messages[index], "content": content[:offset] + marker + content[offset:]}
            try:
                parts = render([*messages[:index], marked, *messages[index + 1 :]]).split(marker)
            except RenderTimeout:  # how a conversation is cut must not depend on the machine's speed
                raise
            except ValueError:  # the template rejects the marked text
                return []
            return list(accumulate(map(len, parts[:-1]))) if "".join(parts) == text else []

        for start, end in shown_spans(content, text, positions_of):
            marks = any_mark.finditer(text, start, end) if messages[index]["role"] == "assistant" else ()
            bounds = [start, *(bound for mark in marks for bound in mark.span()), end]
            pieces += zip(bounds[::2], bounds[1::2], strict=True)
    pieces.sort()
    return [piece for before, piece in zip([(0, 0), *pieces], pieces, strict=False) if before[1] <= piece[0] < piece[1]]


def shown_spans(content: str, text: str, positions_of: Callable[[int], list[int]]) -> list[Piece]:
    """Spans of `text` where the template renders `content`, or a part of it, unchanged.

    positions_of: positions in `text` of a marker inserted into `content` at an offset; empty if the marker is not
    rendered or changes anything else.
    """
    for offset in probed_offsets(len(content)):
        found = positions_of(offset)
        if found:
            break
    else:
        return []
    spans = []
    for position in found:
        before = len(os.path.commonprefix([content[:offset][::-1], text[:position][::-1]]))
        after = len(os.path.commonprefix([content[offset:], text[position:]]))
        # adjacent template text may coincide with the dropped part of the content
        start = next((m for m in (0, 1, 2) if position - before + m in positions_of(offset - before + m)), MARGIN)
        end = next((m for m in (0, 1, 2) if position + after - m in positions_of(offset + after - m)), MARGIN)
        if start + end < before + after:
            spans.append((position - before + start, position + after - end))
    return spans


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
    tokenizer: PreTrainedTokenizerBase,
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


def without_middle(token_ids: list[int], keep: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Decodes the first and last tokens, `keep` in all, without replacement characters at the cut."""
    head, tail = token_ids[: keep - keep // 2], token_ids[len(token_ids) - keep // 2 :]
    replacement = "\N{REPLACEMENT CHARACTER}"
    return tokenizer.decode(head).rstrip(replacement) + tokenizer.decode(tail).lstrip(replacement)
