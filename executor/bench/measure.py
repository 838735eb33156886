# SPDX-License-Identifier: Apache-2.0
"""Latency measurement: rounds alternate between this engine and a peer on the same prompts."""

import argparse
from typing import Any

from executor.bench.common import check_finished, known
from executor.bench.floor import distinct_experts, step_bytes
from executor.bench.traffic import expected_run_bytes
from executor.llm import LLM
from executor.loading.device import peak_memory_bytes
from executor.sampling_params import SamplingParams
from executor.utils.report import percentiles
from ops.weight import DENSE

Run = tuple[list[list[int]], float, list[float]]  # token ids, ttft in ms, each decode step's time in ms


def measure(
    llm: LLM, peer: Any, prompts: list[list[int]], arguments: argparse.Namespace, gb_per_s: float
) -> list[dict[str, Any]]:
    """Measures this engine and each mode of the peer; returns a row for each. The first round is a warm-up.

    gb_per_s: read bandwidth ceiling of the device.
    """
    rounds: dict[str, list[Run]] = {"ours": []}
    peer_names = {}
    if peer is not None:
        from executor.bench.peers import EXPERTS_IMPLEMENTATIONS

        peer_names = {f"transformers {implementation}": implementation for implementation in EXPERTS_IMPLEMENTATIONS}
        rounds |= {name: [] for name in peer_names}
    llm.parallel.traffic.sent_bytes.clear()
    llm.runner.tokens_run = 0
    for _ in range(arguments.repeats + 1):
        rounds["ours"].append(generate(llm, prompts, arguments.new_tokens))
        for name, implementation in peer_names.items():
            rounds[name].append(peer.generate(prompts, arguments.new_tokens, implementation))
    rows = [row(llm, name, runs[1:], prompts, arguments.new_tokens) for name, runs in rounds.items()]
    rows[0]["peak_memory_bytes"] = peak_memory_bytes(llm.device)  # of the whole process, with loading and peer
    if llm.settings.world_size > 1:
        rows[0] |= traffic(llm, prompts, arguments.new_tokens, arguments.repeats + 1)
    for result in rows[1:]:
        result["ours_over_this"] = {
            "ttft": round(rows[0]["ttft_ms"]["p50"] / result["ttft_ms"]["p50"], 3),
            "tpot": round(rows[0]["tpot_ms"]["p50"] / result["tpot_ms"]["p50"], 3),
        }
        same = rounds["ours"][-1][0] == rounds[result["system"]][-1][0]
        result["same_tokens_as_ours"] = same
    floor = step_floor(llm, prompts, arguments.new_tokens, gb_per_s)
    return [result | floor | of_ceiling(result, floor, gb_per_s) for result in rows]


def generate(llm: LLM, prompts: list[list[int]], new_tokens: int) -> Run:
    """Runs one round; returns the times of the last prompt: after its prefill, all prompts decode together."""
    outputs = llm.generate(prompts, SamplingParams(max_new_tokens=new_tokens, ignore_eos=True), use_tqdm=False)
    check_finished(outputs)
    return [output.token_ids for output in outputs], known(outputs[-1].ttft_ms), outputs[-1].token_intervals_ms


def traffic(llm: LLM, prompts: list[list[int]], new_tokens: int, runs: int) -> dict[str, Any]:
    """Bytes sent and tokens processed by rank 0 per run, as counted and by the formulas of docs/parallelism.md."""
    names = ("attn_tp_size", "moe_tp_size", "embed_tp_size", "lmhead_tp_size")
    sent = sum(count for name, count in llm.parallel.traffic.sent_bytes.items() if name != "control")
    tokens = sum(map(len, prompts)) + len(prompts) * (new_tokens - 1)
    expected = expected_run_bytes(llm, [len(prompt) for prompt in prompts], new_tokens)
    return {
        "layout": {name: getattr(llm.settings.parallel_config, name) for name in names},
        "exchanges": {phase: type(llm.exchange(phase == "prefill")).__name__ for phase in ("prefill", "decode")},
        "tokens_of_job": tokens,
        "tokens_of_rank": llm.runner.tokens_run // runs,
        "sent_bytes_per_token": round(sent / runs / tokens, 1),
        "formula_bytes_per_token": round(expected / tokens, 1),
    }


def row(llm: LLM, system: str, runs: list[Run], prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    tpot = percentiles([interval for _, _, intervals in runs for interval in intervals])
    means = sorted(sum(intervals) / len(intervals) for _, _, intervals in runs)
    return {
        "system": system,
        "exe_mode": llm.settings.exe_mode if system == "ours" else "eager",
        "dtype": llm.settings.model_config.dtype,
        "quantization": ", ".join(name for name in llm.parameters.formats() if name != DENSE) or None,
        "world_size": llm.settings.world_size,
        "batch_size": len(prompts),
        "prompt_tokens": len(prompts[0]),
        "new_tokens": new_tokens,
        "repeats": len(runs),
        "ttft_ms": percentiles([ttft for _, ttft, _ in runs]),
        "tpot_ms": {**tpot, "mean": round(means[len(means) // 2], 4)},
        "tok_per_s": round(1e3 * len(prompts) / means[len(means) // 2], 2),
    }


def step_floor(llm: LLM, prompts: list[list[int]], new_tokens: int, gb_per_s: float) -> dict[str, Any]:
    """Bytes read by a decode step of rank 0 in the middle of the run, and the floor in ms."""
    own = len(prompts[llm.parallel.attn_dp.index :: llm.parallel.attn_dp.size])
    experts = distinct_experts(llm, prompts, new_tokens - 1)
    read_bytes = step_bytes(llm, own, len(prompts[0]) + new_tokens // 2, experts)
    total = sum(read_bytes.values())
    return {
        "distinct_experts_per_layer": round(experts, 2),
        "read_bytes_per_step": read_bytes,
        "read_bytes_per_token": round(total / max(1, own)),
        "floor_ms": round(total / gb_per_s / 1e6, 4),
    }


def of_ceiling(result: dict[str, Any], floor: dict[str, Any], gb_per_s: float) -> dict[str, float]:
    achieved = sum(floor["read_bytes_per_step"].values()) / result["tpot_ms"]["p50"] / 1e6
    return {"achieved_gb_per_s": round(achieved, 2), "fraction_of_ceiling": round(achieved / gb_per_s, 4)}
