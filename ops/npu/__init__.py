# SPDX-License-Identifier: Apache-2.0
"""Ascend NPUs (Atlas A2 and A3): the interface on torch_npu's fused operations, one vendor call wherever there is one.

Every contract relied on is that of the operation's page in op-plugin (docs/zh/custom_APIs/torch_npu) and of its
adapter (op_plugin/ops/opapi); docs/npu.md says which of them are checked how. torch_npu 2.8 to 2.13; where a stack
lacks an operation, `bind` takes the next best. Letters as in ops/__init__.py, R = T * K rows of chosen experts.
"""

import dataclasses
import logging
from collections.abc import Callable
from itertools import accumulate

import torch
import torch_npu
from torch.nn import functional as F

from ops import GroupedRows, Routing, StepMetadata
from ops.ascend import choose_algorithm, product_of
from ops.npu.calls import npu
from ops.npu.exchange import DISPATCH_AND_COMBINE, DispatchPlan
from ops.npu.profiler import NpuProfiler
from ops.npu.recorder import NpuGraphRecorder
from ops.npu.variants import (
    ATTENTION,
    CACHE_WRITE,
    COMBINE,
    GATING,
    HEAD_DIM,
    LENGTHS_ARGUMENT,
    REGROUP,
    ROTARY,
    TRIALS,
)
from ops.reference import ReferenceOps
from ops.weight import DenseWeight, TransposedWeight, Weight

logger = logging.getLogger(__name__)

