# SPDX-License-Identifier: Apache-2.0
"""Random inputs at real shapes: float32 on the CPU for the reference, the same values in bfloat16 for the backend."""

import dataclasses
from itertools import accumulate

import torch

from executor.engine.kv_cache import BLOCK_SIZE, blocks_for
from ops import DenseWeight, Ops, StepMetadata, Weight

DTYPE = torch.bfloat16
TENSORS_OF_STEP = ("positions", "slot_mapping", "block_table", "seq_lens")
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
        return DenseWeight(values), ops.prepare_weight(DenseWeight(self.to_device(values)))

    def topk_ids(self, tokens: int) -> torch.Tensor:
        """[T, K] int64, distinct experts of each token."""
        shapes = self.shapes
        return torch.rand(tokens, shapes.num_experts, generator=self.generator).topk(shapes.top_k).indices

    def step(self, lens: list[int], is_prefill: bool) -> StepMetadata:
        """Step metadata of sequences of these lengths in shuffled cache blocks other than block 0; on the CPU."""
        counts = [blocks_for(length) for length in lens]
        order = (torch.randperm(sum(counts), generator=self.generator) + 1).tolist()
        blocks = [order[end - count : end] for count, end in zip(counts, accumulate(counts), strict=True)]
        positions = [range(0 if is_prefill else length - 1, length) for length in lens]
        slots = [
            own[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            for own, tokens in zip(blocks, positions, strict=True)
            for position in tokens
        ]
        return StepMetadata(
            is_prefill=is_prefill,
            positions=torch.tensor([position for tokens in positions for position in tokens]),
            slot_mapping=torch.tensor(slots),
            block_table=torch.tensor([own + [0] * (max(counts) - len(own)) for own in blocks]),
            seq_lens=torch.tensor(lens),
            query_lens_list=[len(tokens) for tokens in positions],
            seq_lens_list=list(lens),
            dp_num_tokens=[len(slots)],
        )

    def cos_sin(self, step: StepMetadata) -> Pair:
        """cos and sin [T, C] float32 of a step's positions, on the CPU."""
        head_dim = self.shapes.head_dim
        frequencies = 1e-6 ** (torch.arange(0, head_dim, 2) / head_dim)
        angles = step.positions[:, None] * torch.cat([frequencies, frequencies])
        return angles.cos(), angles.sin()

    def on_device(self, step: StepMetadata) -> tuple[Pair, StepMetadata]:
        """Moves a step and its cos and sin to the backend's device."""
        cos, sin = (part.to(self.device) for part in self.cos_sin(step))
        tensors = {name: getattr(step, name).to(self.device) for name in TENSORS_OF_STEP}
        return (cos, sin), dataclasses.replace(step, **tensors)
