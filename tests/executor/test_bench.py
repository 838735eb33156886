# SPDX-License-Identifier: Apache-2.0
"""Bench commands end to end: report contents, the floor's byte counts, invalid options, failures."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from executor import LLM
from executor.bench.__main__ import main
from executor.bench.floor import distinct_experts, experts_read, step_bytes
from executor.bench.peers import state_dict
from executor.bench.throughput import measure
from executor.bench.timing import matmul_ceiling, process_age_s, read_ceiling, time_ms
from executor.config import REPOSITORY
from executor.engine.model_runner import ModelRunner
from executor.engine.scheduler import Scheduler
from ops import DenseWeight, GroupedRows, RouterLogits, Routing, TransposedWeight
from ops.reference import ReferenceOps
from tests.checkpoints import make_checkpoint

SMALL_CACHE = ("--set", "model_config.cache_tokens=256")


def bench(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    return main()


def latency(monkeypatch, *arguments: str) -> int:
    return bench(monkeypatch, "latency", "--yaml", "demo", "--set", "device=cpu", *arguments)


def test_latency(monkeypatch, tmp_path, capsys):
    output, picture = tmp_path / "report.json", tmp_path / "plot.png"
    sizes = ("--prompt-tokens", "8", "--new-tokens", "4", "--repeats", "1", "--batch-size", "1", "2")
    files = ("--output", str(output), "--plot", str(picture))
    assert latency(monkeypatch, *sizes, "--peer", "transformers", *files) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    report = json.loads(output.read_text())
    assert {"device", "commit", "command", "versions", "results"} <= set(report)
    assert (report["ops"], report["fallbacks"], report["model_name"]) == ("reference", [], "qwen3_moe_demo")
    assert 0 < report["start_to_first_token_s"] < process_age_s()
    ceiling = report["read_ceiling"]["gb_per_s"]
    systems = ["ours", "transformers grouped_mm", "transformers batched_mm"]
    assert [(result["system"], result["batch_size"]) for result in report["results"]] == [
        (system, batch_size) for batch_size in (1, 2) for system in systems
    ]
    for result in report["results"]:
        assert (result["prompt_tokens"], result["new_tokens"], result["dtype"]) == (8, 4, "bfloat16")
        assert (result["exe_mode"], result["quantization"], result["world_size"]) == ("eager", None, 1)
        for times in (result["ttft_ms"], result["tpot_ms"]):
            assert 0 < times["p50"] <= times["p90"] <= times["p99"]
        assert result["tok_per_s"] > 0
        read = sum(result["read_bytes_per_step"].values())
        assert result["read_bytes_per_token"] == pytest.approx(read / result["batch_size"], abs=1)
        assert result["floor_ms"] == pytest.approx(read / ceiling / 1e6, rel=1e-2)
        assert result["fraction_of_ceiling"] == pytest.approx(
            result["floor_ms"] / result["tpot_ms"]["p50"], rel=1e-2, abs=1e-4
        )
    assert [result["peak_memory_bytes"] > 2**27 for result in report["results"] if result["system"] == "ours"] == [
        True
    ] * 2
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("ours/this ttft", "of ceiling", "read ceiling"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("latency", "--new-tokens", "1"), "--new-tokens"),
        (("latency", "--set", "data_config.batchsize=2"), "data_config.batch_size"),
        (("latency", "--set", "model_config.enable_profiler=True"), "model_config.enable_profiler"),
        (("latency", "--peer", "transformers", "--set", "world_size=2"), "--peer: transformers runs on one rank"),
        (("latency", "--plot", "a.png", "--output", "a.png"), "--plot and --output: both are a.png"),
        (("latency", "--set", "exe_mode=graph"), "exe_mode: graph is not possible on device cpu"),
        (
            ("latency", "--batch-size", "1", "2", "--prompt-tokens", "100", *SMALL_CACHE),
            "2 sequences of 164 tokens need a cache of 512 tokens, there are 256",
        ),
        (
            ("throughput", "--rounds", "2", "--batch-size", "2", "3", "--set", "world_size=2"),
            "3 is not a multiple of the 2",
        ),
        (
            ("throughput", "--scenario", "1:2", "100:30", "--batch-size", "2", *SMALL_CACHE),
            "2 sequences of 130 tokens need a cache of 512 tokens, there are 256",
        ),
        (("kernels", "--batch-size", "--prompt-tokens", "--extend"), "none has a size to measure"),
        (("kernels", "--output", "no/such/r.json"), "--output: no/such/r.json cannot be written: No such file"),
        (("throughput", "--output", "/proc/r.json"), "--output: /proc/r.json cannot be written"),
        (("latency", "--plot", "no/such/a.png"), "--plot: no/such/a.png cannot be written"),
        (("arrivals", "--new-tokens", "7"), "--new-tokens: at least 8"),
        (("arrivals", "--long-prompt-tokens", "40000"), "the prompt of 40000 tokens"),
    ],
)
def test_bad_input(arguments, named, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert bench(monkeypatch, *arguments, "--yaml", "demo", "--set", "device=cpu") == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("error: ") == 1 and named in printed.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variables", [{"RANK": "1"}, {"RANK": "3", "WORLD_SIZE": "1"}])
def test_platform_rank_variables_are_ignored(variables, monkeypatch, tmp_path, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    output = tmp_path / "report.json"
    assert throughput(monkeypatch, "--scenario", "1:2", "--batch-size", "1", "--output", str(output)) == 0
    printed = capsys.readouterr()
    assert output.exists() and "tokens/s" in printed.out and "measurements" not in printed.err  # no progress bar


def test_a_quantised_checkpoint_is_named_in_its_results(monkeypatch, tmp_path):
    output = tmp_path / "report.json"
    folder = str(REPOSITORY / "tests/quantized/autoawq")
    sizes = ("--prompt-tokens", "8", "--new-tokens", "4", "--repeats", "1", "--batch-size", "1")
    assert latency(monkeypatch, "--set", f"model_path={folder}", *sizes, "--output", str(output)) == 0
    [result] = json.loads(output.read_text())["results"]
    assert result["quantization"] == "w4a16"


def test_interrupted(monkeypatch, capsys):
    def interrupt(command_line):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("executor.bench.throughput.run", interrupt)
    assert throughput(monkeypatch) == 1
    assert capsys.readouterr().err == "error: interrupted by SIGINT\n"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("models/qwen3_moe/demo", device="cpu", batch_size=3, cache_tokens=1024)


def test_distinct_experts(llm):
    """One sequence, or equal ones, read top-k experts per layer, others more; the engine is left unchanged."""
    top_k = llm.config.num_experts_per_tok
    before = llm.generate([[5, 6, 7]])
    assert distinct_experts(llm, [[5, 6, 7]]) == distinct_experts(llm, [[5, 6, 7]] * 3) == top_k
    assert top_k < distinct_experts(llm, [[5, 6, 7], [100, 3], [42]]) <= min(3 * top_k, llm.config.num_experts)
    assert not {"experts", "decode"} & {*vars(llm.ops), *vars(llm.runner)}
    assert llm.generate([[5, 6, 7]])[0].token_ids == before[0].token_ids


def test_experts_read():
    """Four local experts, in every form of routing; id 4 is on another rank."""
    ids = torch.tensor([[0, 2], [2, 4]])
    assert experts_read(Routing(torch.ones(2, 2), ids, has_elsewhere=True), held=4) == 2
    assert experts_read(GroupedRows(torch.tensor([0, 3, 1, 0])), held=4) == 2
    logits = torch.tensor([[0.0, 5.0, 4.0, 1.0], [0.0, 1.0, 4.0, 5.0]])
    assert experts_read(RouterLogits(logits, top_k=2, renormalize=True), held=4) == 3


def test_step_bytes(llm):
    """Equal to the sizes computed from config.json."""
    config = llm.config
    hidden, layers, element = config.hidden_size, config.num_hidden_layers, llm.dtype.itemsize
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    norms = 2 * hidden + 2 * config.head_dim
    layer = (q + 2 * kv) * hidden + q * hidden + config.num_experts * hidden + norms
    assert step_bytes(llm, sequences=3, cached_tokens=100, distinct_experts=5.5) == {
        "weights": (layers * layer + hidden + config.vocab_size * hidden) * element,
        "experts": layers * 5.5 * 3 * hidden * config.moe_intermediate_size * element,
        "cache": 3 * 100 * layers * 2 * kv * element,
    }


def test_timing():
    cpu = torch.device("cpu")
    assert 2 <= time_ms(lambda: time.sleep(2e-3), cpu, repeats=3) < 100
    ceiling = read_ceiling(cpu)
    assert ceiling["gb_per_s"] > 0.1 and "of 0.27 GB" in ceiling["measured_by"]


@pytest.mark.parametrize(("slow", "fast"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_matmul_ceiling_uses_the_faster_dtype(slow, fast, monkeypatch):
    """With a fake clock of hours per call: a tiny rate must not be rounded to 0."""
    times_ms = {getattr(torch, slow): 2e7, getattr(torch, fast): 1e7}
    monkeypatch.setattr("executor.bench.timing.time_ms", lambda run, *_: times_ms[run().dtype])
    ceiling = matmul_ceiling(torch.device("cpu"), torch.bfloat16)
    assert ceiling["measured_by"] == f"product of two 512 x 512 matrices of {fast}"
    assert ceiling["tflop_per_s"] == pytest.approx(2 * 512**3 / 1e7 / 1e9, rel=1e-5)


def test_fallbacks_are_rejected(monkeypatch, capsys):
    """An accelerator with operations in plain torch is measured only with --allow-fallback."""
    monkeypatch.setattr("ops.load_ops", lambda device_type: ReferenceOps(grouped_mm=True))
    assert latency(monkeypatch, "--prompt-tokens", "8") == 2
    refusal = capsys.readouterr().err
    assert refusal.count("\n") == 1 and "attention" in refusal and "--allow-fallback" in refusal
    assert bench(monkeypatch, "kernels", "--yaml", "demo", "--set", "device=cpu") == 2
    sizes = ("--prompt-tokens", "8", "--new-tokens", "2", "--repeats", "1")
    assert latency(monkeypatch, *sizes, "--allow-fallback") == 0


def test_plot_without_matplotlib(monkeypatch, tmp_path, capsys):
    """Rejected before the measurement."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert latency(monkeypatch, "--plot", str(tmp_path / "plot.png")) == 2
    assert "matplotlib" in capsys.readouterr().err


