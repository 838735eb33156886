# SPDX-License-Identifier: Apache-2.0
"""Every call of the NPU backend with quantised weights at the real shapes, checked as in test_meta.py."""

import pytest
import torch

from tests.npu.quantized_meta import FORMATS, LAYOUTS, REPLACED, run_mutants, run_quantized
from tests.npu.schemas import BACKEND
from tests.npu.test_meta import CONTRACTS, RUNS, check_case, check_swiglu, launches_of, run_meta
from tests.npu.wheels import VERSIONS

CASES = [f"{model}-{name}-{layout}-{run}" for model, layout in LAYOUTS for name in FORMATS for run in RUNS]
CASES += [f"{how}-{name}-{run}" for how in REPLACED for name in FORMATS for run in RUNS]
BFLOAT16, QINT8 = 15, 12  # what torch passes where a schema takes a dtype as an int
HALVES = ("bfloat16", "float16")
# before 2.13 the meta function refuses the schema's default of dequant_dtype, 0
TAKES_SWIGLU = ("2.13.0", "2.14.0")


@pytest.fixture(params=VERSIONS[1:3], scope="module")  # the oldest and the newest: without and with fused SwiGLU
def results(request, tmp_path_factory) -> dict:
    return run_meta(request.param, run_quantized, tmp_path_factory.mktemp("meta")) | {"version": request.param}


def check_init_routing(given, run):
    assert given["quant_mode"] in (-1, 1) and given["scale"] is None
    assert given["quant_mode"] == -1 or given["x"]["dtype"] in HALVES
    CONTRACTS["npu_moe_init_routing_v2"](given | {"quant_mode": -1}, run)


def check_grouped_matmul(given, run):
    """int8 with scales of the output's dtype, 4 bits packed along N with scales and offsets, or plain."""
    [rows], [weight] = given["x"], given["weight"]
    experts, inner, width = weight["shape"]
    packed = weight["dtype"] == "int32"
    width *= 8 if packed else 1
    assert weight["contiguous"] and given["tuning_config"] is given["bias"] is given["offset"] is None
    if rows["dtype"] == "int8":
        [scale], [row_scale] = given["scale"], given["per_token_scale"]
        assert scale["shape"] == [experts, width] and row_scale["shape"] == rows["shape"][:1]
        assert row_scale["dtype"] == "float32" and scale["contiguous"]
        assert (scale["dtype"], given["output_dtype"]) == ("bfloat16", BFLOAT16)  # the default is int8
    else:
        assert given["scale"] is given["per_token_scale"] is given["output_dtype"] is None
    if packed:
        [scale], [offset] = given["antiquant_scale"], given["antiquant_offset"]  # both are needed
        assert scale == offset and scale["dtype"] == rows["dtype"] and scale["contiguous"]
        assert scale["shape"][::2] == [experts, width] and inner % scale["shape"][1] == 0
        weight = weight | {"dtype": rows["dtype"]}
    else:
        assert given["antiquant_scale"] is given["antiquant_offset"] is None
    CONTRACTS["npu_grouped_matmul"](given | {"weight": [weight]}, run)


def check_swiglu_quant(given, run):
    rows, [weight], [scale], row_scale = (given[name] for name in ("x", "weight", "weight_scale", "x_scale"))
    experts, inner, width = weight["shape"]
    counts = given["group_list"]
    assert rows["dtype"] == weight["dtype"] == "int8" and rows["shape"][1] == inner and weight["contiguous"]
    assert scale["shape"] == [experts, width] and scale["dtype"] == row_scale["dtype"] == "float32"
    assert row_scale["shape"] == rows["shape"][:1] and inner < 65536 and inner % 16 == 0
    assert width % 128 == 0 and width <= 10240  # an expert width of 96 is in no table and in no one's use
    assert counts["shape"] == [experts] and counts["dtype"] == "int64" and given["group_list_type"] == 1
    assert given["smooth_scale"] is given["bias"] is given["tuning_config"] is None


def check_dynamic_quant(given, run):
    assert given["input"]["dtype"] in HALVES and len(given["input"]["shape"]) == 2 and given["input"]["contiguous"]
    assert given["smooth_scales"] is given["group_index"] is given["dst_type"] is None


