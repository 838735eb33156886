# SPDX-License-Identifier: Apache-2.0
"""Decode steps replayed from captured graphs: the same step as eager, without its launch costs."""

import dataclasses
from functools import partial

import torch

from executor.engine.kv_cache import blocks_for
from executor.engine.model_runner import Batches, DecodeInputs, ModelRunner, lens_of
from executor.engine.scheduler import Sequence
from models.layers.attention import KVCache
from models.layers.lm_head import ShardedLogits
from models.qwen3_moe.model import Qwen3Moe
from ops.comm import ParallelContext, Traffic
from ops.recorder import GraphRecorder, Replay

UNPADDED = 8  # up to here every batch size has a graph, where a row of padding would cost 7 to 10% (on an H200)


class GraphRunner(ModelRunner):
    """Captures a graph for each of `graph_sizes`; a batch in between is padded to the next.

    Where the groups of attention ranks have batches of different sizes, all take the largest one's graph. Sequences
    that grow beyond `max_len` tokens take eager steps.
    """

    def __init__(
        self,
        model: Qwen3Moe,
        kv_caches: list[KVCache],
        parallel: ParallelContext,
        sequence_parallel: bool,
        device: torch.device,
        recorder: GraphRecorder,
        batch_size: int,
        max_len: int,
    ):
        super().__init__(model, kv_caches, parallel, sequence_parallel, device)
        self.recorder = recorder
        self.max_blocks = blocks_for(max_len)
        self.graphs = {size: self.capture(size) for size in reversed(graph_sizes(batch_size))}

    def capture(self, batch_size: int) -> "DecodeGraph":
        """Records a decode step of `batch_size` padding rows."""
        inputs = DecodeInputs(batch_size, self.max_blocks, [batch_size] * self.parallel.attn_dp.size, self.device)
        inputs.fill([])
        step = partial(self.decode_step, inputs.token_ids, inputs.step)
        self.recorder.warm_up(step)
        traffic = self.parallel.traffic
        before = dict(traffic.sent_bytes)
        logits, replay = self.recorder.record(step)
        return DecodeGraph(replay, inputs, logits, traffic, traffic.since(before))

    def decode(self, batches: Batches, latest: torch.Tensor | None = None) -> ShardedLogits:
        longest = max(lens_of(sum(batches, []), latest))
        if blocks_for(longest) > self.max_blocks:
            return super().decode(batches, latest)
        size = min(size for size in self.graphs if size >= max(map(len, batches)))
        self.tokens_run += len(batches[self.dp_index])
        return self.graphs[size].run(batches[self.dp_index], latest)


def graph_sizes(largest: int) -> list[int]:
    """Batch sizes 1 to UNPADDED, from there on powers of two, and the largest."""
    powers = {2**i for i in range(largest.bit_length())}
    return sorted({*range(1, min(largest, UNPADDED) + 1), *powers, largest})


@dataclasses.dataclass(frozen=True)
class DecodeGraph:
    """A recorded step with the tensors it reads and writes."""

    replay: Replay
    inputs: DecodeInputs
    logits: ShardedLogits
    traffic: Traffic
    sent_bytes: dict[str, float]  # by one replay, which the groups do not see

    def run(self, sequences: list[Sequence], latest: torch.Tensor | None) -> ShardedLogits:
        """Replays the step for these sequences; rows beyond them are padding."""
        self.inputs.fill(sequences, latest)
        self.replay(self.inputs.step.seq_lens_list)
        for name, count in self.sent_bytes.items():
            self.traffic.add(name, count)
        return dataclasses.replace(self.logits, num_rows=len(sequences))
