# SPDX-License-Identifier: Apache-2.0
"""Runs the model on the NPU backend with meta tensors under a wheel's schemas, and records every call.

Needs a process of its own, as tests.npu.schemas.load replaces torch.ops.npu.
"""

import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from executor.engine.kv_cache import cache_tensors
from executor.loading.before_loading import load_config
from models.layers.expert_exchange import AllToAllExchange, FusedExchange, GatherExchange, own_share
from models.layers.parameter import Parameters, ParameterSpec, Role
from models.layers.rotary import RotaryEmbedding
from models.qwen3_moe.model import Building, Qwen3Moe
from models.qwen3_moe.sharding import Layout
from models.qwen3_moe.weights import parameter_specs
from ops import DenseWeight, GroupedRows, StepMetadata, Weight
from ops.ascend import ExchangeSizes
from ops.comm import Group, ParallelContext, group_members
from ops.step import Span, blocks_for, step_inputs
from tests.npu.schemas import ROOT, load, module

MODELS = {"30b": "qwen3_30b_a3b", "235b": "qwen3_235b_a22b"}
LAYOUTS = {f"{tp}tp": (tp, tp, tp, "A3") for tp in (1, 2, 4, 8, 16)}  # world size, attn_tp, moe_tp, product
LAYOUTS |= {f"{ep}ep": (ep, 1, 1, "A3") for ep in (8, 16, 128)}
LAYOUTS |= {f"{ep}ep_a2": (ep, 1, 1, "A2") for ep in (8, 16, 128)}
LAYOUTS |= {"8ep_gather": (8, 1, 1, None), "4tp_4dp_16ep": (16, 4, 1, "A3")}
UNFUSED = ("1tp", "16tp", "8ep", "8ep_gather")  # layouts that run with a call for each part of FusedQkv too
STEPS = {  # (cached tokens, new tokens) of each sequence
    "prefill": [(0, 5), (0, 300)],
    "extend": [(300, 1), (256, 200), (0, 40), (127, 1), (130, 3)],
    "decode1": [(199, 1)],
    "decode8": [(cached, 1) for cached in range(1, 9)],
    "idle": [],
}
WIDER = 5  # columns of the table of "extend" beyond those that its sequences use
META = torch.device("meta")
NUM_BLOCKS = 32
EPS = 1e-5  # not the operations' default, so that an omitted epsilon is detected


