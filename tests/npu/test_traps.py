# SPDX-License-Identifier: Apache-2.0
"""Pitfalls of the vendor's operations: a backend with any one of them must differ from the reference."""

import types

import pytest

from ops import ascend
from ops.ascend import MIB, ExchangeSizes
from tests.npu.emulator import exchange_rules, set_product
from tests.npu.schemas import BACKEND
from tests.npu.trap_runs import run_sources, too_small_buffer
from tests.npu.wheels import VERSIONS, unzipped
from tests.parallel.ranks import run_ranks

MASK = "self.causal_mask = torch.ones(2048, 2048, dtype=torch.int8).tril(-1)"
CACHED_LENS = "[max(1, total - new) for total, new in zip(step.seq_lens_list, step.query_lens_list)]"
ROTATION = "query, key = self.rotate(query, key, *cos_sin)"
# numbered in order of the forward pass
TRAPS = {
    "1 gating alone does not renormalise": ("renorm=int(renormalize)", "renorm=0"),
    "2 row_idx_type 1 is the inverse permutation": ("row_idx_type=0,", "row_idx_type=1,"),
    "3 finalize_routing reads the index as k * T + t": ("None, drop_pad_mode=2)", "None)"),
    "4 grouped_matmul takes cumulative counts": ("group_list_type=0 if tokens_per_expert.shape[0] == 1 else 1,", ""),
    "5 the default range of experts is fixed by the first call": ("active_expert_range=experts,", ""),
    "5 the range of experts is this rank's": ("[routing.first, routing.first + count]", "[0, count]"),
    "5 ids are below expert_num": ("EXPERT_IDS, self.combine_local", "count, self.combine_local"),
    "3 rows of other ranks have index -1": ("None, drop_pad_mode=3)", "None, drop_pad_mode=2)"),
    "6 attention does not scale": ("softmax_scale=query.shape[2] ** -0.5,", ""),
    "6 True in a mask means masked": ("self.causal_mask = torch.ones(2048, 2048, dtype=torch.int8).triu(1)", MASK),
    "7 lengths of paged keys are not cumulative": (
        "paged = step.seq_lens_list,",
        "paged = list(accumulate(step.seq_lens_list)),",
    ),
    "7 lengths of queries are cumulative, also with paged keys": (
        "step.query_ends, lengths, *paged",
        "step.query_ends if paged[0] is None else step.query_lens_list, lengths, *paged",
    ),
    "7 the new tokens are among the paged keys": ("paged = step.seq_lens_list,", f"paged = {CACHED_LENS},"),
    "8 rotary embedding works in place": (ROTATION, f"{ROTATION.partition('= ')[2]}\n        {ROTATION}"),
    "9 gate comes first in SwiGLU": (
        "npu.npu_swiglu(gate_up, -1)",
        "npu.npu_swiglu(gate_up.roll(gate_up.shape[1] // 2, 1), -1)",
    ),
}
QUANTIZED = {
    "11 offsets are added before the scale": ("offsets = SYMMETRIC_ZERO -", "offsets = scales * SYMMETRIC_ZERO -"),
    "11 the offset of unsigned values is 8": ("offsets = SYMMETRIC_ZERO -", "offsets = 0 -"),
    "11 4 bits are two's complement": ("unpack_int4(packed) ^ SYMMETRIC_ZERO", "unpack_int4(packed)"),
    "11 4 bits are packed along N": ("pack_int4(values.t())", "pack_int4(values).view_as(target)"),
    "11 a group size of 0 means one group": ("antiquant_group_size=0 if", "antiquant_group_size=0 if True or"),
    "12 the grouped matmul takes scales of the output's dtype": (
        "scales.bfloat16() if dtype is torch.bfloat16 else scales",
        "scales",
    ),
    "12 int8 products are int8 by default": ("row_scales, output_dtype=dtype", "row_scales"),
    "12 rows have scales": ("pertoken_scale=row_scales, ", ""),
    "12 rows of experts have scales": ("[row_scales], weight.dtype", "None, weight.dtype"),
    "12 sorting rounds only if told": ("DYNAMIC if is_int8 else FLOAT)", "FLOAT)"),
    "12 SwiGLU takes cumulative counts by default": ("tokens_per_expert, group_list_type=1", "tokens_per_expert"),
    "12 SwiGLU takes FRACTAL_NZ": ("data=cast_to_nz(weight.data))", "data=weight.data)"),
    "13 static values are qint8": ("torch.qint8, -1, True)", "torch.int8, -1, True)"),
    "13 static scales divide": ("torch.qint8, -1, True)", "torch.qint8, -1, False)"),
    "13 static values have an offset": ("weight.column_offsets,", "None,"),
    "13 the fused norm takes bfloat16": (
        "(torch.bfloat16, torch.bfloat16) if rounded",
        "(torch.float32, torch.int32) if rounded",
    ),
    "13 the fused norm takes scales per column": (
        "input_scale.repeat(columns).to(column_dtypes[0])",
        "input_scale.to(column_dtypes[0])",
    ),
    "13 the norm has a bias": ("        weight.input_bias,\n        epsilon", "        None,\n        epsilon"),
    "13 the norm has a bias, unfused": ("hidden_states = hidden_states + weight.input_bias", "pass"),
    "13 sums are corrected": ("bias=weight.quant_bias, ", ""),
}
MANY = ("MAX_EXPERT_TOKENS = 8192", "MAX_EXPERT_TOKENS = 7")  # avoids long prompts
CHUNKING = {
    "tokens of a chunk": ("routing.topk_ids[part]", "routing.topk_ids[: part.stop - part.start]"),
    "rows of a chunk": (".clamp(0, MAX_EXPERT_ROWS)", ""),
}
BUFFERS = {
    "10 a row in the buffer is padded and has metadata": (
        "round_up(round_up(2 * sizes.hidden_size, 32) + 64, 512)",
        "2 * sizes.hidden_size",
    ),
    "10 the buffer is doubled": ("return 2 * (received", "return (received"),
    "10 A2 reserves another 2 MB": (" + 2 * MIB)", ")"),
    "10 A3 between super-nodes reserves another 404 MB": (" + 404 * MIB", ""),
}


