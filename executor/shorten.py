# SPDX-License-Identifier: Apache-2.0
"""Prompts that are too long: which turns of a conversation are left out, and which text loses its middle."""

import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

Piece = tuple[int, int]  # start and end of a part of a text
MARGIN = 16  # characters at an end of a message's text that stay where it cannot be tested where the text begins
MAX_CUT = 64  # messages whose text may be cut, the longest ones: each has to be rendered several times
PRIVATE_USE = range(0xE000, 0xF900)
THOUGHT_MARKS = ("<think>", "</think>")


def oldest_turns(messages: Sequence[dict[str, Any]]) -> list[list[int]]:
    """The turns before the last user message, oldest first, as indices of messages.

    A turn is a user message with what follows it, so that roles still alternate where it is left out. System messages
    belong to none. Tool results that are given as user messages begin none: what asked for them stays with them.
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
    """The messages without as few of the oldest turns as make them fit, or without all; how many those are, of how
    many."""
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
    """Where in the rendered `text` stands what may be cut: the messages' texts as far as the template shows them.

    In answers, the tokenizer's added tokens and the marks of thoughts separate pieces: a template may show thoughts.
    """
    marker = next((chr(code) for code in PRIVATE_USE if chr(code) not in text), None)
    if marker is None:
        return []
    names = sorted({*tokenizer.get_added_vocab(), *THOUGHT_MARKS}, key=len, reverse=True)
    any_mark = re.compile("|".join(map(re.escape, names)))
    pieces: list[Piece] = []
    for index in sorted(range(len(messages)), key=lambda index: -len(messages[index]["content"]))[:MAX_CUT]:
        content = messages[index]["content"]

        def places(offset: int, index: int = index, content: str = content) -> list[int]:
            marked = {**messages[index], "content": content[:offset] + marker + content[offset:]}
            try:
                parts = render([*messages[:index], marked, *messages[index + 1 :]]).split(marker)
            except ValueError:  # the template does not take such a text
                return []
            return list(accumulate(map(len, parts[:-1]))) if "".join(parts) == text else []

        for start, end in shown_spans(content, text, places):
            marks = any_mark.finditer(text, start, end) if messages[index]["role"] == "assistant" else ()
            bounds = [start, *(bound for mark in marks for bound in mark.span()), end]
            pieces += zip(bounds[::2], bounds[1::2], strict=True)
    pieces.sort()
    return [piece for before, piece in zip([(0, 0), *pieces], pieces, strict=False) if before[1] <= piece[0] < piece[1]]


def shown_spans(content: str, text: str, places: Callable[[int], list[int]]) -> list[Piece]:
    """Where `content`, or the part of it that the template shows, stands in `text`.

    places: where in `text` a character put into `content` at an offset appears; nowhere, if it is not shown there or
    changes anything else. So whatever a template does with a text, only what it shows unchanged counts.
    """
    for offset in probed_offsets(len(content)):
        found = places(offset)
        if found:
            break
    else:
        return []
    spans = []
    for place in found:
        before = len(os.path.commonprefix([content[:offset][::-1], text[:place][::-1]]))
        after = len(os.path.commonprefix([content[offset:], text[place:]]))
        # what the template wrote beside the text may look like the part of the text that it left out
        start = next((m for m in (0, 1, 2) if place - before + m in places(offset - before + m)), MARGIN)
        end = next((m for m in (0, 1, 2) if place + after - m in places(offset + after - m)), MARGIN)
        if start + end < before + after:
            spans.append((place - before + start, place + after - end))
    return spans


def probed_offsets(length: int) -> list[int]:
    """Offsets in a text of `length`: its middle, then ever nearer to its end, where thoughts are over, and its
    beginning."""
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
    """Tokens of `text` after its longest pieces have lost as much of their middles as makes it fit into `limit`, and
    the number of pieces cut. If there is not enough to cut, the tokens are more than `limit` or none.

    token_ids: of the whole text, as `encode` makes them.
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
    """The largest length to which all longer ones can be cut so that the sum is within `budget`."""
    return bisect_right(range(max(lengths, default=0)), budget, key=lambda n: sum(min(m, n) for m in lengths)) - 1


def without_middle(token_ids: list[int], keep: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of the first and last of `keep` tokens, without the marks of characters whose bytes were cut."""
    head, tail = token_ids[: keep - keep // 2], token_ids[len(token_ids) - keep // 2 :]
    replacement = "\N{REPLACEMENT CHARACTER}"
    return tokenizer.decode(head).rstrip(replacement) + tokenizer.decode(tail).lstrip(replacement)
