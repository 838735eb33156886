# SPDX-License-Identifier: Apache-2.0
"""Random inputs at real shapes: float32 on the CPU for the reference, the same values in bfloat16 for the backend."""

import dataclasses
from collections.abc import Sequence
from itertools import islice

import torch

from ops import DenseWeight, Ops, StepMetadata, Weight
from ops.step import Span, blocks_for, step_inputs

DTYPE = torch.bfloat16
Pair = tuple[torch.Tensor, torch.Tensor]
WeightPair = tuple[DenseWeight, Weight]  # for the reference, for the backend


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """Model shapes of one rank; the defaults are Qwen3-30B-A3B's."""

    name: str = "30B"
    hidden_size: int = 2048
    num_heads: int = 32
    num_kv_heads: int = 4
    head_dim: int = 128
    num_experts: int = 128
    top_k: int = 8
    width: int = 768
    vocab_size: int = 151936

    def slice(self, size: int) -> "Shapes":
        """Returns the shapes of one rank at tensor-parallel size `size`."""
        return dataclasses.replace(
            self,
            name=f"{self.name} tp {size}",
            num_heads=self.num_heads // size,
            num_kv_heads=max(1, self.num_kv_heads // size),
            width=self.width // size,
            vocab_size=self.vocab_size // size,
        )

    @property
    def qkv_width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


class Inputs:
    """Generates random inputs and copies them to the backend's device and dtype."""

    def __init__(self, device: torch.device, shapes: Shapes):
        self.device = device
        self.shapes = shapes
        self.generator = torch.Generator().manual_seed(0)

    def random(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        """Normally distributed values that are exact in the backend's dtype."""
        return (torch.randn(shape, generator=self.generator) * std).to(DTYPE).float()

    def norm_weight(self, size: int) -> torch.Tensor:
        """Random norm weight near 1, as in models; larger q and k norms would make attention nearly one-hot."""
        return (1 + self.random(size, std=0.1)).to(DTYPE).float()

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copies a tensor to the backend's device, floating-point values in its dtype."""
        return tensor.to(self.device, DTYPE if tensor.is_floating_point() else tensor.dtype, copy=True)

    def weight(self, ops: Ops, *shape: int) -> WeightPair:
        """Random weight [..., out_features, in_features], for the reference and for the backend `ops`."""
        values = self.random(*shape, std=shape[-1] ** -0.5)
        return DenseWeight(values), ops.prepare_weight(DenseWeight(self.to_device(values)), DTYPE)

    def topk_ids(self, tokens: int) -> torch.Tensor:
        """[T, K] int64, distinct experts of each token."""
        shapes = self.shapes
        return torch.rand(tokens, shapes.num_experts, generator=self.generator).topk(shapes.top_k).indices

    def step(self, cached: Sequence[int], new: Sequence[int]) -> StepMetadata:
        """Metadata of a step of sequences with `cached` and `new` tokens, in shuffled cache blocks other than
        block 0; on the CPU."""
        counts = [blocks_for(sum(lens)) for lens in zip(cached, new, strict=True)]
        blocks = iter((torch.randperm(sum(counts), generator=self.generator) + 1).tolist())
        spans = [
            Span(num_cached, num_new, list(islice(blocks, count)), num_cached + num_new)
            for num_cached, num_new, count in zip(cached, new, counts, strict=True)
        ]
        return step_inputs(spans, [[]] * len(spans), "cpu")[1]

    def cos_sin(self, step: StepMetadata) -> Pair:
        """cos and sin [T, C] float32 of a step's positions, on the CPU."""
        head_dim = self.shapes.head_dim
        frequencies = 1e-6 ** (torch.arange(0, head_dim, 2) / head_dim)
        angles = step.positions[:, None] * torch.cat([frequencies, frequencies])
        return angles.cos(), angles.sin()

    def on_device(self, step: StepMetadata) -> tuple[Pair, StepMetadata]:
        """Moves a step and its cos and sin to the backend's device."""
        cos, sin = (part.to(self.device) for part in self.cos_sin(step))
        tensors = {name: value.to(self.device) for name, value in vars(step).items() if torch.is_tensor(value)}
        return (cos, sin), dataclasses.replace(step, **tensors)
