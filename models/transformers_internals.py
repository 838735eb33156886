# SPDX-License-Identifier: Apache-2.0
"""Adapter for the undocumented parts of transformers that the project depends on."""

from typing import TYPE_CHECKING

import torch
from transformers import ROPE_INIT_FUNCTIONS, Qwen3MoeConfig, RopeParameters

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedModel

# Rope types that `scaled_rope_frequencies` supports; transformers documents no list of them.
SCALED_ROPE_TYPES = tuple(ROPE_INIT_FUNCTIONS)
# Keys that any rope type reads: the TypedDict is documented, its annotations are not.
ROPE_PARAMETER_KEYS = frozenset(RopeParameters.__annotations__)


def scaled_rope_frequencies(config: Qwen3MoeConfig, seq_len: int | None = None) -> tuple[torch.Tensor, float]:
    """Computes RoPE inverse frequencies [C / 2] float32, and the attention scaling factor that multiplies cos and sin.

    Some rope types depend on `seq_len`. Bitwise equal to transformers' models, as it calls the same functions.
    """
    return ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, torch.device("cpu"), seq_len=seq_len)


def compute_rope_buffers(model: "PreTrainedModel", device: torch.device) -> None:
    """Computes the non-persistent rotary buffers of a model created on the meta device: no state dict contains them."""
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
