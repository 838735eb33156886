# SPDX-License-Identifier: Apache-2.0
"""The infer command: result files, logs, exit codes, terminal output."""

import dataclasses
import datetime
import errno
import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from executor import LLM, infer
from executor.config import REPOSITORY, load_settings
from executor.engine.model_runner import ModelRunner
from executor.launch import results
from executor.launch.interrupts import Interrupted
from executor.launch.rank import RANK_VARIABLES
from tests.checkpoints import make_checkpoint

KEYS = ["index", "prompt", "text", "prompt_token_ids", "token_ids", "finish_reason", "ttft_ms", "tpot_ms"]
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d .* (DEBUG|INFO|WARNING) \[rank \d+\] ")
TODAY = f"{datetime.date.today():%Y%m%d}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A random model with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder, vocab_size=2048)
    for file in (REPOSITORY / "models/qwen3_moe/demo").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def yaml_file(checkpoint, tmp_path) -> Path:
    """YAML for that model with three prompts."""
    prompts = [f"{word} {random.random()}" for word in ("To be", "Friends, Romans", "é 東京 🎭")]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    file = tmp_path / "tiny.yaml"
    file.write_text(
        f"model_name: small\nmodel_path: {checkpoint}\ndevice: cpu\nmodel_config:\n  dtype: float32\ndata_config:\n"
        f"  dataset_path: {tmp_path / 'prompts.json'}\n  max_new_tokens: 6\n  batch_size: 2\n  chat_template: False\n"
        "  ignore_eos: True\n"
    )
    return file


@pytest.fixture
def run(yaml_file, tmp_path, monkeypatch, capsys):
    """Calls main() with options; returns its exit code, stdout and stderr. Results go below tmp_path."""
    monkeypatch.setattr(results, "REPOSITORY", tmp_path)
    for variable in (*RANK_VARIABLES, "LOG_LEVEL"):
        monkeypatch.delenv(variable, raising=False)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def call(*options: str, yaml: Path = yaml_file) -> tuple[int, str, str]:
        root.handlers = []
        monkeypatch.setattr(sys, "argv", ["infer", "--yaml_file_path", str(yaml), *options])
        code = infer.main()
        for handler in root.handlers:
            handler.close()
        return code, *capsys.readouterr()

    yield call
    root.handlers = handlers
    root.setLevel(level)


