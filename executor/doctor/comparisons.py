# SPDX-License-Identifier: Apache-2.0
"""Compares the NPU backend's operations with the reference, which computes in float32 on the CPU.

Every family of vendor calls takes part with each of its variants, not with the bound one alone.
"""

import dataclasses
from collections.abc import Callable, Iterator

import torch

from executor.device import synchronize
from executor.doctor.inputs import BLOCK_SIZE, DTYPE, Inputs, Pair, Shapes
from ops import DenseWeight, GroupedRows, Ops, Routing, StepMetadata
from ops.npu import NpuOps
from ops.npu.variants import ATTENTION, CACHE_WRITE, COMBINE, GATING, REGROUP, ROTARY, TRIALS
from ops.reference import ReferenceOps

EPS = 1e-6
ROUNDED_ONCE, ROUNDED_OFTEN = 0.01, 0.02  # limits of the error; bfloat16 rounds a number by up to 0.004 of it
TOKENS = (1, 8, 300)
MANY_TOKENS = 2000  # gating kernels may change at 1024
PREFILL_LENS, DECODE_LENS = [300, 1, 128], [1, 128, 129, 700, 1500]
FAMILIES = {  # its attribute of the backend, its variants, the operation that uses it
    "rotary": ("rotate", ROTARY, "attention"),
    "cache write": ("write_cache", CACHE_WRITE, "attention"),
    "attention": ("attend", ATTENTION, "attention"),
    "gating": ("choose_experts", GATING, "route"),
    "combine": ("combine", COMBINE, "experts"),
    "regroup": ("regroup_rows", REGROUP, "regroup"),
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One comparison. Without an error, `problem` says what happened; `absent` variants are replaced by others."""

    operation: str  # of ops.Ops
    variant: str  # the vendor's operation that this is about
    case: str
    error: float | None
    limit: float
    problem: str = ""
    absent: bool = False

    @property
    def verdict(self) -> str:
        if self.absent:
            return "not usable"
        if self.error is None:
            return "FAILS"
        return "ok" if self.error <= self.limit else "DIFFERS"

    @property
    def fine(self) -> bool:
        return self.verdict in ("ok", "not usable")


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected| of the worst row, so that one wrong row of many is seen.

    Rows far smaller than the others count as if they had a hundredth of the mean length.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"the result is {list(actual.shape)}, not {list(expected.shape)}")
    lengths = expected.norm(dim=-1)
    differences = (actual.to("cpu", torch.float32) - expected).norm(dim=-1)
    errors = differences / lengths.clamp(min=max(0.01 * float(lengths.mean()), 1e-20))
    return float(errors.nan_to_num(nan=torch.inf).max())


class Comparisons:
    """Those of one shape; `run` yields them as they are made."""

    def __init__(self, ops: NpuOps, device: torch.device, shapes: Shapes):
        self.ops = ops
        self.reference = ReferenceOps()
        self.shapes = shapes
        self.inputs = Inputs(device, shapes)

    def run(self) -> Iterator[Finding]:
        yield from self.elementwise()
        yield from self.linear()
        for what, (attribute, variants, operation) in FAMILIES.items():
            bound = getattr(self.ops, attribute)
            for name, variant in variants.items():
                try:
                    TRIALS[what](variant, str(self.inputs.device))
                    synchronize(self.inputs.device)  # launches fail late
                except (RuntimeError, AttributeError) as error:
                    yield Finding(
                        operation, name, self.shapes.name, None, ROUNDED_OFTEN, first_line(error), absent=True
                    )
                    continue
                setattr(self.ops, attribute, variant)
                yield from getattr(self, operation)(name)
                if what == "attention":
                    yield self.graph(name)
            setattr(self.ops, attribute, bound)

    def compare(self, operation: str, variant: str, case: str, run: Callable[[], Pair], limit: float) -> Finding:
        error, problem = None, ""
        try:
            error = relative_error(*run())
        except Exception as raised:  # whatever it is, the other comparisons are wanted all the same
            problem = f"{type(raised).__name__}: {first_line(raised)}"
        return Finding(operation, variant, f"{self.shapes.name}, {case}", error, limit, problem)

    def elementwise(self) -> Iterator[Finding]:
        """Embedding, activation, norms."""
        random, to_device, shapes = self.inputs.random, self.inputs.to_device, self.shapes
        table, norm = random(1000, shapes.hidden_size), self.inputs.norm_weight(shapes.hidden_size)
        for tokens in TOKENS:
            hidden, residual = random(tokens, shapes.hidden_size), random(tokens, shapes.hidden_size)
            for operation, variant, arguments in (
                ("embedding", "embedding", (torch.arange(tokens), table)),
                ("silu_and_mul", "npu_swiglu", (random(tokens, 2 * shapes.width),)),
                ("add_norm", "npu_rms_norm", (hidden, None, norm, EPS)),
                ("add_norm", "npu_add_rms_norm", (hidden, residual, norm, EPS)),
            ):

                def run(operation=operation, arguments=arguments) -> Pair:
                    moved = [to_device(value) if torch.is_tensor(value) else value for value in arguments]
                    actual, expected = (
                        getattr(ops, operation)(*given)
                        for ops, given in ((self.ops, moved), (self.reference, arguments))
                    )
                    return (torch.cat(actual), torch.cat(expected)) if operation == "add_norm" else (actual, expected)

                yield self.compare(operation, variant, f"{tokens} tokens", run, ROUNDED_ONCE)

    def linear(self) -> Iterator[Finding]:
        """The products of a layer and the head's."""
        shapes = self.shapes
        heads = shapes.num_heads * shapes.head_dim
        for name, size in (
            ("qkv", (shapes.qkv_width, shapes.hidden_size)),
            ("o", (shapes.hidden_size, heads)),
            ("head", (shapes.vocab_size, shapes.hidden_size)),
        ):
            right, weight = self.inputs.weight(self.ops, *size)
            variant = "mm, plain weight" if isinstance(weight, DenseWeight) else "mm, FRACTAL_NZ weight"
            for tokens in TOKENS:
                hidden = self.inputs.random(tokens, size[1])

                def run(hidden=hidden, right=right, weight=weight) -> Pair:
                    actual = self.ops.linear(self.inputs.to_device(hidden), weight)
                    return actual, self.reference.linear(hidden, right)

                yield self.compare("linear", variant, f"{name}, {tokens} tokens", run, ROUNDED_ONCE)

    def attention(self, variant: str) -> Iterator[Finding]:
        """The output, and what the cache holds afterwards."""
        for case, lens in (("prefill", PREFILL_LENS), ("decode", DECODE_LENS), ("decode", [1])):
            step, tensors = self.inputs.step(lens, case == "prefill"), self.attention_tensors(lens, sum(lens))
            if case == "decode":
                tensors[0] = tensors[0][: len(lens)]

            def run(step=step, tensors=tensors) -> Pair:
                moved = [self.inputs.to_device(tensor) for tensor in tensors]
                actual = self.attend(self.ops, *self.inputs.on_device(step), moved)
                return actual, self.attend(self.reference, self.inputs.cos_sin(step), step, tensors)

            yield self.compare("attention", variant, f"{case}, {len(lens)} sequences", run, ROUNDED_OFTEN)

    def attention_tensors(self, lens: list[int], tokens: int) -> list[torch.Tensor]:
        """qkv, the norms' weights, the caches as if every slot had been written."""
        random, shapes = self.inputs.random, self.shapes
        num_blocks = 1 + sum(-(-length // BLOCK_SIZE) for length in lens)
        cache = (num_blocks, BLOCK_SIZE, shapes.num_kv_heads, shapes.head_dim)
        norms = [self.inputs.norm_weight(shapes.head_dim) for _ in range(2)]
        return [random(tokens, shapes.qkv_width), *norms, random(*cache), random(*cache)]

    def attend(self, ops: Ops, cos_sin: Pair, step: StepMetadata, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Output and caches, which are written in place, as rows of a head each."""
        qkv, q_norm, k_norm, *caches = tensors
        cos_sin, step = ops.prepare_attention(cos_sin, step, qkv.dtype)
        output = ops.attention(qkv, q_norm, k_norm, EPS, cos_sin, *caches, step)
        return torch.cat([part.reshape(-1, self.shapes.head_dim) for part in (output, *caches)])

    def graph(self, variant: str) -> Finding:
        """A decode step's attention recorded with lengths of 1 and replayed with others, against the same launched."""
        step = self.inputs.step(DECODE_LENS, is_prefill=False)
        tensors = self.attention_tensors(DECODE_LENS, len(DECODE_LENS))

        def run() -> Pair:
            launched, recorded = ([self.inputs.to_device(tensor) for tensor in tensors] for _ in range(2))
            cos_sin, moved = self.inputs.on_device(step)
            expected = self.attend(self.ops, cos_sin, moved, launched).cpu().float()
            before = dataclasses.replace(moved, seq_lens_list=[1] * len(DECODE_LENS))
            recorder = self.ops.graph_recorder()
            actual, replay = recorder.record(lambda: self.attend(self.ops, cos_sin, before, recorded))
            replay(DECODE_LENS)
            return actual, expected

        return self.compare(
            "attention", f"{variant}, graph", f"decode, {len(DECODE_LENS)} sequences", run, ROUNDED_ONCE
        )

    def route(self, variant: str) -> Iterator[Finding]:
        """The weights against those of the best experts, and against those that the chosen ids should have.

        The ids themselves may differ where two experts are equal but for rounding.
        """
        random, to_device, shapes = self.inputs.random, self.inputs.to_device, self.shapes
        norm = self.inputs.norm_weight(shapes.hidden_size)
        router = random(shapes.num_experts, shapes.hidden_size, std=shapes.hidden_size**-0.5)
        for tokens in (*TOKENS, MANY_TOKENS):
            hidden, residual = random(tokens, shapes.hidden_size), random(tokens, shapes.hidden_size)

            def run(hidden=hidden, residual=residual) -> Pair:
                moved = [to_device(value) for value in (hidden, residual, norm)]
                routing = self.ops.route(*moved, EPS, to_device(router), shapes.top_k, True)[2].chosen()
                weights, ids = routing.topk_weights.cpu().float(), routing.topk_ids.cpu().long()
                normed = self.reference.add_norm(hidden, residual, norm, EPS)[0]
                shares = (normed @ router.t()).softmax(dim=-1)
                right = torch.cat([shares.gather(1, ids), shares.topk(shapes.top_k).values])
                actual = torch.cat([weights, weights.sort(descending=True).values])
                return actual, right / right.sum(dim=-1, keepdim=True)

            yield self.compare("route", variant, f"{tokens} tokens", run, ROUNDED_OFTEN)

    def experts(self, variant: str) -> Iterator[Finding]:
        """All experts here, half of them elsewhere (the grouped products get more rows than they count), one alone."""
        random, to_device, shapes = self.inputs.random, self.inputs.to_device, self.shapes
        for local in (shapes.num_experts, shapes.num_experts // 2, 1):
            gate_up = self.inputs.weight(self.ops, local, 2 * shapes.width, shapes.hidden_size)
            down = self.inputs.weight(self.ops, local, shapes.hidden_size, shapes.width)
            for tokens in TOKENS:
                hidden = random(tokens, shapes.hidden_size)
                ids = torch.rand(tokens, shapes.num_experts, generator=self.inputs.generator).topk(shapes.top_k).indices
                weights = random(tokens, shapes.top_k).softmax(dim=-1).to(DTYPE).float()
                routing = Routing(weights, ids.clamp(max=local), has_elsewhere=local < shapes.num_experts)

                def run(hidden=hidden, routing=routing, gate_up=gate_up, down=down) -> Pair:
                    parts = [to_device(part) for part in (routing.topk_weights, routing.topk_ids)]
                    moved = Routing(*parts, routing.has_elsewhere)
                    actual = self.ops.experts(to_device(hidden), moved, gate_up[1], down[1])
                    return actual, self.reference.experts(hidden, routing, gate_up[0], down[0])

                case = f"{tokens} tokens, {local} of {shapes.num_experts} experts"
                yield self.compare("experts", variant, case, run, ROUNDED_OFTEN)

    def regroup(self, variant: str) -> Iterator[Finding]:
        """Rows of several ranks, some without any for an expert, put by expert; then each through its expert."""
        shapes, local = self.shapes, self.shapes.num_experts // 4
        gate_up = self.inputs.weight(self.ops, local, 2 * shapes.width, shapes.hidden_size)
        down = self.inputs.weight(self.ops, local, shapes.hidden_size, shapes.width)
        for rows in TOKENS:
            hidden = self.inputs.random(rows, shapes.hidden_size)
            cells = torch.randint(4 * local, (rows,), generator=self.inputs.generator)
            counts = cells.bincount(minlength=4 * local).view(4, local)

            def run(hidden=hidden, counts=counts) -> Pair:
                moved = self.inputs.to_device(hidden), counts.to(self.inputs.device)
                actual, expected = (
                    ops.experts(grouped, GroupedRows(per_expert), gate_up[which], down[which])
                    for which, ops, given in ((1, self.ops, moved), (0, self.reference, (hidden, counts)))
                    for grouped, _, per_expert in [ops.regroup(*given)]
                )
                return actual, expected

            yield self.compare("regroup", variant, f"{rows} rows", run, ROUNDED_OFTEN)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
