# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a text against transformers' cross-entropy; invalid input, interrupts, logits that are not finite."""

import contextlib
import io
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen3MoeForCausalLM

from executor import LLM
from executor.config import REPOSITORY
from executor.evaluate.__main__ import main
from executor.evaluate.perplexity import Window, windows
from tests.checkpoints import make_checkpoint, rewrite
from tests.parallel.ranks import run_ranks

DEMO = REPOSITORY / "models/qwen3_moe/demo"
EXACT = ("--set", "device=cpu", "--set", "model_config.dtype=float32")


def perplexity(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate", "perplexity", *map(str, arguments)])
    return main()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """About 700 tokens that the demo was not trained on, with characters of several bytes at the end."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text((DEMO / "heldout.txt").read_text(encoding="utf-8")[:2000] + "\r\nπλοῖον", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def token_ids(text) -> list[int]:
    return AutoTokenizer.from_pretrained(DEMO).encode(text.read_bytes().decode())


@pytest.fixture(scope="module")
def reference() -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def random_model(tmp_path_factory) -> Path:
    """A random model with 64 positions and the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder, vocab_size=2048, max_position_embeddings=64)
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@torch.no_grad()
def expected_nats(model: Qwen3MoeForCausalLM, token_ids: list[int], window: int, stride: int) -> tuple[float, int]:
    """Sum of transformers' losses, and the number of predicted tokens: those that no window before has."""
    nats, predicted, end = 0.0, 0, 0
    while end < len(token_ids):
        start = max(0, end - (window - stride))
        inputs = torch.tensor([token_ids[start : start + window]])
        labels = inputs.clone()
        labels[0, : max(1, end - start)] = -100
        count = int((labels != -100).sum())
        nats += float(model(inputs, labels=labels).loss) * count if count else 0.0
        predicted, end = predicted + count, start + inputs.shape[1]
    return nats, predicted


@pytest.mark.parametrize(
    ("options", "window", "stride"),
    [
        (("--window", "150"), 150, 150),
        (("--window", "150", "--stride", "100", "--set", "data_config.batch_size=3"), 150, 100),
        ((), 2048, 2048),  # longer than the text
    ],
)
def test_figures(options, window, stride, text, token_ids, reference, monkeypatch, tmp_path, capsys):
    """Equal to transformers'; the table shows the figures of the report."""
    assert perplexity(monkeypatch, "--text", text, *EXACT, *options, "--json", tmp_path / "report.json") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    nats, predicted = expected_nats(reference, token_ids, window, stride)
    assert predicted > 600
    mean, num_bytes = nats / predicted, len(text.read_bytes())
    assert (report["window"], report["stride"], report["scored_tokens"]) == (window, stride, predicted)
    assert (report["text_tokens"], report["text_bytes"]) == (len(token_ids), num_bytes)
    assert (report["model_name"], report["dtype"], report["device"] != "") == ("qwen3_moe_demo", "float32", True)
    assert report["nats_per_token"] == pytest.approx(mean, rel=1e-4)
    assert report["perplexity"] == pytest.approx(math.exp(mean), rel=1e-3)
    assert report["bits_per_byte"] == pytest.approx(mean / math.log(2) * len(token_ids) / num_bytes, rel=1e-4)
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 3
    for figure in ("nats_per_token", "perplexity", "bits_per_byte"):
        assert f"{report[figure]:.4f}" in printed.out.split()
    assert ("windows: 100%" in printed.err) == (report["windows"] > 1)


def test_windows():
    """Which tokens count: with stride = window the first of each window does not."""
    assert windows(7, 3, 3) == [Window(start=0, end=3, first=1), Window(start=3, end=6, first=4)]
    assert windows(8, 4, 3) == [
        Window(start=0, end=4, first=1),
        Window(start=3, end=7, first=4),
        Window(start=6, end=8, first=7),
    ]
    assert windows(3, 100, 50) == [Window(start=0, end=3, first=1)]


@pytest.mark.parametrize("window", [2, 5, 16])
def test_every_token_but_the_first_counts_once_where_windows_overlap(window):
    for num_tokens in (2, 5, 16, 17, 40):
        for stride in range(1, window):
            parts = windows(num_tokens, window, stride)
            assert [token for part in parts for token in range(part.first, part.end)] == list(range(1, num_tokens))
            assert all(part.first - part.start >= window - stride for part in parts[1:])


def test_model_path(text, random_model, monkeypatch, tmp_path):
    """The checkpoint's folder instead of a YAML: its length is the default window."""
    report = tmp_path / "report.json"
    given = ("--text", text, "--model_path", random_model, *EXACT)
    assert perplexity(monkeypatch, *given, "--json", report) == 0
    found = json.loads(report.read_text())
    assert (found["window"], found["stride"], found["model_path"]) == (64, 64, str(random_model))
    assert 0 < found["nats_per_token"] < 20


