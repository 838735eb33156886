# SPDX-License-Identifier: Apache-2.0
"""cos and sin do not depend on how a sequence is divided into steps, for rope types of any kind."""

import random

import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from models.layers.rotary import RotaryEmbedding
from ops.step import Span, blocks_for, step_inputs
from tests.checkpoints import TINY

MAX_LEN = 200
GENERATED = 9
TRAINED_LEN = 32  # up to it the frequencies of every type are constant
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": TRAINED_LEN,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
}
TYPES = {
    "default": {},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED_LEN}},
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0},
        "max_position_embeddings": TRAINED_LEN,
    },
    "longrope": {"rope_parameters": LONGROPE, "max_position_embeddings": 128},
}
PROMPT_LENS = (20, 30, TRAINED_LEN, TRAINED_LEN + 1, 150)


def make_rotary(rope: str) -> tuple[RotaryEmbedding, Qwen3MoeConfig]:
    config = Qwen3MoeConfig(**{**TINY, **TYPES[rope]})
    return RotaryEmbedding(config, MAX_LEN, torch.device("cpu")), config


def rows(rotary: RotaryEmbedding, *parts: tuple[int, int, int], is_decode: bool = False) -> torch.Tensor:
    """cos and sin [2, T, C] of a step with parts (first position, one past the last, prompt length) of sequences."""
    spans = [Span(first, end - first, list(range(1, 1 + blocks_for(end))), prompt) for first, end, prompt in parts]
    _, step = step_inputs(spans, [[]] * len(spans), "cpu", is_decode=is_decode)
    return torch.stack(rotary(step))


def decoded(rotary: RotaryEmbedding, prompt_len: int) -> torch.Tensor:
    """cos and sin of tokens generated one by one."""
    ends = range(prompt_len + 1, prompt_len + GENERATED + 1)
    return torch.cat([rows(rotary, (end - 1, end, prompt_len), is_decode=True) for end in ends], dim=1)


@pytest.mark.parametrize("prompt_len", PROMPT_LENS)
@pytest.mark.parametrize("rope", TYPES)
def test_values_are_those_of_transformers(rope, prompt_len):
    """One forward pass over the prompt, then one for each token."""
    rotary, config = make_rotary(rope)
    theirs = []
    for first, end in [(0, prompt_len), *((p, p + 1) for p in range(prompt_len, prompt_len + GENERATED))]:
        reference = Qwen3MoeRotaryEmbedding(config)
        theirs.append(torch.stack(reference(torch.ones(1), torch.arange(first, end)[None]))[:, 0])
    ours = torch.cat([rows(rotary, (0, prompt_len, prompt_len)), decoded(rotary, prompt_len)], dim=1)
    torch.testing.assert_close(ours, torch.cat(theirs, dim=1))


@pytest.mark.parametrize("prompt_len", PROMPT_LENS)
@pytest.mark.parametrize("rope", TYPES)
def test_chunks_equal_the_whole_prompt(rope, prompt_len):
    """Each chunk stands between a decode token and a chunk of another prompt."""
    rotary, _ = make_rotary(rope)
    cuts = [0, *sorted(random.sample(range(1, prompt_len), 3)), prompt_len]
    before, after = (40, 41, 40), (50, 61, 120)
    chunks = []
    for first, end in zip(cuts, cuts[1:], strict=False):
        chunk = rows(rotary, before, (first, end, prompt_len), after)
        assert torch.equal(chunk[:, :1], rows(rotary, before, is_decode=True))
        assert torch.equal(chunk[:, 1 + end - first :], rows(rotary, after))
        chunks.append(chunk[:, 1 : 1 + end - first])
    assert torch.equal(torch.cat(chunks, dim=1), rows(rotary, (0, prompt_len, prompt_len)))


@pytest.mark.parametrize("prompt_len", PROMPT_LENS)
@pytest.mark.parametrize("rope", TYPES)
def test_a_recomputed_sequence_equals_the_decoded_one(rope, prompt_len):
    """Prompt and generated tokens in one step, and divided within the prompt, at its end and behind it."""
    rotary, _ = make_rotary(rope)
    end = prompt_len + GENERATED
    expected = torch.cat([rows(rotary, (0, prompt_len, prompt_len)), decoded(rotary, prompt_len)], dim=1)
    assert torch.equal(rows(rotary, (0, end, prompt_len)), expected)
    for cut in (random.randrange(1, prompt_len), prompt_len, random.randrange(prompt_len + 1, end)):
        parts = [rows(rotary, (0, cut, prompt_len)), rows(rotary, (cut, end, prompt_len))]
        assert torch.equal(torch.cat(parts, dim=1), expected)


def test_a_step_without_tokens():
    rotary, _ = make_rotary("dynamic")
    assert rows(rotary).shape == (2, 0, TINY["head_dim"])