def throughput(monkeypatch, *arguments: str) -> int:
    return bench(monkeypatch, "throughput", "--yaml", "demo", "--set", "device=cpu", *arguments)


def test_throughput(monkeypatch, tmp_path, capsys):
    output = tmp_path / "report.json"
    sizes = ("--scenario", "1:6", "20:3", "--batch-size", "1", "3", "--rounds", "2")
    assert throughput(monkeypatch, *sizes, "--output", str(output)) == 0
    report = json.loads(output.read_text())
    assert report["fallbacks"] == [] and "throughput" in report["command"]
    keys = ("prompt_tokens", "new_tokens", "batch_size", "prompts")
    rows = report["results"]
    assert [tuple(row[key] for key in keys) for row in rows] == [
        (1, 6, 1, 2),
        (1, 6, 3, 6),
        (20, 3, 1, 2),
        (20, 3, 3, 6),
    ]
    for row in rows:
        assert row["tok_per_s"] == pytest.approx(row["prompts"] * row["new_tokens"] / row["seconds"], rel=5e-2)
        assert row["tok_per_s_per_sequence"] == pytest.approx(row["tok_per_s"] / row["batch_size"], rel=1e-2)
        generated_s = (row["ttft_ms"]["mean"] + row["tpot_ms"]["mean"] * (row["new_tokens"] - 1)) / 1e3
        assert 0 < generated_s <= row["seconds"] + 1e-3
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