@pytest.mark.parametrize(
    ("content", "options", "named"),
    [
        (None, (), "text.txt: cannot be read: no such file"),
        (b"", (), "text.txt is empty"),
        (b"a", (), "text.txt is a single token, at least 2 are needed"),
        (b"\xff\xfea\0", (), "text.txt: cannot be read: 'utf-8' codec can't decode byte 0xff"),
        (b"a b", ("--window", "1"), "--window: 1 is impossible, must be from 2 to the model's length of 8192 tokens"),
        (b"a b", ("--window", "8193"), "--window: 8193 is impossible, must be from 2 to the model's length of 8192"),
        (
            b"a b",
            ("--window", "8", "--stride", "9"),
            "--stride: 9 is impossible, must be at most the window's 8",
        ),
        (b"a b" * 99, ("--set", "model_config.cache_tokens=128"), "--window: a window of "),
        (b"a b", ("--set", "model_config.dtyp=float32"), "did you mean model_config.dtype?"),
        (b"a b", ("--yaml", "no_such"), "no_such.yaml: no such YAML file"),
        (b"a b", ("--model_path", "no/such"), "model_path: no/such does not exist"),
        (b"a b", ("--json", "text.txt"), "--json: text.txt is text.txt, which this run reads"),
        (b"a b", ("--json", "no/such/report.json"), "--json: no/such/report.json cannot be written"),
    ],
)
def test_bad_input(content, options, named, monkeypatch, tmp_path, capsys):
    """One line, exit code 2, and nothing written."""
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("text.txt").write_bytes(content)
    assert perplexity(monkeypatch, "--text", "text.txt", "--set", "device=cpu", *options) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("error: ") == 1 and named in printed.err
    assert printed.err.splitlines()[-1].startswith("error: ")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([] if content is None else [content])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--yaml", "demo", "--model_path", DEMO), "--model_path: not allowed with argument --yaml"),
        (("--window", "0"), "--window: '0' is not a whole number, at least 1"),
        (("--stride", "-1"), "--stride: '-1' is not"),
        (("--windows", "5"), "unrecognized arguments: --windows 5"),
    ],
)
def test_invalid_options(options, named, text, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        perplexity(monkeypatch, "--text", text, *options)
    assert ended.value.code == 2 and named in capsys.readouterr().err


def test_tokens_beyond_the_vocabulary(text, tmp_path, monkeypatch, capsys):
    make_checkpoint(tmp_path)
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    assert perplexity(monkeypatch, "--text", text, "--model_path", tmp_path, *EXACT) == 2
    assert "the model has 0 to 210" in capsys.readouterr().err


def test_not_finite(text, token_ids, random_model, monkeypatch, tmp_path, capsys):
    """One damaged row of the embedding, of a token of the last windows only: one line, and no figure of the others."""
    folder, report = tmp_path / "model", tmp_path / "report.json"
    shutil.copytree(random_model, folder)
    damaged = next(token for token in token_ids[-64:] if token not in token_ids[:-64])
    rewrite(folder, lambda tensors: tensors["model.embed_tokens.weight"][damaged].fill_(math.nan))
    assert perplexity(monkeypatch, "--text", text, "--model_path", folder, *EXACT, "--json", report) == 1
    printed = capsys.readouterr()
    line = printed.err.splitlines()[-1]
    assert line.startswith("error: tokens ") and "of the text: the logits of a position are not finite" in line
    assert printed.out == "" and "Traceback" not in printed.err and not report.exists()


def test_interrupted(text, random_model, monkeypatch, tmp_path, capsys):
    """After the first windows: neither a table nor a report."""
    finished, report, seen = LLM.finished, tmp_path / "report.json", []

    def interrupted(llm, requests, spread=False):
        for item in finished(llm, requests, spread):
            seen.append(item)
            yield item
            if len(seen) == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(LLM, "finished", interrupted)
    assert perplexity(monkeypatch, "--text", text, "--model_path", random_model, *EXACT, "--json", report) == 1
    printed = capsys.readouterr()
    assert len(seen) == 3 and printed.err.splitlines()[-1] == "error: interrupted by SIGTERM"
    assert printed.out == "" and not report.exists()


def on_rank(texts: list[Path], report: Path) -> tuple[int, str, str]:
    """Exit code and output of one rank, whose text is that of its index."""
    text = texts[int(os.environ["RANK"])]
    printed, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        patch.setenv("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
        options = ("--yaml", "demo_2dp_2ep", "--window", 150, "--stride", 100, "--json", report)
        code = perplexity(patch, "--text", text, *EXACT, *options)
    return code, printed.getvalue(), errors.getvalue()


def both_texts(text: Path, other: Path, report: Path) -> list[tuple[int, str, str]]:
    return [on_rank([text, text], report), on_rank([text, other], report)]


def test_two_ranks(text, token_ids, reference, tmp_path):
    """Each computes every other window and rank 0 reports; texts that differ are refused."""
    other, report = tmp_path / "other.txt", tmp_path / "report.json"
    other.write_text("Another text, as a second node may have under the same name.")
    first, second = run_ranks(2, both_texts, tmp_path, text, other, report)
    nats, predicted = expected_nats(reference, token_ids, 150, 100)
    assert json.loads(report.read_text())["nats_per_token"] == pytest.approx(nats / predicted, rel=1e-4)
    assert [rank[0][0] for rank in (first, second)] == [0, 0]
    assert len(first[0][1].splitlines()) == 3 and "windows: 100%" in first[0][2]
    assert second[0][1:] == ("", "")
    for code, printed, errors in (first[1], second[1]):
        assert (code, printed) == (2, "") and "error: --text, --window, --stride: not the same on all nodes" in errors
