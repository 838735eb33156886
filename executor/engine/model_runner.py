# SPDX-License-Identifier: Apache-2.0
"""Runs the model on sequences: builds what a step needs, then one forward pass.

A step's `batches` are the sequences of every group of attention ranks, this rank's own at `dp_index`. All ranks take
every step together; one whose group has nothing to do still takes part in the exchanges.
"""

from array import array
from itertools import chain

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from executor.engine.kv_cache import BLOCK_SIZE, NULL_BLOCK, blocks_for
from executor.engine.scheduler import Sequence
from models.layers.attention import KVCache
from models.layers.lm_head import ShardedLogits
from models.qwen3_moe.model import Qwen3Moe
from ops import StepMetadata
from ops.comm import ParallelContext

Batches = list[list[Sequence]]
ROW_FIELDS = 4  # numbers a row of a decode step has beside its cache blocks


class ModelRunner:
    """Prefill and decode steps, eager. Sequence parallelism is for prefills: a decode step has too few tokens."""

    def __init__(
        self,
        model: Qwen3Moe,
        kv_caches: list[KVCache],
        parallel: ParallelContext,
        sequence_parallel: bool,
        device: torch.device,
    ):
        self.model = model
        self.kv_caches = kv_caches
        self.parallel = parallel
        self.dp_index = parallel.attn_dp.index
        self.sequence_parallel = sequence_parallel
        self.device = device
        self.tokens_run = 0  # by this rank's group, since the start
        self.inputs: DecodeInputs | None = None  # of the last step, for the next one of the same shape

    def prefill(self, batches: Batches, all_positions: bool = False) -> ShardedLogits:
        """Runs whole prompts, packed. Logits of each last token, or of `all_positions`."""
        token_ids, step = self.prefill_inputs(batches)
        hidden_states, residual = self.model.forward(token_ids, step, self.kv_caches)
        if all_positions:
            return self.model.logits(hidden_states, residual, step.max_dp_tokens)
        last = step.seq_lens.cumsum(0) - 1
        return self.model.logits(hidden_states[last], residual[last], max(map(len, batches)))

    def decode(self, batches: Batches, latest: torch.Tensor | None = None) -> ShardedLogits:
        """One step of each sequence from its latest token. Logits of each.

        latest [B]: tokens of this rank's sequences that the host has not read yet; the sequences lack them.
        """
        sequences = batches[self.dp_index]
        self.tokens_run += len(sequences)
        width = max((blocks_for(length) for length in lens_of(sequences, latest)), default=0)
        shape = (len(sequences), width, [len(batch) for batch in batches])
        if self.inputs is None or self.inputs.shape != shape:
            self.inputs = DecodeInputs(*shape, self.device)
        self.inputs.fill(sequences, latest)
        return self.decode_step(self.inputs.token_ids, self.inputs.step)

    def decode_step(self, token_ids: torch.Tensor, step: StepMetadata) -> ShardedLogits:
        """token_ids [B] -> logits [B, V]."""
        return self.model.logits(*self.model.forward(token_ids, step, self.kv_caches), step.max_dp_tokens)

    def prefill_inputs(self, batches: Batches) -> tuple[torch.Tensor, StepMetadata]:
        """Token ids [T] of whole prompts, their positions and cache places. What has a row a token travels at once."""
        sequences = batches[self.dp_index]
        num_tokens = sum(map(len, sequences))
        self.tokens_run += num_tokens
        none = torch.empty(3, 0, dtype=torch.int64)
        parts = torch.cat([none, *map(token_places, sequences)], dim=1)
        aligned = F.pad(parts, (0, num_tokens % 2))  # kernels want every tensor to start at a multiple of 16 bytes
        token_ids, positions, slot_mapping = aligned.to(self.device)[:, :num_tokens]
        lens = [len(sequence) for sequence in sequences]
        used = [torch.tensor(sequence.blocks[: blocks_for(len(sequence))]) for sequence in sequences]
        table = pad_sequence(used, batch_first=True, padding_value=NULL_BLOCK) if used else none[:0]
        step = StepMetadata(
            is_prefill=True,
            positions=positions,
            slot_mapping=slot_mapping,
            block_table=table.to(self.device),
            seq_lens=self.tensor(lens),
            query_lens_list=lens,
            seq_lens_list=lens,
            dp_num_tokens=[sum(map(len, batch)) for batch in batches],
            sequence_parallel=self.sequence_parallel,
        )
        return token_ids, step

    def tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def lens_of(sequences: list[Sequence], latest: torch.Tensor | None) -> list[int]:
    """Tokens of each sequence, with the latest that it may lack."""
    return [len(sequence) + (latest is not None) for sequence in sequences]