def test_failure_keeps_finished_measurements(monkeypatch, tmp_path, capsys):
    """Both in the file and on the terminal; exit code 1."""
    output, kept = tmp_path / "report.json", []

    def out_of_memory_at_two(llm, batch_size, *sizes):
        if batch_size == 2:
            kept.append(json.loads(output.read_text())["results"])
            raise RuntimeError("out of memory")
        return measure(llm, batch_size, *sizes)

    monkeypatch.setattr("executor.bench.throughput.measure", out_of_memory_at_two)
    sizes = ("--scenario", "1:3", "--batch-size", "1", "2")
    assert throughput(monkeypatch, *sizes, "--output", str(output)) == 1
    assert kept == [json.loads(output.read_text())["results"]]
    assert [row["batch_size"] for row in kept[0]] == [1]
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 3 and "out of memory" in printed.err
    assert "measurements:  50%" in printed.err


def test_throughput_runs_the_reported_batch_size(llm, monkeypatch, capsys):
    """One loaded model runs smaller batches too; a batch larger than the cache is rejected."""
    together = []
    schedule = Scheduler.schedule

    def counting(scheduler, *arguments):
        batch = schedule(scheduler, *arguments)
        together.append(len(batch))
        return batch

    monkeypatch.setattr(Scheduler, "schedule", counting)
    for batch_size in (1, 3, 2):
        together.clear()
        measure(llm, batch_size, num_prompts=2 * batch_size, prompt_tokens=3, new_tokens=4)
        assert max(together) == batch_size
    sizes = ("--scenario", "100:28", "--batch-size", "2", "--set", "model_config.cache_tokens=128")
    assert throughput(monkeypatch, *sizes) == 2
    assert "need a cache of 256 tokens, there are 128" in capsys.readouterr().err
    sizes = ("--scenario", "100:29", "1:40", "--batch-size", "2", *SMALL_CACHE)
    assert throughput(monkeypatch, *sizes) == 0  # the last token is never cached