def wheel_or_skip() -> str:
    path = unzipped(VERSIONS[0])
    if path is None:
        pytest.skip(f"torch_npu {VERSIONS[0]} is neither in the cache folder nor to be had from a package index")
    return str(path)


def replaced(sources: dict[str, str], old: str, new: str) -> dict[str, str]:
    [changed] = [name for name, source in sources.items() if old in source]
    return sources | {changed: sources[changed].replace(old, new, 1)}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[str]]:
    sources = {file.stem: file.read_text(encoding="utf-8") for file in BACKEND.glob("*.py")}
    in_chunks = replaced(sources, *MANY)
    broken = {"": sources, "in chunks": in_chunks}
    broken |= {trap: replaced(sources, *change) for trap, change in (TRAPS | QUANTIZED).items()}
    broken |= {part: replaced(in_chunks, *change) for part, change in CHUNKING.items()}
    return run_ranks(1, run_sources, tmp_path_factory.mktemp("traps"), wheel_or_skip(), broken, list(QUANTIZED))[0]


@pytest.mark.parametrize("trap", TRAPS | QUANTIZED)
def test_a_pitfall_is_detected(found, trap):
    assert not found[""], "the backend itself agrees with the reference"
    assert found[trap]


def test_long_prefills_run_the_experts_in_chunks(found):
    assert not found["in chunks"]
    assert all(found[part] for part in CHUNKING)


def disagreements(rules: types.ModuleType) -> int:
    """Number of sizes for which `rules` and the emulator, written from the same pages, need different buffers."""
    count = 0
    for product, algorithms in rules.ALGORITHMS.items():
        set_product(product)
        for algorithm in algorithms:
            for ranks in (16, 64):
                for tokens in (1, 7, 128, 256):
                    for hidden in (1056, 2048, 4096):
                        sizes = ExchangeSizes(ranks=ranks, tokens=tokens, experts=128, top_k=8, hidden_size=hidden)
                        exchange = exchange_rules.Exchange(
                            ranks=ranks,
                            rank=0,
                            experts=128,
                            tokens=tokens,
                            hidden=hidden,
                            k=8,
                            global_bs=0,
                            algorithm=algorithm.name,
                            quant_mode=0,
                            shared=(algorithm.shared_expert_num, 0),
                            tp_world_size=algorithm.tp_world_size,
                        )
                        exchange_rules.check(exchange._replace(tokens=1), combine=False)
                        count += algorithm.buffer_bytes(sizes) != exchange_rules.buffer_bytes(exchange)
    return count


@pytest.fixture
def large_buffer(monkeypatch):
    monkeypatch.setenv("HCCL_BUFFSIZE", "1000")


def test_buffer_sizes_equal_the_emulators(large_buffer):
    assert disagreements(ascend) == 0


@pytest.mark.parametrize("trap", BUFFERS)
def test_a_wrong_buffer_formula_is_detected(trap, large_buffer):
    old, new = BUFFERS[trap]
    source = (BACKEND.parent / "ascend.py").read_text(encoding="utf-8")
    assert source.count(old) == 1
    rules = types.ModuleType("rules")
    exec(compile(source.replace(old, new), "ascend.py", "exec"), rules.__dict__)
    assert disagreements(rules) > 0


def test_a_too_small_buffer_of_the_user_is_refused(tmp_path):
    """2 MB and room for 512 rows from each of the 2 ranks, of 128 numbers and 4 experts, all of it twice."""
    need = -(-2 * (2 * 256 * 4 * 128 * 2 + 2 * MIB) // MIB)
    [said] = run_ranks(1, too_small_buffer, tmp_path, wheel_or_skip(), "4")
    assert said.startswith(
        "HCCL_BUFFSIZE: 4 MB given, but dispatch and combine (fullmesh, 2 ranks, 256 tokens on each)"
    )
    assert said.endswith(f"need {need} MB; raise it, or leave it unset")
