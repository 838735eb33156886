# SPDX-License-Identifier: Apache-2.0
"""Decode steps replayed from captured graphs: the same step as eager, without its launch costs."""

import dataclasses

import torch

from executor.kv_cache import blocks_for
from executor.model_runner import Batches, DecodeInputs, ModelRunner
from executor.scheduler import Sequence
from models.layers.attention import KVCache
from models.layers.lm_head import ShardedLogits
from models.qwen3_moe.model import Qwen3Moe
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
        inputs = DecodeInputs(batch_size, self.max_blocks, [batch_size] * self.dp_size, self.device)
        inputs.fill([])
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(WARMUP_STEPS):
                self.decode_step(inputs.token_ids, inputs.step)
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        before = dict(self.traffic.sent_bytes)
        with torch.cuda.graph(graph, pool=self.pool):
            logits = super().decode_step(inputs.token_ids, inputs.step)
        return DecodeGraph(graph, inputs, logits, self.traffic, self.traffic.since(before))

    def decode(self, batches: Batches) -> ShardedLogits:
        longest = max(len(sequence) for batch in batches for sequence in batch)
        if blocks_for(longest) > self.max_blocks:
            return super().decode(batches)
        size = min(size for size in self.graphs if size >= max(map(len, batches)))
        self.tokens_run += len(batches[self.dp_index])
        return self.graphs[size].replay(batches[self.dp_index])


@dataclasses.dataclass(frozen=True)
class DecodeGraph:
    """A recorded step with the tensors it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: DecodeInputs
    logits: ShardedLogits
    traffic: Traffic
    sent_bytes: dict[str, float]  # by one replay, which the groups do not see

    def replay(self, sequences: list[Sequence]) -> ShardedLogits:
        """Runs the recorded step on these sequences; rows beyond them are padding."""
        self.inputs.fill(sequences)
        self.graph.replay()
        for name, count in self.sent_bytes.items():
            self.traffic.add(name, count)
        return dataclasses.replace(self.logits, num_rows=len(sequences))
