# SPDX-License-Identifier: Apache-2.0
"""Runs the model on sequences: builds what a step needs, then one forward pass.

A step's `batches` are the sequences of every group of attention ranks, this rank's own at `dp_index`. All ranks take
every step together; one whose group has nothing to do still takes part in the exchanges.
"""

import torch

from executor.kv_cache import NULL_BLOCK, blocks_for
from executor.scheduler import Sequence
from models.layers.attention import KVCache
from models.layers.lm_head import ShardedLogits
from models.qwen3_moe.model import Qwen3Moe
from ops import StepMetadata

Batches = list[list[Sequence]]


class ModelRunner:
    """Prefill and decode steps, eager. Sequence parallelism is for prefills: a decode step has too few tokens."""

    def __init__(
        self, model: Qwen3Moe, kv_caches: list[KVCache], dp_index: int, sequence_parallel: bool, device: torch.device
    ):
        self.model = model
        self.kv_caches = kv_caches
        self.dp_index = dp_index
        self.sequence_parallel = sequence_parallel
        self.device = device
        self.tokens_run = 0  # by this rank's group, since the start

    def prefill(self, batches: Batches, all_positions: bool = False) -> ShardedLogits:
        """Runs whole prompts, packed. Logits of each last token, or of `all_positions`."""
        query_lens = [[len(sequence) for sequence in batch] for batch in batches]
        own = query_lens[self.dp_index]
        token_ids = [token_id for sequence in batches[self.dp_index] for token_id in sequence.prompt_token_ids]
        step = self.step_metadata(batches, query_lens, is_prefill=True)
        hidden_states, residual = self.model.forward(self.tensor(token_ids), step, self.kv_caches)
        if all_positions:
            return self.model.logits(hidden_states, residual, step.max_dp_tokens)
        last = self.tensor(own).cumsum(0) - 1
        return self.model.logits(hidden_states[last], residual[last], max(map(len, batches)))

    def decode(self, batches: Batches) -> ShardedLogits:
        """One step of each sequence from its latest token. Logits of each."""
        token_ids = self.tensor([sequence.token_ids[-1] for sequence in batches[self.dp_index]])
        step = self.step_metadata(batches, [[1] * len(batch) for batch in batches], is_prefill=False)
        return self.decode_step(token_ids, step)

    def decode_step(self, token_ids: torch.Tensor, step: StepMetadata) -> ShardedLogits:
        """token_ids [B] -> logits [B, V]."""
        return self.model.logits(*self.model.forward(token_ids, step, self.kv_caches), step.max_dp_tokens)

    def step_metadata(self, batches: Batches, query_lens: list[list[int]], is_prefill: bool) -> StepMetadata:
        """Positions and cache places of the last `query_lens` tokens of each sequence."""
        sequences, own = batches[self.dp_index], query_lens[self.dp_index]
        self.tokens_run += sum(own)
        positions = [range(len(s) - n, len(s)) for s, n in zip(sequences, own, strict=True)]
        slots = [s.slot(p) for s, row in zip(sequences, positions, strict=True) for p in row]
        seq_lens = [len(sequence) for sequence in sequences]
        return StepMetadata(
            is_prefill=is_prefill,
            positions=self.tensor([p for row in positions for p in row]),
            slot_mapping=self.tensor(slots),
            block_table=self.tensor(self.block_table(sequences)),
            seq_lens=self.tensor(seq_lens),
            query_lens_list=own,
            seq_lens_list=seq_lens,
            dp_num_tokens=[sum(lens) for lens in query_lens],
            sequence_parallel=is_prefill and self.sequence_parallel,
        )

    def block_table(self, sequences: list[Sequence]) -> list[list[int]]:
        """The blocks each sequence uses by now, rows filled up with the null block."""
        used = [sequence.blocks[: blocks_for(len(sequence))] for sequence in sequences]
        width = max(map(len, used), default=0)
        return [blocks + [NULL_BLOCK] * (width - len(blocks)) for blocks in used]

    def tensor(self, values: list) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)