def test_repeated_prompts_are_computed_anew(monkeypatch):
    """Those of latency and throughput do not come from the prefix cache."""
    run, steps = ModelRunner.run, []
    monkeypatch.setattr(
        ModelRunner, "run", lambda self, batches, unread=None: steps.append(batches) or run(self, batches, unread)
    )
    sizes = ("--prompt-tokens", "140", "--new-tokens", "2", "--repeats", "2")
    assert latency(monkeypatch, *sizes) == 0
    prompts = [work for [batch] in steps for work in batch if work.num_new > 1]
    assert len(prompts) >= 3 and all(work.num_computed == 0 and work.num_new == 140 for work in prompts)


def test_experts_are_counted_with_a_full_cache(monkeypatch, tmp_path):
    """Counting runs within a cache that holds only the measured tokens."""
    counts = []
    for cache_tokens in (256, 1024):
        output = tmp_path / f"{cache_tokens}.json"
        sizes = ("--prompt-tokens", "126", "--new-tokens", "3", "--repeats", "1", "--batch-size", "2")
        options = ("--set", f"model_config.cache_tokens={cache_tokens}", "--output", str(output))
        assert latency(monkeypatch, *sizes, *options) == 0
        counts += [row["distinct_experts_per_layer"] for row in json.loads(output.read_text())["results"]]
    assert counts[0] == counts[1] > 4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("throughput", "--scenario", "5:1"), "'5:1' is not IN:OUT"),
        (("throughput", "--rounds", "0"), "--rounds: '0' is not a whole number, at least 1"),
        (("latency", "--repeats", "-1"), "--repeats: '-1' is"),
        (("latency", "--plot", "picture.pdf"), "picture.pdf: the plot is a PNG file, name it picture.pdf.png"),
        (("latency", "--exe-mode", "foo"), "invalid choice: 'foo'"),
        (("latency", "--batch-size", "1", "0"), "--batch-size: '0' is"),
        (("kernels", "--cached-tokens", "0"), "--cached-tokens: '0' is"),
        (("host-time", "--repeats", "x"), "--repeats: 'x' is"),
    ],
)
def test_invalid_options(arguments, named, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        bench(monkeypatch, *arguments, "--yaml", "demo", "--set", "device=cpu")
    assert ended.value.code == 2 and named in capsys.readouterr().err


def test_peer_rejects_transposed_weights(tmp_path):
    make_checkpoint(tmp_path)
    llm = LLM(tmp_path, device="cpu", dtype="float32")
    assert state_dict(llm)
    name, weight = next(item for item in llm.parameters.values.items() if isinstance(item[1], DenseWeight))
    llm.parameters.values[name] = TransposedWeight(weight.data.transpose(-1, -2).contiguous())
    with pytest.raises(ValueError, match="^--peer: transformers cannot share the weights on device cpu"):
        state_dict(llm)


def test_two_ranks(tmp_path, llm):
    """Launches two ranks; rank 0 reports bytes sent, and half of the bytes that one rank would read."""
    output = tmp_path / "report.json"
    sizes = ("--prompt-tokens", "8", "--new-tokens", "3", "--repeats", "1", "--output", str(output))
    command = [sys.executable, "-m", "executor.bench", "latency", "--yaml", "demo_2tp", "--set", "device=cpu", *sizes]
    without_ranks = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, cwd=REPOSITORY, env=without_ranks, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tpot p50") == 2 and "sent B/token" in done.stdout  # printed once
    [result] = json.loads(output.read_text())["results"]
    assert result["sent_bytes_per_token"] == result["formula_bytes_per_token"] > 0
    alone = step_bytes(llm, 1, 8 + 1, result["distinct_experts_per_layer"])
    assert result["read_bytes_per_step"]["experts"] == alone["experts"] / 2
    assert result["read_bytes_per_step"]["cache"] == alone["cache"] / 2
    assert alone["weights"] / 2 < result["read_bytes_per_step"]["weights"] < alone["weights"]
