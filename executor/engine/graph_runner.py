# SPDX-License-Identifier: Apache-2.0
"""Graph capture and replay of decode steps, which removes the launch overhead of the eager step."""

import dataclasses
from functools import partial

import torch

from executor.engine.decode_inputs import DecodeInputs
from executor.engine.model_runner import Batches, ModelRunner, Unread
from models.layers.attention import KVCache
from models.layers.lm_head import ShardedLogits
from models.qwen3_moe.model import Qwen3Moe
from ops.comm import ParallelContext
from ops.recorder import GraphRecorder, Replay
from ops.step import blocks_for

UNPADDED = 8  # every batch size up to here has a graph: a padding row would cost 7 to 10% (on an H200)


class GraphRunner(ModelRunner):
    """Captures a graph for each of `graph_sizes`; a batch in between is padded to the next size.

    Where attention DP groups have batches of different sizes, all replay the graph of the largest. Steps with a
    sequence of more than `graph_len` tokens run eagerly.
    """

    def __init__(
        self,
        model: Qwen3Moe,
        kv_caches: list[KVCache],
        parallel: ParallelContext,
        sequence_parallel: bool,
        device: torch.device,
        max_sequences: int,
        max_len: int,
        recorder: GraphRecorder,
        graph_len: int,
    ):
        super().__init__(model, kv_caches, parallel, sequence_parallel, device, max_sequences, max_len)
        self.recorder = recorder
        self.graph_blocks = blocks_for(min(graph_len, max_len))
        sizes = graph_sizes(max_sequences, recorder.max_graphs if parallel.world.size > 1 else None)
        self.graphs = {size: self.capture(size) for size in reversed(sizes)}

    def capture(self, batch_size: int) -> "DecodeGraph":
        """Captures a decode step of `batch_size` padding rows."""
        inputs = DecodeInputs(batch_size, [batch_size] * self.parallel.attn_dp.size, self.device)
        step = partial(self.decode_step, *inputs.fill([], None, self.block_table, self.graph_blocks))
        self.recorder.warm_up(step)
        traffic = self.parallel.traffic
        before = dict(traffic.sent_bytes)
        logits, replay = self.recorder.record(step)
        return DecodeGraph(replay, inputs, logits, traffic.since(before))

    def decode(self, batches: Batches, unread: Unread | None) -> ShardedLogits:
        longest = max(work.end for batch in batches for work in batch)
        if blocks_for(longest) > self.graph_blocks:
            return super().decode(batches, unread)
        graph = self.graphs[min(size for size in self.graphs if size >= max(map(len, batches)))]
        batch = batches[self.dp_index]
        graph.inputs.fill(batch, unread, self.block_table, self.graph_blocks)
        graph.replay(graph.inputs.step.seq_lens_list)
        for name, count in graph.sent_bytes.items():
            self.parallel.traffic.add(name, count)
        return dataclasses.replace(graph.logits, num_rows=len(batch))


def graph_sizes(largest: int, max_graphs: int | None = None) -> list[int]:
    """Batch sizes 1 to UNPADDED, from there on powers of two, and the largest.

    Of more than `max_graphs`, leaves out sizes that need the least padding to the next; never the largest, 1 last.
    """
    powers = {2**i for i in range(largest.bit_length())}
    sizes = sorted({*range(1, min(largest, UNPADDED) + 1), *powers, largest})
    while max_graphs is not None and len(sizes) > max_graphs:
        sizes.remove(min(sizes[1:-1] or sizes[:-1], key=lambda size: sizes[sizes.index(size) + 1] / size))
    return sizes


@dataclasses.dataclass(frozen=True)
class DecodeGraph:
    """A captured step with the tensors it reads and writes."""

    replay: Replay
    inputs: DecodeInputs
    logits: ShardedLogits
    sent_bytes: dict[str, float]  # traffic of one replay, which the groups cannot count