FRACTAL_NZ = 29  # the tiled format that matrix units read without rearranging
STEP_FIELDS = [field.name for field in dataclasses.fields(StepMetadata)]
MAX_INNER_SIZE = 65535  # of a weight's rows and columns, in matmuls of that format
MAX_EXPERT_TOKENS = 8192  # at once: the rows of their experts need 8 times the memory and more
MAX_EXPERT_ROWS = 8 * MAX_EXPERT_TOKENS
REQUIRED = (
    "npu_rms_norm",
    "npu_add_rms_norm",
    "npu_swiglu",
    "npu_moe_init_routing_v2",
    "npu_grouped_matmul",
    "npu_format_cast",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NpuStep(StepMetadata):
    """A step as fused attention wants it: block_table is int32, and TND counts queries up."""

    query_ends: list[int]  # [B], tokens of this step up to the end of each sequence


class NpuOps(ReferenceOps):
    """The operations on torch_npu. The residual is in the model's dtype, as npu_add_rms_norm adds in it.

    `device` is where the operations are tried out; anything but an NPU is for tests.
    """

    name = "npu"
    embedding = ReferenceOps.embedding  # one operation of torch's
    norm_linear = ReferenceOps.norm_linear  # add_norm and linear
    decode_reads_nothing = True

    def __init__(self, device: str = "npu"):
        super().__init__(grouped_mm=True)
        missing = [name for name in REQUIRED if not hasattr(npu, name)]
        if missing:
            raise ValueError(f"device: npu needs a newer torch_npu: {', '.join(missing)} is not in the installed one")
        self.on_npu = torch.device(device).type == "npu"
        if self.on_npu:
            torch.npu.config.allow_internal_format = True  # else the cast to FRACTAL_NZ silently does nothing
        # True means hidden; attention's causal modes want exactly this size, whatever the lengths
        self.causal_mask = torch.ones(2048, 2048, dtype=torch.int8).triu(1).to(device)
        self.product = product_of(torch_npu.npu.get_device_name())
        self.side_stream = None
        self.paged_views: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.bindings: dict[str, str] = {}  # which variant stands behind each of these
        self.replaced: list[str] = []  # those that have a better one, which does not work here
        self.rotate = self.bind("rotary", ROTARY, device)
        self.write_cache = self.bind("cache write", CACHE_WRITE, device)
        self.attend = self.bind("attention", ATTENTION, device)
        self.choose_experts = self.bind("gating", GATING, device)
        self.combine = self.bind("combine", COMBINE, device)
        self.regroup_rows = self.bind("regroup", REGROUP, device)
        logger.info("ops: npu, %s", ", ".join(f"{what}: {name}" for what, name in self.bindings.items()))

    def bind(self, what: str, variants: dict[str, Callable], device: str) -> Callable:
        """The first variant whose operation is installed and survives a small call on the device."""
        errors = []
        for name, variant in variants.items():
            try:
                TRIALS[what](variant, device)
                if self.on_npu:
                    torch.npu.synchronize()  # launches fail late
            except (RuntimeError, AttributeError) as error:
                errors.append(f"{name}: {str(error).splitlines()[0]}")
                logger.info("ops: npu lacks %s", errors[-1])
                continue
            self.bindings[what] = name
            if errors:
                self.replaced.append(f"{what} ({name})")
            return variant
        raise RuntimeError(f"device: npu has no working operation for {what}: {'; '.join(errors)}")

    def fallbacks(self, dtype):
        return super().fallbacks(dtype) + self.replaced

    def plan_dispatch(self, sizes):
        missing = [name for name in DISPATCH_AND_COMBINE if not hasattr(npu, name)]
        algorithm, why = choose_algorithm(self.product, sizes)
        if missing or algorithm is None:
            logger.info("no dispatch and combine: %s", f"torch_npu lacks {missing[0]}" if missing else why)
            return None
        return DispatchPlan(algorithm, sizes)

    def refuses_linear_all_reduce(self, ranks):
        if not hasattr(npu, "npu_mm_all_reduce_base"):
            return "torch_npu lacks the operation"
        if self.product != "A2":
            return f"only possible on Atlas A2, this is {self.product or 'another product'}"
        return None if ranks in (2, 4, 8) else f"parallel_config.attn_tp_size would have to be 2, 4 or 8, it is {ranks}"

    def linear_all_reduce(self, hidden_states, weight, group):
        if hidden_states.shape[0] == 0:
            return super().linear_all_reduce(hidden_states, weight, group)
        data = weight.data.t() if isinstance(weight, DenseWeight) else weight.data
        output = npu.npu_mm_all_reduce_base(hidden_states, data, group.hccl_name, reduce_op="sum")
        group.count_all_reduce(output)
        return output

    def prefetch(self, weight):
        if self.side_stream is None:
            self.side_stream = torch_npu.npu.Stream()
        self.side_stream.wait_stream(torch_npu.npu.current_stream())
        with torch_npu.npu.stream(self.side_stream):
            npu.npu_prefetch(weight.data, None, weight.data.nbytes)

    def check_model(self, dtype, head_dim):
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"model_config.dtype: {str(dtype).removeprefix('torch.')} is not possible on device npu, whose fused "
                "attention takes bfloat16 and float16"
            )
        if head_dim != HEAD_DIM:
            raise ValueError(f"model_path: head_dim {head_dim} is not possible on device npu, only {HEAD_DIM}")

    def prepare_weight(self, weight: Weight) -> Weight:
        """To FRACTAL_NZ where no padding is needed: [N, K] -> [K, N], or [E, N, K] -> [E, K, N].

        The format is for whole contiguous tensors: nothing may slice or view one afterwards.
        """
        if any(size % 16 or size > MAX_INNER_SIZE for size in weight.data.shape[-2:]):
            return weight
        data = npu.npu_format_cast(weight.data.transpose(-1, -2).contiguous(), FRACTAL_NZ)
        if self.on_npu and npu.get_npu_format(data) != FRACTAL_NZ:
            raise RuntimeError("npu_format_cast left a weight in its old format: is allow_internal_format forbidden?")
        return TransposedWeight(data)

    def prepare_attention(self, cos_sin, step, dtype):
        cos, sin = (part.to(dtype)[:, None] for part in cos_sin)  # [T, 1, C]
        fields = {name: getattr(step, name) for name in STEP_FIELDS}
        fields["block_table"] = step.block_table.int()
        return (cos, sin), NpuStep(**fields, query_ends=list(accumulate(step.query_lens_list)))

    def graph_recorder(self):
        return NpuGraphRecorder(LENGTHS_ARGUMENT[self.attend])

    def profiler(self):
        return NpuProfiler()

    def add_norm(self, hidden_states, residual, norm_weight, eps):
        if hidden_states.shape[0] == 0:
            return hidden_states, hidden_states if residual is None else residual
        if residual is None:
            return npu.npu_rms_norm(hidden_states, norm_weight, eps)[0], hidden_states
        normed, _, residual = npu.npu_add_rms_norm(residual, hidden_states, norm_weight, eps)
        return normed, residual

    def linear(self, hidden_states, weight, bias=None):
        if isinstance(weight, DenseWeight):
            return F.linear(hidden_states, weight.data, bias)
        if hidden_states.shape[0] == 0:
            return hidden_states.new_empty(0, weight.data.shape[1])
        if bias is None:
            return torch.mm(hidden_states, weight.data)
        return torch.addmm(bias, hidden_states, weight.data)

    def silu_and_mul(self, gate_up):
        if gate_up.shape[0] == 0:
            return gate_up[:, gate_up.shape[1] // 2 :]
        return npu.npu_swiglu(gate_up, -1)

    def attention(self, qkv, q_norm_weight, k_norm_weight, eps, cos_sin, key_cache, value_cache, step):
        _, block_size, num_kv_heads, head_dim = key_cache.shape
        num_tokens, width = qkv.shape
        num_heads = width // head_dim - 2 * num_kv_heads
        heads = qkv.view(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
        # torch.split would spend longer in Python than this takes in all
        query, key, value = torch.split_with_sizes(heads, (num_heads, num_kv_heads, num_kv_heads), 1)
        if num_tokens == 0:
            return query.flatten(1)
        query = npu.npu_rms_norm(query, q_norm_weight, eps)[0]
        key = npu.npu_rms_norm(key, k_norm_weight, eps)[0]
        value = value.contiguous()
        query, key = self.rotate(query, key, *cos_sin)
        self.write_cache(key, value, key_cache, value_cache, step.slot_mapping)
        if step.is_prefill:  # lengths of unpaged keys are counted up like those of queries
            lengths, paged = step.query_ends, (None, 0)
        else:  # and of paged ones are not
            key, value = self.paged(key_cache), self.paged(value_cache)
            lengths, paged = step.seq_lens_list, (step.block_table, block_size)
        output = self.attend(query, key, value, num_kv_heads, self.causal_mask, step.query_ends, lengths, *paged)
        return output.flatten(1)

    def paged(self, cache: torch.Tensor) -> torch.Tensor:
        """A cache [L, S, G, C] as paged attention takes it, [L, S, G * C]: one view for all steps."""
        if id(cache) not in self.paged_views:
            self.paged_views[id(cache)] = cache, cache.flatten(2)  # while the cache is kept, nothing else has its id
        return self.paged_views[id(cache)][1]

    def route(self, hidden_states, residual, norm_weight, eps, router_weight, top_k, renormalize):
        normed, residual = self.add_norm(hidden_states, residual, norm_weight, eps)
        if normed.shape[0] == 0:
            none = normed.new_empty(0, top_k)
            return normed, residual, Routing(none, none.int())
        logits = F.linear(normed, router_weight)
        return normed, residual, Routing(*self.choose_experts(logits, top_k, renormalize))

    def experts(self, hidden_states, routing, gate_up, down):
        tokens = hidden_states.shape[0]
        if tokens <= MAX_EXPERT_TOKENS or isinstance(routing, GroupedRows):
            return super().experts(hidden_states, routing, gate_up, down) if tokens else hidden_states
        output = torch.empty_like(hidden_states)
        for start in range(0, tokens, MAX_EXPERT_TOKENS):
            part = slice(start, start + MAX_EXPERT_TOKENS)
            share = Routing(routing.topk_weights[part], routing.topk_ids[part], routing.has_elsewhere)
            output[part] = super().experts(hidden_states[part], share, gate_up, down)
        return output

    def sort_by_expert(self, hidden_states, topk_ids, num_experts):
        """Where some choices are "elsewhere", that is an expert like the others here: the operation's own way, a range
        of experts, gives rows outside it the index -1, which the combining operations do not take."""
        num_rows = topk_ids.numel()
        if num_rows == 0:
            none = topk_ids.new_empty(0, dtype=torch.int32)
            return hidden_states, none, topk_ids.new_zeros(num_experts, dtype=torch.int64)
        rows, row_index, counts, _ = npu.npu_moe_init_routing_v2(
            hidden_states,
            topk_ids.int(),
            active_num=num_rows,
            expert_num=num_experts,
            drop_pad_mode=0,
            expert_tokens_num_type=1,  # counts
            expert_tokens_num_flag=True,
            quant_mode=-1,
            active_expert_range=[0, num_experts],  # the default freezes at the first value a process sees
            row_idx_type=0,  # row_index[t * K + k] is the row of choice k of token t
        )
        return rows, row_index, counts

    def weighted_sum(self, rows, row_index, topk_weights):
        if rows.shape[0] == 0:
            return rows
        if topk_weights.dtype is not rows.dtype:  # asked first: a cast to the same costs the host as much as a view
            topk_weights = topk_weights.to(rows.dtype)
        return self.combine(rows, row_index, topk_weights)

    def regroup(self, rows, tokens_per_rank):
        if rows.shape[0] == 0:
            return rows, tokens_per_rank.new_empty(0), tokens_per_rank.sum(0)
        return self.regroup_rows(rows, tokens_per_rank)

    def grouped_experts(self, rows, tokens_per_expert, gate_up, down):
        """In parts of a bounded number of rows."""
        if rows.shape[0] <= MAX_EXPERT_ROWS:
            return super().grouped_experts(rows, tokens_per_expert, gate_up, down)
        output = torch.empty_like(rows)
        ends = tokens_per_expert.cumsum(0)
        for start in range(0, rows.shape[0], MAX_EXPERT_ROWS):
            part = slice(start, start + MAX_EXPERT_ROWS)
            counts = (ends - start).clamp(0, MAX_EXPERT_ROWS).diff(prepend=ends.new_zeros(1))
            output[part] = super().grouped_experts(rows[part], counts, gate_up, down)
        return output

    def grouped_linear(self, rows, weight, tokens_per_expert):
        data = weight.data.transpose(1, 2) if isinstance(weight, DenseWeight) else weight.data  # [E, K, N]
        return npu.npu_grouped_matmul(
            [rows],
            [data],
            group_list=tokens_per_expert,
            split_item=3,
            group_type=0,
            # one count may not be given as such; its running sum is it
            group_list_type=0 if tokens_per_expert.shape[0] == 1 else 1,
        )[0]
