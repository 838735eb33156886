# SPDX-License-Identifier: Apache-2.0
"""Decode steps replayed from captured graphs: the same step as eager, without its launch costs."""

import dataclasses

import torch

from executor.kv_cache import NULL_BLOCK, blocks_for
from executor.model_runner import Batches, ModelRunner
from models.layers.attention import KVCache
from models.layers.lm_head import ShardedLogits
from models.qwen3_moe.model import Qwen3Moe
from ops import StepMetadata
from ops.comm import ParallelContext, Traffic

WARMUP_STEPS = 2  # run before capture, so that one-time work of libraries is not recorded


class GraphRunner(ModelRunner):
    """Captures one graph a batch size (1, 2, 4, ... up to the largest); a batch in between is padded to the next.

    Where the groups of attention ranks have batches of different sizes, all take the largest one's graph. Sequences
    that grow beyond `max_len` tokens take eager steps.
    """

    def __init__(
        self,
        model: Qwen3Moe,
        kv_caches: list[KVCache],
        dp_index: int,
        sequence_parallel: bool,
        device: torch.device,
        parallel: ParallelContext,
        batch_size: int,
        max_len: int,
    ):
        super().__init__(model, kv_caches, dp_index, sequence_parallel, device)
        self.dp_size = parallel.attn_dp.size
        self.traffic = parallel.traffic
        self.max_blocks = blocks_for(max_len)
        self.pool = torch.cuda.graph_pool_handle()
        sizes = {batch_size} | {2**i for i in range(batch_size.bit_length())}
        self.graphs = {size: self.capture(size) for size in sorted(sizes, reverse=True)}

    def capture(self, batch_size: int) -> "DecodeGraph":
        """Records a decode step of `batch_size` padding rows."""
        token_ids = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        step = StepMetadata(
            is_prefill=False,
            positions=torch.zeros_like(token_ids),
            slot_mapping=torch.zeros_like(token_ids),
            block_table=torch.full((batch_size, self.max_blocks), NULL_BLOCK, device=self.device),
            seq_lens=torch.ones_like(token_ids),
            query_lens_list=[1] * batch_size,
            seq_lens_list=[1] * batch_size,
            dp_num_tokens=[batch_size] * self.dp_size,
        )
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(WARMUP_STEPS):
                self.decode_step(token_ids, step)
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        before = dict(self.traffic.sent_bytes)
        with torch.cuda.graph(graph, pool=self.pool):
            logits = super().decode_step(token_ids, step)
        return DecodeGraph(graph, token_ids, step, logits, self.traffic, self.traffic.since(before))

    def decode(self, batches: Batches) -> ShardedLogits:
        longest = max(len(sequence) for batch in batches for sequence in batch)
        if blocks_for(longest) > self.max_blocks:
            return super().decode(batches)
        token_ids = self.tensor([sequence.token_ids[-1] for sequence in batches[self.dp_index]])
        step = self.step_metadata(batches, [[1] * len(batch) for batch in batches], is_prefill=False)
        size = min(size for size in self.graphs if size >= max(map(len, batches)))
        return self.graphs[size].replay(token_ids, step)


@dataclasses.dataclass(frozen=True)
class DecodeGraph:
    """A recorded step with the tensors it reads and writes."""

    graph: torch.cuda.CUDAGraph
    token_ids: torch.Tensor
    step: StepMetadata
    logits: ShardedLogits
    traffic: Traffic
    sent_bytes: dict[str, float]  # by one replay, which the groups do not see

    def replay(self, token_ids: torch.Tensor, step: StepMetadata) -> ShardedLogits:
        """Runs the recorded step on other rows; rows beyond them write to the null block."""
        rows = len(token_ids)
        self.token_ids[:rows] = token_ids
        self.step.positions[:rows] = step.positions
        self.step.slot_mapping.fill_(NULL_BLOCK)
        self.step.slot_mapping[:rows] = step.slot_mapping
        self.step.block_table.fill_(NULL_BLOCK)
        self.step.block_table[:rows, : step.block_table.shape[-1]] = step.block_table
        self.step.seq_lens.fill_(1)
        self.step.seq_lens[:rows] = step.seq_lens
        self.graph.replay()
        for name, count in self.sent_bytes.items():
            self.traffic.add(name, count)
        return dataclasses.replace(self.logits, num_rows=rows)