class MetaGroup(Group):
    """Collectives on meta tensors: the shapes of the results without communication."""

    def all_reduce(self, tensor):
        return tensor

    def all_gather(self, tensor):
        return tensor.new_empty(self.size * tensor.shape[0], *tensor.shape[1:])

    def reduce_scatter(self, tensor):
        return tensor.new_empty(tensor.shape[0] // self.size, *tensor.shape[1:])

    def all_to_all(self, tensor, send, receive):
        assert sum(send) == tensor.shape[0]
        return tensor.new_empty(sum(receive), *tensor.shape[1:])

    @property
    def hccl_name(self):
        return f"communicator of {self.name}"


class MetaAllToAll(AllToAllExchange):
    """All-to-all with fixed row counts, which meta tensors lack: all rows to rank 0, three from each rank."""

    def read_counts(self, sent, received):
        return [self.rows] + [0] * (len(sent) - 1), [3] * len(received)

    def dispatch(self, hidden_states, routing, step):
        self.rows = own_share((routing.topk_ids,), self.parallel.attn_tp, step)[0].numel()
        return super().dispatch(hidden_states, routing, step)


class Recorder(TorchDispatchMode):
    """Records every dispatcher call: vendor operations with named arguments, others by name only."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        schema = operation._schema
        call = {"name": schema.name, "launches": launches(schema)}
        if schema.name.startswith("npu::"):
            named = {argument.name: argument.default_value for argument in schema.arguments}  # dispatch omits defaults
            named |= dict(zip(named, args, strict=False)) | kwargs
            call["given"] = {name: described(value) for name, value in named.items()}
            self.calls += [{"name": "aclnn::copy", "launches": True}] * hidden_copies(named)
        self.calls.append(call)
        return operation(*args, **kwargs)


def launches(schema: torch.FunctionSchema) -> bool:
    """Whether a call launches a kernel: not if it only creates a view or allocates."""
    views = any(result.alias_info is not None and not result.alias_info.is_write for result in schema.returns)
    return not views and schema.name not in ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::empty_like")


def hidden_copies(given: dict[str, Any]) -> int:
    """Number of kernels that a vendor operation launches to make its arguments contiguous.

    A weight may be transposed: the operation reads it so.
    """
    values = [value for name, value in given.items() if name != "weight"]
    return sum(isinstance(value, torch.Tensor) and not value.is_contiguous() for value in values)


def described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return {"shape": list(value.shape), "dtype": dtype, "contiguous": value.is_contiguous()}
    return [described(item) for item in value] if isinstance(value, (list, tuple)) else value


def parallel_context(layout: str) -> ParallelContext:
    world_size, attn_tp, moe_tp, _ = LAYOUTS[layout]
    members = group_members(world_size, attn_tp, moe_tp, attn_tp, attn_tp)
    groups = {name: MetaGroup(name=name, ranks=groups[0]) for name, groups in members.items()}
    return ParallelContext(**groups, dispatch=MetaGroup(name="dispatch", ranks=members["world"][0]))


def expert_exchanges(parallel: ParallelContext, config: Any, ops: Any) -> dict[str, Any]:
    """As executor.loading.exchanges selects them, but all-to-all in prefill wherever attn_dp_size > 1."""
    num_local_experts = config.num_experts // parallel.moe_ep.size
    gather = GatherExchange(parallel, num_local_experts)
    if parallel.attn_dp.size == 1:
        return {"prefill_exchange": gather, "decode_exchange": gather}
    sizes = ExchangeSizes(
        ranks=parallel.world.size,
        tokens=8,
        experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        hidden_size=config.hidden_size,
    )
    plan = ops.plan_dispatch(sizes)
    if plan is None:
        return {"prefill_exchange": gather, "decode_exchange": gather}
    pair = plan.make(parallel.dispatch)[0]
    pair.prepare(torch.bfloat16, META)
    return {
        "prefill_exchange": MetaAllToAll(parallel, num_local_experts, ops),
        "decode_exchange": FusedExchange(parallel, pair),
    }


def make_step(name: str, parallel: ParallelContext) -> StepMetadata:
    """The step `name`; the block table of "extend" is a view of a wider one."""
    spans = [
        Span(cached, new, list(range(1, 1 + blocks_for(cached + new))), cached + new) for cached, new in STEPS[name]
    ]
    tokens = sum(span.num_new for span in spans)
    width = max((len(span.blocks) for span in spans), default=0)
    table = torch.empty(len(spans), width + WIDER, dtype=torch.int32, device=META)[:, :width]
    _, step = step_inputs(
        spans,
        [[]] * len(spans),
        META,
        block_table=table if name == "extend" else None,
        dp_num_tokens=[tokens] + [tokens or 3] * (parallel.attn_dp.size - 1),
        is_decode=name not in ("prefill", "extend"),
    )
    return step


def plain(spec: ParameterSpec) -> Weight | None:
    """No weight of a format of its own: all stay unquantised."""
    return None


class Case:
    """One rank's part of a two-layer model in a layout, on meta tensors.

    weight_of: weight of a parameter in its number format, None if it is unquantised.
    """

    def __init__(self, model: str, layout: str, ops: Any, weight_of: Callable[[ParameterSpec], Weight | None] = plain):
        self.ops = ops
        self.config = load_config(ROOT / "models/qwen3_moe/shapes" / MODELS[model], None)
        self.config.num_hidden_layers = 2
        self.config.rms_norm_eps = EPS
        self.parallel = parallel_context(layout)
        specs = parameter_specs(self.config, Layout.of(self.parallel))
        empty = {spec.name: torch.empty(spec.shape, dtype=torch.bfloat16, device=META) for spec in specs}
        dense = {spec.name: DenseWeight(empty[spec.name]) for spec in specs if spec.role is Role.MATRIX}
        quantized = {spec.name: found for spec in specs if (found := weight_of(spec)) is not None}
        self.parameters = Parameters(empty | dense | quantized)
        self.parameters.prepare(ops, torch.bfloat16)
        ops.product = LAYOUTS[layout][3]
        build = Building(
            config=self.config,
            ops=ops,
            parallel=self.parallel,
            **expert_exchanges(self.parallel, self.config, ops),
        )
        self.model = Qwen3Moe(build, self.parameters, RotaryEmbedding(self.config, 512, META))
        num_kv_heads = max(1, self.config.num_key_value_heads // self.parallel.attn_tp.size)
        self.caches = cache_tensors(2, NUM_BLOCKS, num_kv_heads, self.config.head_dim, torch.bfloat16, META, ops)

    def run(self, name: str) -> list[dict[str, Any]]:
        """Calls of a whole step, from token ids to logits."""
        step = make_step(name, self.parallel)
        with Recorder() as recorder:
            hidden_states, residual = self.model.forward(torch.empty_like(step.positions), step, self.caches)
            logits = self.model.logits(hidden_states, residual, step.max_dp_tokens)
        assert hidden_states.shape == residual.shape == (step.num_tokens, self.config.hidden_size)
        assert hidden_states.dtype == residual.dtype == torch.bfloat16 and logits.local.dtype == torch.float32
        return recorder.calls

    def run_layer(self, name: str) -> list[dict[str, Any]]:
        """Calls of one layer other than the first."""
        step = make_step(name, self.parallel)
        hidden_states = torch.empty(step.num_tokens, self.config.hidden_size, dtype=torch.bfloat16, device=META)
        cos_sin, step = self.ops.prepare_attention(self.model.rotary(step), step, hidden_states.dtype)
        self.model.decode_exchange.begin(step)
        with Recorder() as recorder:
            self.model.layers[1](hidden_states, hidden_states.clone(), cos_sin, self.caches[1], step)
        return recorder.calls[1:]  # without the clone

    def run_received(self) -> list[dict[str, Any]]:
        """Calls of the experts on rows already grouped by expert; no rows, no calls."""
        rows = torch.empty(37, self.config.hidden_size, dtype=torch.bfloat16, device=META)
        weights = [self.parameters[f"layers.0.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj")]
        routing = GroupedRows(torch.empty(weights[0].shape[0], dtype=torch.int64, device=META))
        with Recorder() as recorder:
            output = self.ops.experts(rows, routing, *weights)
            assert self.ops.experts(rows[:0], routing, *weights).shape == rows[:0].shape
        assert output.shape == rows.shape and output.dtype == rows.dtype
        return recorder.calls


def run_all(wheel: Path) -> dict[str, Any]:
    """Case -> recorded calls, or the traceback."""
    load(wheel)
    from ops import npu

    ops = npu.NpuOps("meta")
    results: dict[str, Any] = {"bindings": ops.bindings}
    with torch.no_grad():  # inference mode would hide the parts of composite operations
        for model in MODELS:
            for layout in LAYOUTS:
                results |= run_case(f"{model}-{layout}", Case(model, layout, ops))
                if model == "30b" and layout in UNFUSED:
                    results |= run_unfused(f"unfused-{layout}", layout, ops)
        results["weights"] = {
            name: type(value).__name__ for name, value in Case("30b", "1tp", ops).parameters.values.items()
        }
        results["fallbacks"] = ops.fallbacks(torch.bfloat16)
        for level in (1, 2):
            for name in ("ROTARY", "CACHE_WRITE", "ATTENTION", "GATING", "COMBINE", "LOCAL_EXPERTS", "REGROUP", "QKV"):
                setattr(npu, name, without_first(getattr(npu, name)))
            ops = npu.NpuOps("meta")
            results[f"bindings-fallback{level}"] = ops.bindings
            results[f"fallbacks-fallback{level}"] = ops.fallbacks(torch.bfloat16)
            results |= run_case(f"fallback{level}", Case("30b", "8ep", ops))
            results |= run_case(f"fallback{level}-gather", Case("30b", "8ep_gather", ops))
    return results


def backend_of(sources: dict[str, str]) -> Any:
    """Builds the package ops.npu from the source of each of its modules, after those that it imports."""
    package, missing = module("ops.npu"), dict(sources)
    while missing:
        needed = {
            name: set(re.findall(r"^from ops\.npu\.(\w+) import", missing[name], re.MULTILINE)) for name in missing
        }
        name = next(name for name in missing if not needed[name] & missing.keys())
        made = package if name == "__init__" else module(f"ops.npu.{name}")
        exec(compile(missing.pop(name), f"ops/npu/{name}.py", "exec"), made.__dict__)
    return package


def run_mutants(wheel: Path, sources: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Calls of a few cases for each mutated source of ops/npu, or the traceback where no backend can be built."""
    load(wheel)
    results = []
    for changed in sources:
        try:
            ops = backend_of(changed).NpuOps("meta")
            with torch.no_grad():
                found: dict[str, Any] = {}
                for layout in ("1tp", "128ep", "8ep_a2", "8ep_gather"):
                    found |= run_case(f"30b-{layout}", Case("30b", layout, ops))
                found |= run_unfused("unfused-1tp", "1tp", ops)
                results.append(found)
        except Exception:
            results.append({"30b-1tp-decode8": traceback.format_exc()})
    return results


def without_first(variants: dict[str, Any]) -> dict[str, Any]:
    """The variants with the first working one made to fail as an unsupported operation, unless it is the only one."""

    def fails(*_):
        raise RuntimeError("not supported")

    names = [name for name, variant in variants.items() if getattr(variant, "__name__", "") != "fails"]
    return variants | ({names[0]: fails} if len(names) > 1 else {})


def run_unfused(prefix: str, layout: str, ops: Any) -> dict[str, Any]:
    """As `run_case` for the 30B model with a call for each part of q/k norm, rotary embedding and cache write."""
    fused, ops.fused_qkv = ops.fused_qkv, None
    try:
        return run_case(prefix, Case("30b", layout, ops))
    finally:
        ops.fused_qkv = fused


def run_case(prefix: str, case: Case) -> dict[str, Any]:
    runs = {name: (case.run, name) for name in STEPS if name != "idle" or case.parallel.attn_dp.size > 1}
    runs |= {f"layer-{name}": (case.run_layer, name) for name in ("decode1", "decode8")}
    runs |= {"received": (case.run_received,)}
    results: dict[str, Any] = {}
    for name, (function, *arguments) in runs.items():
        try:
            results[f"{prefix}-{name}"] = function(*arguments)
        except Exception:  # reported by the test of this case
            results[f"{prefix}-{name}"] = traceback.format_exc()
    return results