def act_as(rank: int, monkeypatch) -> None:
    """Makes `run` that of one rank of several, without the others."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(infer, "set_up_rank", lambda: rank)


def result_folder(tmp_path: Path) -> Path:
    """Folder of the only or latest run."""
    runs = tmp_path / "res" / TODAY / "small_tiny"
    return runs / "latest" if (runs / "latest").exists() else next(runs.iterdir())


def records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def assert_refused(code: int, out: str, err: str) -> str:
    """Asserts exit code 2, empty stdout and one error line, which it returns."""
    assert code == 2 and out == "" and "Traceback" not in err, err
    lines = [line for line in err.splitlines() if not LOG_LINE.match(line)]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


def test_results(run, yaml_file, tmp_path):
    output = tmp_path / "copy.jsonl"
    code, out, err = run(
        "--output", str(output), "--set", "data_config.max_new_tokens=5", "--set", "data_config.seed=3"
    )
    assert code == 0, err
    content = (result_folder(tmp_path) / "result.jsonl").read_text(encoding="utf-8")
    assert output.read_text(encoding="utf-8") == content
    *lines, last = [json.loads(line) for line in content.splitlines()]

    settings = load_settings(yaml_file, ["data_config.max_new_tokens=5", "data_config.seed=3"])
    prompts = json.loads((tmp_path / "prompts.json").read_text())
    llm = LLM.from_settings(settings)
    lines.sort(key=lambda line: line["index"])
    for prompt, line, expected in zip(prompts, lines, llm.generate(prompts), strict=True):
        assert list(line) == KEYS
        assert line["prompt"] == prompt and line["prompt_token_ids"] == expected.prompt_token_ids
        assert line["token_ids"] == expected.token_ids and line["text"] == expected.text
        assert line["finish_reason"] == "length" and line["ttft_ms"] > 0 and line["tpot_ms"] > 0
        assert prompt in out and expected.text in out

    assert list(last) == ["summary"]
    summary = last["summary"]
    assert summary["prompts"] == 3 and summary["failed"] == 0
    assert summary["new_tokens"] == 15 and summary["tok_per_s"] > 0
    assert summary["prompt_tokens"] == sum(len(line["prompt_token_ids"]) for line in lines)
    for key in ("ttft_ms", "tpot_ms"):
        assert list(summary[key]) == ["p50", "p90", "p99"]
        assert 0 < summary[key]["p50"] <= summary[key]["p90"] <= summary[key]["p99"]
    assert summary["settings"] == dataclasses.asdict(settings)
    assert str((result_folder(tmp_path) / "result.jsonl").resolve()) in out and "tpot p99" in out
    log = (result_folder(tmp_path) / "log_0.log").read_text()
    assert log and log == "".join(line + "\n" for line in err.splitlines() if LOG_LINE.match(line))


def test_each_result_is_written_when_it_finishes(run, yaml_file, tmp_path, monkeypatch):
    """The first prompt generates longest: the others are on disk before it finishes."""
    stream, seen = LLM.finished, []

    def watched(self, sequences):
        for index, output in stream(self, sequences):
            yield index, output
            seen.append([record["index"] for record in records(result_folder(tmp_path) / "result.jsonl")])

    monkeypatch.setattr(LLM, "finished", watched)
    options = ["data_config.max_new_tokens=60"]
    prompts = [f"{number}" for number in range(5)]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    monkeypatch.setattr(LLM, "finished", shorter(watched))
    assert run(*(part for option in options for part in ("--set", option)))[0] == 0
    assert seen == [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 0]]
    *lines, last = records(result_folder(tmp_path) / "result.jsonl")
    assert [line["prompt"] for line in lines] == [prompts[line["index"]] for line in lines] and "summary" in last


def shorter(finished):
    """`LLM.finished` with the limit of all but the first prompt reduced."""

    def run(self, requests):
        for request in requests[1:]:
            for sample in request.samples:
                sample.sampling = dataclasses.replace(sample.sampling, max_new_tokens=2 + request.index)
        yield from finished(self, requests)

    return run


def test_only_rank_0_prints_and_writes_results(run, tmp_path, monkeypatch):
    act_as(1, monkeypatch)
    output = tmp_path / "copy.jsonl"
    code, out, _ = run("--output", str(output))
    assert code == 0 and out == "" and not output.exists()
    assert [file.name for file in result_folder(tmp_path).iterdir()] == ["log_1.log"]


def test_chat_template(run, checkpoint, tmp_path):
    assert run("--set", "data_config.chat_template=True", "--set", "data_config.enable_thinking=True")[0] == 0
    *lines, _ = records(result_folder(tmp_path) / "result.jsonl")
    llm = LLM(checkpoint, device="cpu", dtype="float32", enable_thinking=True, max_new_tokens=6, ignore_eos=True)
    for line in lines:
        [expected] = llm.chat([{"role": "user", "content": line["prompt"]}])
        assert line["prompt_token_ids"] == expected.prompt_token_ids and line["token_ids"] == expected.token_ids


def test_one_new_token_has_no_tpot(run, tmp_path):
    assert run("--set", "data_config.max_new_tokens=1", "--set", "data_config.max_prompts=1")[0] == 0
    line, last = map(json.loads, (result_folder(tmp_path) / "result.jsonl").read_text().splitlines())
    assert line["tpot_ms"] is None and last["summary"]["tpot_ms"] == {"p50": None, "p90": None, "p99": None}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--set", "data_config.max_new_token=3"], "did you mean data_config.max_new_tokens?"),
        (["--set=-x=1"], "-x: unknown key"),
        (["--set", "data_config.batch_size=0"], "data_config.batch_size: 0 is impossible"),
        (["--set", "model_path=no/such/folder"], "model_path: no/such/folder does not exist"),
        (["--set", "model_path=dataset"], "dataset has no config.json"),
        (["--set", "data_config.dataset=csv"], "data_config.dataset: 'csv' is not one of"),
        (["--set", "data_config.dataset_path=no/such"], "data_config.dataset_path: no/such does not exist"),
        (["--set", "data_config.temperature=-1"], "data_config.temperature: -1.0 is impossible"),
        (["--set", "exe_mode=graph"], "exe_mode: graph is not possible on device cpu"),
        (["--set", "device=npu"], "device: npu is not available"),
        (
            ["--set", "model_config.cache_tokens=1", "--set", "data_config.max_new_tokens=200"],
            "model_config.cache_tokens",
        ),
        (
            ["--set", "data_config.input_max_len=2", "--set", "data_config.long_prompt=refuse"],
            "data_config.input_max_len",
        ),
        (["--set", "data_config.input_max_len=1000000000000"], "data_config.input_max_len"),
        (
            ["--output", "no/such/folder/out.jsonl"],
            "--output: no/such/folder/out.jsonl cannot be written: No such file",
        ),
        (["--output", "."], "--output: . cannot be written: Is a directory"),
        (["--output", ""], "--output: . cannot be written: Is a directory"),
        (["--output", "/proc/out.jsonl"], "--output: /proc/out.jsonl cannot be written"),
    ],
)
def test_invalid_input(options, named, run, tmp_path):
    assert named in assert_refused(*run(*options))
    assert not (tmp_path / "res").exists()


def test_empty_prompt_is_named(run, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": "a"}\n{"text": ""}\n')
    options = ["data_config.dataset=jsonl", f"data_config.dataset_path={tmp_path / 'p.jsonl'}"]
    assert "empty" in assert_refused(*run(*(part for option in options for part in ("--set", option))))


def test_invalid_yaml(run, tmp_path):
    assert "none.yaml: no such YAML file" in assert_refused(*run(yaml=tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("model_name: [")
    assert "bad.yaml: not valid YAML" in assert_refused(*run(yaml=tmp_path / "bad.yaml"))


def test_option_without_value(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("--set", "-x=1")
    line = capsys.readouterr().err
    assert line.startswith("error: argument --set: expected one argument; one that begins with - is given as --option=")


@pytest.mark.parametrize(("variable", "value"), [("LOG_LEVEL", "LOUD"), ("RANK", "first"), ("RANK", "1")])
def test_invalid_environment(variable, value, run, monkeypatch):
    monkeypatch.setenv(variable, value)
    assert f"error: {variable}: " in assert_refused(*run())


def test_damaged_checkpoint(run, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    assert f"{weights}: truncated" in assert_refused(*run("--set", f"model_path={folder}"))
    assert not (tmp_path / "res").exists()


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("failing", ["_adopt", "mixed_inputs", "decode"])
def test_failure_names_the_rank_and_the_first_error(failing, rank, run, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("the device is gone")

    act_as(rank, monkeypatch)
    monkeypatch.setattr(LLM if failing == "_adopt" else ModelRunner, failing, fail)
    code, _, err = run()
    assert code == 1
    assert err.splitlines()[-1] == f"error: rank {rank}: RuntimeError: the device is gone"
    assert ("Traceback" in err) == (rank == 0)
    log = (result_folder(tmp_path) / f"log_{rank}.log").read_text()
    assert f"[rank {rank}]" in log and "Traceback" in log and "RuntimeError: the device is gone" in log


def test_finished_prompts_survive_a_failure(run, tmp_path, monkeypatch):
    mixed_inputs, calls = ModelRunner.mixed_inputs, []

    def fail_second(self, batches, unread):
        calls.append(batches)
        if len(calls) == 2:
            raise RuntimeError("the device is gone")
        return mixed_inputs(self, batches, unread)

    monkeypatch.setattr(ModelRunner, "mixed_inputs", fail_second)
    assert run()[0] == 1
    lines = (result_folder(tmp_path) / "result.jsonl").read_text().splitlines()
    assert [list(json.loads(line)) for line in lines] == [KEYS, KEYS]


def after_the_first_result(monkeypatch, action) -> None:
    """Runs an action between the first and second result."""
    stream = LLM.finished

    def watched(self, sequences):
        for number, found in enumerate(stream(self, sequences)):
            if number == 1:
                action()
            yield found

    monkeypatch.setattr(LLM, "finished", watched)


def test_a_folder_that_is_removed_during_a_run_is_restored(run, tmp_path, monkeypatch):
    after_the_first_result(monkeypatch, lambda: shutil.rmtree(tmp_path / "res"))
    code, out, err = run()
    file = Path(out.splitlines()[-1].removeprefix("results: "))
    assert code == 0 and len(records(file)) == 4 and "was deleted while it was written" in err


def test_results_that_cannot_all_be_written(run, tmp_path):
    """The other file is complete; exit code 1."""
    code, out, err = run("--output", "/dev/full")
    assert code == 1 and len(records(result_folder(tmp_path) / "result.jsonl")) == 4
    assert err.splitlines()[-1] == "error: /dev/full cannot be written: No space left on device"


def test_results_that_cannot_be_written_at_all(run, tmp_path, monkeypatch):
    """One line says so, without a traceback."""
    monkeypatch.setattr(os, "write", no_space)
    code, _, err = run()
    assert code == 1 and "Traceback" not in err
    assert err.splitlines()[-2:] == [
        "0 of 3 results: none",
        f"error: {result_folder(tmp_path).resolve()}/result.jsonl cannot be written: No space left on device; "
        "0 results are in it",
    ]


def no_space(descriptor: int, data: bytes) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_finished_in_the_last_step_is_written(run, tmp_path, monkeypatch):
    """Two sequences finish in one step; the run is interrupted before the second is returned."""
    stream = LLM.finished

    def interrupted(self, sequences):
        yield next(stream(self, sequences))
        raise Interrupted("interrupted by SIGINT")

    monkeypatch.setattr(LLM, "finished", interrupted)
    code, _, err = run()
    assert code == 1 and err.splitlines()[-1] == "error: interrupted by SIGINT"
    assert sorted(record["index"] for record in records(result_folder(tmp_path) / "result.jsonl")) == [0, 1]


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_signal_while_a_line_is_written_neither_loses_nor_repeats_one(nth, run, tmp_path, monkeypatch):
    """At the first line of the first file, at that of the second, at a later line."""
    write, count = os.write, itertools.count(1)

    def interrupted(descriptor: int, data: bytes) -> int:
        written = write(descriptor, data)
        if next(count) == nth:
            signal.raise_signal(signal.SIGINT)
        return written

    monkeypatch.setattr(os, "write", interrupted)
    code, _, err = run("--output", str(tmp_path / "copy.jsonl"), "--set", "data_config.batch_size=1")
    assert code == 1 and err.splitlines()[-1] == "error: interrupted by SIGINT"
    for file in (result_folder(tmp_path) / "result.jsonl", tmp_path / "copy.jsonl"):
        assert [record["index"] for record in records(file)] == list(range((nth + 1) // 2))
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("what", ["prompts", "yaml", "config", "link", "hard link"])
def test_output_that_is_an_input_is_refused(what, run, yaml_file, checkpoint, tmp_path):
    inputs = {"prompts": tmp_path / "prompts.json", "yaml": yaml_file, "config": checkpoint / "config.json"}
    output = inputs.get(what, tmp_path / "other")
    if what == "link":
        output.symlink_to(inputs["prompts"])
    if what == "hard link":
        output.hardlink_to(inputs["prompts"])
    before = output.read_bytes()
    assert "which this run reads" in assert_refused(*run("--output", str(output)))
    assert output.read_bytes() == before


def test_results_of_a_checkout_that_cannot_be_written(run, yaml_file, tmp_path):
    line = assert_refused(*run("--set", "output_dir=/proc/results"))
    assert line.startswith("error: output_dir: /proc/results/") and "set output_dir to a folder" in line
    assert run("--set", f"output_dir={tmp_path / 'elsewhere'}")[0] == 0
    assert len(list((tmp_path / "elsewhere").glob(f"{TODAY}/small_tiny/latest/result.jsonl"))) == 1
    assert not (tmp_path / "res").exists()


def test_text_cannot_steer_the_terminal(run, tmp_path):
    (tmp_path / "prompts.json").write_text(json.dumps(["a\x1b]0;title\x07b\x9b31m"]))
    code, out, _ = run()
    assert code == 0 and "a\\x1b]0;title\\x07b\\x9b31m" in out and "\x1b" not in out
    assert records(result_folder(tmp_path) / "result.jsonl")[0]["prompt"] == "a\x1b]0;title\x07b\x9b31m"


def test_failed_prompt(run, tmp_path, monkeypatch):
    """Its line has the error, the summary counts it, the others are complete; exit code 1."""
    output_of = LLM.output

    def failing(self, request):
        output = output_of(self, request)
        if request.index != 1:
            return output
        return dataclasses.replace(
            output, outputs=[dataclasses.replace(output.outputs[0], error="why", finish_reason="error")]
        )

    monkeypatch.setattr(LLM, "output", failing)
    code, out, err = run()
    assert code == 1 and err.splitlines()[-1] == 'error: 1 of 3 prompts failed: their lines have an "error"'
    *lines, last = records(result_folder(tmp_path) / "result.jsonl")
    assert {line["index"]: line.get("error") for line in lines} == {0: None, 1: "why", 2: None}
    assert last["summary"]["failed"] == 1 and last["summary"]["prompts"] == 3 and "--- text (error)\nwhy" in out


@pytest.mark.parametrize("rank", [0, 3])
def test_warnings_of_transformers_are_logged_too(rank, run, tmp_path, monkeypatch):
    mixed_inputs = ModelRunner.mixed_inputs

    def with_warning(self, batches, unread):
        logging.getLogger("transformers.some").warning("mind this")
        return mixed_inputs(self, batches, unread)

    act_as(rank, monkeypatch)
    monkeypatch.setattr(ModelRunner, "mixed_inputs", with_warning)
    code, _, err = run("--set", "data_config.max_prompts=1")
    assert (
        code == 0
        and f"[rank {rank}] transformers.some: mind this" in (result_folder(tmp_path) / f"log_{rank}.log").read_text()
    )
    assert err.count("mind this") == (rank == 0)


@pytest.mark.parametrize(("level", "shown"), [("debug", True), ("INFO", True), ("ERROR", False)])
def test_log_level_variable(level, shown, run, tmp_path, monkeypatch):
    monkeypatch.setenv("LOG_LEVEL", level)
    code, _, err = run("--set", "log_level=WARNING", "--set", "data_config.max_prompts=1")
    assert code == 0
    assert ("INFO [rank 0]" in err) == shown == bool((result_folder(tmp_path) / "log_0.log").read_text())


def start(repository: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "executor.infer", *options]
    environment = {key: value for key, value in os.environ.items() if key not in (*RANK_VARIABLES, "LOG_LEVEL")}
    return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)


def test_as_a_command(yaml_file, tmp_path):
    """In a copy of the packages, as results go into the repository."""
    for room in ("executor", "models", "ops", "dataset"):
        shutil.copytree(REPOSITORY / room, tmp_path / room, ignore=shutil.ignore_patterns("demo", "LongBench", "*.pyc"))
    done = start(tmp_path, "--yaml_file_path", str(yaml_file), "--set", "data_config.max_prompts=1")
    assert done.returncode == 0, done.stderr
    assert len((result_folder(tmp_path) / "result.jsonl").read_text().splitlines()) == 2
    assert "tokens/s" in done.stdout and "Traceback" not in done.stderr
    refused = start(tmp_path, "--yaml_file_path", str(yaml_file), "--set", "divice=cpu")
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr == "error: --set divice=cpu: divice: unknown key; did you mean device?\n"
    assert start(tmp_path, "--set", "device=cpu").returncode == 2


def time_covered_us(events: list[dict]) -> float:
    """Time covered by trace events, adjacent or nested."""
    covered, end = 0.0, 0.0
    for start_us, duration_us in sorted((event["ts"], event["dur"]) for event in events):
        covered += max(0.0, start_us + duration_us - max(end, start_us))
        end = max(end, start_us + duration_us)
    return covered


def test_profiler(run, tmp_path):
    """A valid Chrome trace per rank, a kernel table on the terminal, and unchanged tokens."""
    assert run()[0] == 0
    file = result_folder(tmp_path) / "result.jsonl"
    without = {record.get("index"): record.get("token_ids") for record in records(file)}
    code, out, _ = run("--set", "model_config.enable_profiler=True")
    assert code == 0
    assert {record.get("index"): record.get("token_ids") for record in records(file)} == without
    trace = result_folder(tmp_path) / "trace_0.json"
    events = json.loads(trace.read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "cpu_op"]
    assert names.count("aten::embedding") == 1 + 4  # a prefill and the decode steps
    assert {"aten::mm", "aten::scaled_dot_product_attention"} <= set(names)
    lines = out.splitlines()
    assert lines[0].split() == ["kernel", "calls", "total", "ms", "share"]
    rows = [line.split() for line in lines[2:12]]
    times_ms, shares = ([float(row[column].rstrip("%")) for row in rows] for column in (-2, -1))
    assert times_ms == sorted(times_ms, reverse=True) and times_ms[0] > 0 and sum(shares) <= 100.5
    total_ms = time_covered_us([event for event in events if event.get("cat") == "cpu_op"]) / 1e3
    for time_ms, share in zip(times_ms, shares, strict=True):
        rounding = 0.006 + 0.001 * total_ms
        assert share / 100 * total_ms == pytest.approx(time_ms, abs=rounding)
    assert lines[13] == f"trace: {trace.resolve()}"
