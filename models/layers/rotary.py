# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding for all rope types of transformers, computed by transformers' own initialisers."""

import torch
from transformers import Qwen3MoeConfig

from models.transformers_internals import SCALED_ROPE_TYPES, scaled_rope_frequencies
from ops import StepMetadata

ROPE_TYPES = ("default", *SCALED_ROPE_TYPES)
LENGTH_DEPENDENT_ROPE_TYPES = ("dynamic", "longrope")  # frequencies depend on the sequence length


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

    Row p holds position p of a sequence of p + 1 tokens, as decode needs under any rope type. Where the frequencies
    depend on the sequence length (dynamic, longrope), a prefill's earlier positions differ from their rows, so prefill
    computes cos and sin instead.
    """

    def __init__(self, config: Qwen3MoeConfig, max_len: int, device: torch.device):
        self.config = config
        self.device = device
        self.length_dependent = config.rope_parameters["rope_type"] in LENGTH_DEPENDENT_ROPE_TYPES
        parts = [self.cos_sin(torch.arange(max_len), seq_len=max_len)]
        if config.rope_parameters["rope_type"] == "longrope":  # long_factor for all longer sequences
            trained = min(max_len, config.rope_parameters["original_max_position_embeddings"])
            parts = [self.cos_sin(torch.arange(trained), seq_len=trained)]
            parts.append(self.cos_sin(torch.arange(trained, max_len), seq_len=max_len))
        elif self.length_dependent:  # dynamic NTK: different frequencies for each length beyond the trained one
            trained = min(max_len, config.max_position_embeddings)
            parts = [self.cos_sin(torch.arange(trained), seq_len=trained)]
            parts += [self.cos_sin(torch.tensor([p]), seq_len=p + 1) for p in range(trained, max_len)]
        self.cos_table, self.sin_table = (torch.cat(part) for part in zip(*parts, strict=True))

    def cos_sin(self, positions: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes cos and sin [T, C] float32 on the device, for a CPU tensor `positions` [T]."""
        frequencies, factor = inverse_frequencies(self.config, seq_len)
        angles = positions[:, None].float() * frequencies.float()
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * factor).to(self.device), (angles.sin() * factor).to(self.device)

    def __call__(self, step: StepMetadata) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cos and sin [T, C] float32 of a step's tokens."""
        if step.is_prefill and self.length_dependent:
            sequences = [self.cos_sin(torch.arange(seq_len), seq_len) for seq_len in step.seq_lens_list]
            cos, sin = (torch.cat(part) for part in zip(*sequences, strict=True))
            return cos, sin
        return self.cos_table[step.positions], self.sin_table[step.positions]
