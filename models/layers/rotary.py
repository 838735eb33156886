# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding for all rope types of transformers, computed by transformers' own initialisers."""

import torch
from transformers import Qwen3MoeConfig

from models.transformers_internals import SCALED_ROPE_TYPES, scaled_rope_frequencies
from ops import StepMetadata

ROPE_TYPES = ("default", *SCALED_ROPE_TYPES)


def inverse_frequencies(config: Qwen3MoeConfig, seq_len: int) -> tuple[torch.Tensor, float]:
    """Computes inverse frequencies [C / 2] float32 and the attention scaling factor for a length of `seq_len`."""
    rope = config.rope_parameters
    rope_type = rope["rope_type"]
    if rope_type == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return 1.0 / rope["rope_theta"] ** exponents, 1.0
    if rope_type == "dynamic":
        return scaled_rope_frequencies(config, max(seq_len, config.max_position_embeddings))
    if rope_type == "longrope":
        # transformers computes the scaling factor once, at initialisation, without a sequence length
        return scaled_rope_frequencies(config, seq_len)[0], scaled_rope_frequencies(config)[1]
    return scaled_rope_frequencies(config)


class RotaryEmbedding:
    """Precomputed cos and sin table of `max_len` positions, indexed by a step's positions.

    Row p holds position p of a sequence of p + 1 tokens. Where the frequencies depend on the sequence length (dynamic,
    longrope), all tokens of a prompt take those of the whole prompt's length, and generated tokens their rows of the
    table, so that the values depend neither on how a prompt is divided into steps nor on whether a generated token is
    computed again.
    """

    def __init__(self, config: Qwen3MoeConfig, max_len: int, device: torch.device):
        self.config = config
        self.device = device
        rope_type = config.rope_parameters["rope_type"]
        self.trained_len = max_len  # up to this length the frequencies are constant
        if rope_type == "longrope":
            self.trained_len = min(max_len, config.rope_parameters["original_max_position_embeddings"])
        elif rope_type == "dynamic":
            self.trained_len = min(max_len, config.max_position_embeddings)
        parts = [self.cos_sin(torch.arange(self.trained_len), seq_len=self.trained_len)]
        if rope_type == "longrope":  # long_factor for all longer sequences
            parts.append(self.cos_sin(torch.arange(self.trained_len, max_len), seq_len=max_len))
        else:  # dynamic NTK: different frequencies for each length beyond the trained one
            parts += [self.cos_sin(torch.tensor([p]), seq_len=p + 1) for p in range(self.trained_len, max_len)]
        self.cos_table, self.sin_table = (torch.cat(part) for part in zip(*parts, strict=True))

    def cos_sin(self, positions: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes cos and sin [T, C] float32 on the device, for a CPU tensor `positions` [T]."""
        frequencies, factor = inverse_frequencies(self.config, seq_len)
        angles = positions[:, None].float() * frequencies.float()
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * factor).to(self.device), (angles.sin() * factor).to(self.device)

    def __call__(self, step: StepMetadata) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cos and sin [T, C] float32 of a step's tokens."""
        cos, sin = self.cos_table[step.positions], self.sin_table[step.positions]
        if step.is_decode:
            return cos, sin
        start = 0  # first row of a sequence
        for query_len, seq_len, prompt_len in zip(
            step.query_lens_list, step.seq_lens_list, step.prompt_lens_list, strict=True
        ):
            first, end = seq_len - query_len, min(seq_len, prompt_len)  # positions of its prompt tokens
            if first < end and prompt_len > self.trained_len:
                rows = slice(start, start + end - first)
                cos[rows], sin[rows] = self.cos_sin(torch.arange(first, end), prompt_len)
            start += query_len
        return cos, sin