def token_places(sequence: Sequence) -> torch.Tensor:
    """Token ids, positions and cache slots [3, N] of a prompt, made without a Python step for each token."""
    token_ids = torch.frombuffer(array("q", sequence.prompt_token_ids), dtype=torch.int64)
    positions = torch.arange(len(sequence))
    slots = torch.tensor(sequence.blocks)[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)
    return torch.stack((token_ids, positions, slots.flatten()[: len(sequence)]))


class DecodeInputs:
    """Token ids and metadata of decode steps in one tensor of the device, so that a step needs one copy to it."""

    def __init__(self, num_rows: int, width: int, dp_num_tokens: list[int], device: torch.device):
        """`width`: cache blocks of the longest sequence."""
        self.shape = (num_rows, width, dp_num_tokens)
        self.num_rows = num_rows
        self.width = width
        self.data = torch.empty(num_rows * (ROW_FIELDS + width), dtype=torch.int64, device=device)
        fields, table = self.data.split([num_rows * ROW_FIELDS, num_rows * width])
        self.token_ids, positions, slot_mapping, seq_lens = fields.view(ROW_FIELDS, num_rows)
        self.step = StepMetadata(
            is_prefill=False,
            positions=positions,
            slot_mapping=slot_mapping,
            block_table=table.view(num_rows, width),
            seq_lens=seq_lens,
            query_lens_list=[1] * num_rows,
            seq_lens_list=[1] * num_rows,
            dp_num_tokens=dp_num_tokens,
        )

    def fill(self, sequences: list[Sequence], latest: torch.Tensor | None = None) -> None:
        """Rows of the sequences' latest tokens, then rows of padding, which write to the null block.

        Padding repeats the first sequence, so that no experts are read for it but those of that one. As long as the
        null block has slots enough, each row writes to one of its own.
        """
        lens = lens_of(sequences, latest)
        padding = self.num_rows - len(sequences)
        slots = [sequence.slot(length - 1) for sequence, length in zip(sequences, lens, strict=True)]
        slots += [NULL_BLOCK * BLOCK_SIZE + row % BLOCK_SIZE for row in range(padding)]
        token_ids = [sequence.token_ids[-1] if latest is None else 0 for sequence in sequences]
        tables = []
        for sequence, length in zip(sequences, lens, strict=True):
            blocks = sequence.blocks[: blocks_for(length)]
            tables.append(blocks + [NULL_BLOCK] * (self.width - len(blocks)))
        token_ids += (token_ids[:1] or [0]) * padding
        lens += (lens[:1] or [1]) * padding
        tables += (tables[:1] or [[NULL_BLOCK] * self.width]) * padding
        values = [*token_ids, *(length - 1 for length in lens), *slots, *lens, *chain.from_iterable(tables)]
        # from ordinary memory CUDA copies a small tensor before it returns, so that nothing has to wait for the device
        self.data.copy_(torch.tensor(values, dtype=torch.int64), non_blocking=self.data.is_cuda)
        if latest is not None:
            self.token_ids[: len(sequences)] = latest
            if padding and sequences:
                self.token_ids[len(sequences) :] = latest[:1]
        self.step.seq_lens_list[:] = lens
