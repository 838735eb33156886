# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding in every form transformers has, computed by transformers' own initialisers."""

import torch
from transformers import Qwen3MoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ops import StepMetadata

ROPE_TYPES = ("default", *ROPE_INIT_FUNCTIONS)
LENGTH_DEPENDENT_ROPE_TYPES = ("dynamic", "longrope")  # the frequencies follow from how long the sequence is


def inverse_frequencies(config: Qwen3MoeConfig, seq_len: int) -> tuple[torch.Tensor, float]:
    """Frequencies [C / 2] float32 and the factor on cos and sin, for a sequence of `seq_len` tokens."""
    rope = config.rope_parameters
    rope_type = rope["rope_type"]
    if rope_type == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return 1.0 / rope["rope_theta"] ** exponents, 1.0
    initialise = ROPE_INIT_FUNCTIONS[rope_type]
    if rope_type == "dynamic":
        return initialise(config, torch.device("cpu"), seq_len=max(seq_len, config.max_position_embeddings))
    if rope_type == "longrope":
        # transformers takes the factor on cos and sin from the short form and keeps it
        factor = initialise(config, torch.device("cpu"))[1]
        return initialise(config, torch.device("cpu"), seq_len=seq_len)[0], factor
    return initialise(config, torch.device("cpu"))


class RotaryEmbedding:
    """Looks up cos and sin of a step's positions in a table of `max_len` rows.

    Row p holds position p of a sequence of p + 1 tokens: what decode needs under any rope type. Where the frequencies
    depend on the length, a prefill's earlier positions differ from the table and are computed.
    """

    def __init__(self, config: Qwen3MoeConfig, max_len: int, device: torch.device):
        self.config = config
        self.device = device
        self.length_dependent = config.rope_parameters["rope_type"] in LENGTH_DEPENDENT_ROPE_TYPES
        parts = [self.cos_sin(torch.arange(max_len), seq_len=max_len)]
        if config.rope_parameters["rope_type"] == "longrope":  # one set of frequencies for all longer sequences
            trained = min(max_len, config.rope_parameters["original_max_position_embeddings"])
            parts = [self.cos_sin(torch.arange(trained), seq_len=trained)]
            parts.append(self.cos_sin(torch.arange(trained, max_len), seq_len=max_len))
        elif self.length_dependent:  # others for every length beyond the trained one
            trained = min(max_len, config.max_position_embeddings)
            parts = [self.cos_sin(torch.arange(trained), seq_len=trained)]
            parts += [self.cos_sin(torch.tensor([p]), seq_len=p + 1) for p in range(trained, max_len)]
        self.cos_table, self.sin_table = (torch.cat(part) for part in zip(*parts, strict=True))

    def cos_sin(self, positions: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, C] float32 of `positions` [T] (on the CPU), on the device."""
        frequencies, factor = inverse_frequencies(self.config, seq_len)
        angles = positions[:, None].float() * frequencies.float()
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * factor).to(self.device), (angles.sin() * factor).to(self.device)

    def __call__(self, step: StepMetadata) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, C] float32 of a step's tokens."""
        if step.is_prefill and self.length_dependent:
            sequences = [self.cos_sin(torch.arange(seq_len), seq_len) for seq_len in step.seq_lens_list]
            cos, sin = (torch.cat(part) for part in zip(*sequences, strict=True))
            return cos, sin
        return self.cos_table[step.positions], self.sin_table[step.positions]