def check_quantize(given, run):
    assert given["input"]["dtype"] in HALVES and given["div_mode"] is True and given["axis"] == -1
    assert given["dtype"] == QINT8  # int8 is refused
    scales, points = given["scales"], given["zero_points"]
    assert scales["shape"] == points["shape"] == [1] and (scales["dtype"], points["dtype"]) == ("float32", "int32")


def check_quant_matmul(given, run):
    rows, weight, scale, row_scale, bias = (given[name] for name in ("x1", "x2", "scale", "pertoken_scale", "bias"))
    inner, width = weight["shape"]
    assert rows["dtype"] == weight["dtype"] == "int8" and rows["shape"][1] == inner and weight["contiguous"]
    assert scale["shape"] == [width] and scale["dtype"] == "float32" and max(inner, width) <= 65535
    assert given["output_dtype"] == BFLOAT16  # the default is int8
    if row_scale is None:
        assert bias["shape"] == [width] and bias["dtype"] == "int32" and bias["contiguous"]
    else:
        assert row_scale["shape"] == rows["shape"][:1] and row_scale["dtype"] == "float32" and bias is None


def check_weight_quant(given, run):
    rows, weight, scale, offset = (given[name] for name in ("x", "weight", "antiquant_scale", "antiquant_offset"))
    inner, width = weight["shape"][0], weight["shape"][1] * 8
    size = given["antiquant_group_size"]
    assert weight["dtype"] == "int32" and weight["contiguous"] and rows["shape"][1] == inner
    assert scale == offset and scale["dtype"] == rows["dtype"]
    assert 32 <= size < inner and size % 32 == 0 and scale["shape"] == [inner // size, width]
    assert given["inner_precise"] == 0 and given["bias"] is None and max(inner, width) <= 65535


def check_norm_quant(given, run):
    CONTRACTS["npu_add_rms_norm"](given, run)
    for name in ("scales1", "zero_points1", "beta"):  # scales in the activations' dtype
        assert given[name]["shape"] == given["gamma"]["shape"] and given[name]["dtype"] == "bfloat16"
    assert given["scales2"] is given["zero_points2"] is None and given["div_mode"] is True and given["axis"] == -1


def check_norm_dynamic_quant(given, run):
    CONTRACTS["npu_add_rms_norm"](given, run)
    assert given["output_mask"] == [True, False]  # the default of some versions is refused
    assert given["smooth_scale1"] is given["smooth_scale2"] is given["beta"] is given["y_dtype"] is None


QUANTIZED = {
    "npu_moe_init_routing_v2": check_init_routing,
    "npu_grouped_matmul": check_grouped_matmul,
    "npu_grouped_matmul_swiglu_quant_v2": check_swiglu_quant,
    "npu_dynamic_quant": check_dynamic_quant,
    "npu_quantize": check_quantize,
    "npu_quant_matmul": check_quant_matmul,
    "npu_weight_quant_batchmatmul": check_weight_quant,
    "npu_add_rms_norm_quant": check_norm_quant,
    "npu_add_rms_norm_dynamic_quant": check_norm_dynamic_quant,
    "npu_swiglu": check_swiglu,
}


@pytest.mark.parametrize("case", CASES)
def test_calls(results, case):
    check_case(results, case, CONTRACTS | QUANTIZED)


NORM_LINEAR = {
    "w8a8": "add_rms_norm_dynamic_quant quant_matmul",
    "w8a8-static": "add_rms_norm_quant quant_matmul",
    "w4a16": "add_rms_norm weight_quant_batchmatmul",
    "fp8": "add_rms_norm mm",
}
NORM_AND_LINEAR = {
    "w8a8": "add_rms_norm dynamic_quant quant_matmul",
    "w8a8-static": "add_rms_norm add quantize quant_matmul",
}
LINEAR = {
    "w8a8": "dynamic_quant quant_matmul",
    "w8a8-static": "quantize quant_matmul",
    "w4a16": "weight_quant_batchmatmul",
    "fp8": "mm",
}
ATTENTION, ROUTE = (
    "qkv_rms_norm_rope_cache fused_infer_attention_score_v2",
    "add_rms_norm mm moe_gating_top_k_softmax_v2",
)
FUSED, INT8 = "grouped_matmul_swiglu_quant_v2 grouped_matmul", "grouped_matmul swiglu dynamic_quant grouped_matmul"
FLOAT = "grouped_matmul swiglu grouped_matmul"


def expected_launches(version: str, format_name: str, layout: str, parts: bool = False) -> list[str]:
    is_int8, dispatched = format_name.startswith("w8a8"), layout in ("8ep", "128ep")
    experts = FLOAT
    if is_int8:
        experts = FUSED if version in TAKES_SWIGLU and layout != "16tp" and not parts else INT8  # width 96
        experts = f"dynamic_quant {experts}" if dispatched else experts
    around = ("_to_copy moe_distribute_dispatch_v2", "moe_distribute_combine_v2")
    first, last = around if dispatched else ("moe_init_routing_v2", "moe_finalize_routing")
    norm_linear = (NORM_LINEAR | NORM_AND_LINEAR if parts else NORM_LINEAR)[format_name]
    return f"{norm_linear} {ATTENTION} {LINEAR[format_name]} {ROUTE} {first} {experts} {last}".split()


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(("model", "layout"), LAYOUTS)
@pytest.mark.parametrize("name", FORMATS)
def test_launches_of_a_decode_layer(results, name, model, layout, batch):
    expected = expected_launches(results["version"], name, layout)
    assert launches_of(results, f"{model}-{name}-{layout}-layer-decode{batch}") == expected
    if results["version"] in TAKES_SWIGLU and not layout.endswith("ep"):
        assert len(expected) == (15 if name.startswith("w8a8") and layout == "16tp" else 13)


@pytest.mark.parametrize("name", FORMATS)
def test_launches_of_replacements(results, name):
    version = results["version"]
    assert launches_of(results, f"parts-{name}-layer-decode8") == expected_launches(version, name, "1tp", parts=True)
    if name != "w8a8-static":  # which cannot be dequantised
        plain = expected_launches(version, "fp8", "1tp")
        assert launches_of(results, f"dequantised-{name}-layer-decode8") == plain


def test_what_is_replaced_is_named(results):
    takes = results["version"] in TAKES_SWIGLU
    assert results["fallbacks"] == [f"silu_and_mul w8a8 (npu_dynamic_quant{': 192 rows' if takes else ''})"]
    assert results["float16"] is torch.float32  # scales of the grouped matmul


MUTANTS = [
    ("epsilon=eps, output_mask=[True, False]", "epsilon=eps"),
    ("epsilon=eps, output_mask=[True, False]", "output_mask=[True, False]"),
    ("        epsilon=eps,\n        div_mode", "        div_mode"),
    (" and width % SWIGLU_WIDTHS == 0", ""),
    ("scales.bfloat16() if dtype is torch.bfloat16 else scales", "scales"),
    ("output_dtype=output_dtype,", ""),
    ("pertoken_scale=row_scales, output_dtype=dtype", "pertoken_scale=row_scales"),
    ("bias=weight.quant_bias, output_dtype=dtype", "bias=weight.quant_bias"),
    ("row_scales, tokens_per_expert, group_list_type=1", "row_scales, tokens_per_expert"),
    ("antiquant_group_size=0 if", "antiquant_group_size=0 if True or"),
    ("torch.qint8, -1, True)", "torch.int8, -1, True)"),
    ("DYNAMIC if is_int8 else FLOAT)", "FLOAT)"),
]


USUAL, NARROW = ("30b", "1tp"), ("235b", "16tp")  # the second: experts of width 96


@pytest.fixture(scope="module")
def mutants(tmp_path_factory) -> list[dict]:
    sources = {file.stem: file.read_text(encoding="utf-8") for file in BACKEND.glob("*.py")}
    mutated = [(sources, [USUAL, NARROW])]
    for old, new in MUTANTS:
        [changed] = [name for name, source in sources.items() if old in source]
        layout = NARROW if "width" in old else USUAL
        mutated.append((sources | {changed: sources[changed].replace(old, new, 1)}, [layout]))
    return run_meta(VERSIONS[0], run_mutants, tmp_path_factory.mktemp("mutants"), mutated)


@pytest.mark.parametrize("index", range(len(MUTANTS)), ids=[old for old, _ in MUTANTS])
def test_a_broken_call_is_detected(mutants, index):
    original, mutant = mutants[0], mutants[1 + index]
    cases = [case for case in CASES if case in mutant]
    detected = 0
    for case in cases:
        check_case(original, case, CONTRACTS | QUANTIZED)
        try:
            check_case(mutant, case, CONTRACTS | QUANTIZED)
        except (AssertionError, KeyError):
            detected += 1
    assert detected
