# SPDX-License-Identifier: Apache-2.0
"""Runs the model on sequences: builds what a step needs, then one forward pass."""

import torch

from executor.kv_cache import NULL_BLOCK, KVCache, blocks_for
from executor.scheduler import Sequence
from models.qwen3_moe.model import Qwen3Moe
from ops import StepMetadata


class ModelRunner:
    """Prefill and decode steps, eager."""

    def __init__(self, model: Qwen3Moe, cache: KVCache, device: torch.device):
        self.model = model
        self.cache = cache
        self.device = device

    def prefill(self, sequences: list[Sequence], all_positions: bool = False) -> torch.Tensor:
        """Runs whole prompts, packed. Logits float32 of each last token [B, V], or of `all_positions` [T, V]."""
        token_ids = [token_id for sequence in sequences for token_id in sequence.prompt_token_ids]
        query_lens = [len(sequence.prompt_token_ids) for sequence in sequences]
        step = self.step_metadata(sequences, query_lens, is_prefill=True)
        hidden_states, residual = self.model.forward(self.tensor(token_ids), step, self.cache.layers)
        if not all_positions:
            last = self.tensor(query_lens).cumsum(0) - 1
            hidden_states, residual = hidden_states[last], residual[last]
        return self.model.logits(hidden_states, residual)

    def decode(self, sequences: list[Sequence]) -> torch.Tensor:
        """One step of each sequence from its latest token. Logits [B, V] float32."""
        token_ids = self.tensor([sequence.token_ids[-1] for sequence in sequences])
        step = self.step_metadata(sequences, [1] * len(sequences), is_prefill=False)
        return self.decode_step(token_ids, step)

    def decode_step(self, token_ids: torch.Tensor, step: StepMetadata) -> torch.Tensor:
        """token_ids [B] -> logits [B, V] float32."""
        return self.model.logits(*self.model.forward(token_ids, step, self.cache.layers))

    def step_metadata(self, sequences: list[Sequence], query_lens: list[int], is_prefill: bool) -> StepMetadata:
        """Positions and cache places of the last `query_lens` tokens of each sequence."""
        positions = [range(len(s) - n, len(s)) for s, n in zip(sequences, query_lens, strict=True)]
        slots = [s.slot(p) for s, row in zip(sequences, positions, strict=True) for p in row]
        seq_lens = [len(sequence) for sequence in sequences]
        return StepMetadata(
            is_prefill=is_prefill,
            positions=self.tensor([p for row in positions for p in row]),
            slot_mapping=self.tensor(slots),
            block_table=self.tensor(self.block_table(sequences)),
            seq_lens=self.tensor(seq_lens),
            query_lens_list=query_lens,
            seq_lens_list=seq_lens,
        )

    def block_table(self, sequences: list[Sequence]) -> list[list[int]]:
        """The blocks each sequence uses by now, rows filled up with the null block."""
        used = [sequence.blocks[: blocks_for(len(sequence))] for sequence in sequences]
        width = max(len(blocks) for blocks in used)
        return [blocks + [NULL_BLOCK] * (width - len(blocks)) for blocks in used]

    def tensor(self, values: list) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)
