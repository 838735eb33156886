# SPDX-License-Identifier: Apache-2.0
"""Time to the first token and time of each further one.

A YAML with several ranks has them started here; rank 0 reports. Figures are medians over repeats that take turns with
the peer's, so that a machine which changes its speed slows both. Times are in ms; absolute ones mean something
only on a machine that does nothing else.
"""

import argparse
import gc
from typing import Any

from executor.bench.common import build_llm, command_parser, is_first_rank, settings_of, start_ranks, write_report
from executor.sampling_params import SamplingParams
from executor.utils.report import percentiles, table


def run(command_line: list[str]) -> None:
    """Measures every combination, prints the table and writes the report."""
    arguments = parse(command_line)
    if arguments.new_tokens < 2:
        raise ValueError("--new-tokens: at least 2 are needed for a time between tokens")
    settings = [settings_of(arguments, f"exe_mode={mode}") for mode in arguments.exe_mode]
    start_ranks(settings[0])
    from executor.device import device_name

    results = []
    for one_mode in settings:
        llm = build_llm(one_mode, max(arguments.prompt_tokens), arguments.new_tokens, max(arguments.batch_size))
        peer = build_peer(llm, arguments.peer)
        for batch_size in arguments.batch_size:
            for prompt_tokens in arguments.prompt_tokens:
                results += measure(llm, peer, batch_size, prompt_tokens, arguments)
        name = device_name(llm.device)
        del llm, peer
        gc.collect()  # the next mode needs the memory
    if is_first_rank():
        print(result_table(results))
        if results[0]["world_size"] > 1:
            print(traffic_table(results))
    write_report(arguments.output, name, results)


def parse(command_line: list[str]) -> argparse.Namespace:
    parser = command_parser("latency", __doc__)
    parser.add_argument("--exe-mode", nargs="+", default=["eager"], metavar="MODE", help="eager and/or graph")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[512])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1], help="prompts of distinct random tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer", choices=["transformers"], help="also run this system, on the same weights")
    return parser.parse_args(command_line)


def build_peer(llm: Any, name: str | None) -> Any:
    if name is None:
        return None
    from executor.peers import TransformersPeer

    return TransformersPeer(llm)


def measure(
    llm: Any, peer: Any, batch_size: int, prompt_tokens: int, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row for us and one for each way the peer can run, from interleaved repeats; the first round is warm-up."""
    import torch

    generator = torch.Generator().manual_seed(batch_size * 100003 + prompt_tokens)
    prompts = torch.randint(0, llm.config.vocab_size, (batch_size, prompt_tokens), generator=generator).tolist()
    rounds: dict[str, list[tuple[Any, float, list[float]]]] = {"ours": []}
    peer_names = {}
    if peer is not None:
        from executor.peers import EXPERTS_IMPLEMENTATIONS

        peer_names = {f"transformers {implementation}": implementation for implementation in EXPERTS_IMPLEMENTATIONS}
        rounds |= {name: [] for name in peer_names}
    llm.parallel.traffic.sent_bytes.clear()
    llm.runner.tokens_run = 0
    for _ in range(arguments.repeats + 1):
        rounds["ours"].append(run_ours(llm, prompts, arguments.new_tokens))
        for name, implementation in peer_names.items():
            rounds[name].append(peer.generate(prompts, arguments.new_tokens, implementation))
    rows = [row(llm, name, runs[1:], prompts, arguments.new_tokens) for name, runs in rounds.items()]
    if llm.settings.world_size > 1:
        rows[0] |= traffic(llm, prompts, arguments.new_tokens, arguments.repeats + 1)
    for result in rows[1:]:
        result["ours_over_this"] = {
            "ttft": round(rows[0]["ttft_ms"]["p50"] / result["ttft_ms"]["p50"], 3),
            "tpot": round(rows[0]["tpot_ms"]["p50"] / result["tpot_ms"]["p50"], 3),
        }
        same = rounds["ours"][-1][0] == rounds[result["system"]][-1][0]
        result["same_tokens_as_ours"] = same
    return rows


def traffic(llm: Any, prompts: list[list[int]], new_tokens: int, runs: int) -> dict[str, Any]:
    """What rank 0 sent and worked on in one run, as counted and as docs/parallelism.md's formulas say."""
    from executor.traffic import expected_run_bytes

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


def run_ours(llm: Any, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], float, list[float]]:
    """Token ids, ttft in ms, and each decode step's time in ms (all prompts advance together)."""
    outputs = llm.generate(prompts, SamplingParams(max_new_tokens=new_tokens, ignore_eos=True))
    return [output.token_ids for output in outputs], outputs[0].ttft_ms, outputs[0].token_intervals_ms


def row(llm: Any, system: str, runs: list[Any], prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    tpot = percentiles([interval for _, _, intervals in runs for interval in intervals])
    means = sorted(sum(intervals) / len(intervals) for _, _, intervals in runs)
    return {
        "system": system,
        "exe_mode": llm.settings.exe_mode if system == "ours" else "eager",
        "dtype": llm.settings.model_config.dtype,
        "quantization": None,
        "world_size": llm.settings.world_size,
        "batch_size": len(prompts),
        "prompt_tokens": len(prompts[0]),
        "new_tokens": new_tokens,
        "repeats": len(runs),
        "ttft_ms": percentiles([ttft for _, ttft, _ in runs]),
        "tpot_ms": {**tpot, "mean": round(means[len(means) // 2], 4)},
        "tok_per_s": round(1e3 * len(prompts) / means[len(means) // 2], 2),
    }


def result_table(results: list[dict[str, Any]]) -> str:
    header = ["system", "mode", "dtype", "batch", "prompt", "new", "ttft ms", "tpot p50", "p90", "p99", "tokens/s"]
    header += ["ours/this ttft", "tpot"]
    rows = []
    for result in results:
        ratio = result.get("ours_over_this", {})
        keys = ("system", "exe_mode", "dtype", "batch_size", "prompt_tokens", "new_tokens")
        tpot = result["tpot_ms"]
        rows.append(
            [*(result[key] for key in keys), result["ttft_ms"]["p50"], tpot["p50"], tpot["p90"], tpot["p99"]]
            + [result["tok_per_s"], ratio.get("ttft"), ratio.get("tpot")]
        )
    return table(header, rows)


def traffic_table(results: list[dict[str, Any]]) -> str:
    keys = ("tokens_of_job", "tokens_of_rank", "sent_bytes_per_token", "formula_bytes_per_token")
    header = ["mode", "batch", "prefill exchange", "decode exchange", "tokens", "of rank 0", "sent B/token", "formula"]
    rows = [
        [result["exe_mode"], result["batch_size"], *result["exchanges"].values(), *(result[key] for key in keys)]
        for result in results
        if "exchanges" in result
    ]
    return table(header, rows)
