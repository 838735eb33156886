# SPDX-License-Identifier: Apache-2.0
"""Written checkpoints against independent decoding and transformers; resuming, refusals, and the calibration."""

import copy
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen3MoeForCausalLM

from executor import LLM
from executor.config import REPOSITORY
from executor.quantize import search
from executor.quantize.__main__ import main
from executor.quantize.recipe import Recipe
from executor.quantize.scales import LayerScales, folding_of
from executor.quantize.search import InputStatistics, search_linear
from executor.quantize.shards import TensorFile
from executor.quantize.work import Work, locked
from models.quantization.rounding import round_int4, round_int4_clipped, round_int8
from ops.weight import dequantize
from tests.checkpoints import make_checkpoint, make_model, reference_logits, rewrite
from tests.quantized_checkpoints import CONFIG as SIZES
from tests.quantized_checkpoints import load_exact, with_integer_layers

DEMO = REPOSITORY / "models/qwen3_moe/demo"
FIXTURES = REPOSITORY / "tests/quantized"
TOKENS = [5, 17, 170, 3, 99, 42, 8, 120]
CONFIG = {**SIZES, "num_experts": 4, "moe_intermediate_size": 48}
SMALL = {**CONFIG, "vocab_size": 2048, "max_position_embeddings": 512}  # the demo's vocabulary


def quantize(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["quantize", "--device", "cpu", *map(str, arguments)])
    return main()


def in_child(body: Callable[[], object]) -> int:
    """Runs `body` in a forked process; returns its wait status."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the parent's threads are not there
        code = 70
        try:
            result = body()
            code = result if isinstance(result, int) else 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(file).items()
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """Unpacks int32 [..., K / 8] to [..., K], the lowest bits first."""
    return torch.stack([(words >> (4 * place)) & 15 for place in range(8)], dim=-1).flatten(-2)


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    """The float32 matrix of each quantised module of a checkpoint, by the name of its float weight."""
    stored, found = stored_tensors(folder), {}
    for name, scales in stored.items():
        if not name.endswith(".weight_scale"):
            continue
        module, scales = name.removesuffix(".weight_scale"), scales.float()
        if f"{module}.weight" in stored:
            found[f"{module}.weight"] = stored[f"{module}.weight"].float() * scales
            continue
        values = nibbles(stored[f"{module}.weight_packed"])
        assert stored[f"{module}.weight_shape"].tolist() == list(values.shape)
        zeros = torch.full_like(scales, 8)
        if f"{module}.weight_zero_point" in stored:
            zeros = nibbles(stored[f"{module}.weight_zero_point"].t()).t()[: len(values)]
        groups = values.view(*scales.shape, -1) - zeros[..., None]
        found[f"{module}.weight"] = (groups * scales[..., None]).view(values.shape)
    return found


ARGUMENTS = {
    "w8a8": ["--scheme", "w8a8"],
    "w4a16": ["--scheme", "w4a16", "--group-size", "16"],
    "w4a16 asymmetric": ["--scheme", "w4a16", "--group-size", "8", "--asymmetric"],
}
SOURCES: dict[str, dict[str, Any]] = {
    "float32": {},
    "stacked": {"stacked": True, "tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_only_layers": [0], "intermediate_size": 80},
}


def rounding_of(name: str, weight: torch.Tensor) -> torch.Tensor:
    if name == "w8a8":
        return dequantize(round_int8(weight), torch.float32)
    symmetric, size = name == "w4a16", 16 if name == "w4a16" else 8
    return dequantize(round_int4_clipped(weight, size, symmetric), torch.float32)


@pytest.mark.parametrize("scheme", ARGUMENTS)
@pytest.mark.parametrize("source", SOURCES)
def test_written_checkpoint_gives_the_logits_of_the_rounded_weights(tmp_path, monkeypatch, scheme, source):
    model = make_checkpoint(tmp_path / "float", **{**CONFIG, **SOURCES[source]})
    published = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    }
    options = ["--model_path", tmp_path / "float", "--output", tmp_path / "new", *ARGUMENTS[scheme]]
    assert quantize(monkeypatch, *options) == 0
    exact = decoded(tmp_path / "new")
    kept = {name: tensor for name, tensor in stored_tensors(tmp_path / "new").items() if name in published}
    for name in kept.keys() - exact.keys():
        assert torch.equal(kept[name], published[name]), name
    plain = {name for name in published if "_proj" not in name}
    assert plain <= kept.keys()
    before = copy.deepcopy(model)
    load_exact(model, exact)
    for (name, rounded), original in zip(model.named_parameters(), before.parameters(), strict=True):
        if "_proj" in name and not name.endswith(".bias"):  # all of them, the stacked experts too
            matrices = zip(rounded.view(-1, *rounded.shape[-2:]), original.view(-1, *original.shape[-2:]), strict=True)
            for one, other in matrices:
                assert torch.equal(one, rounding_of(scheme, other.detach())), name
    if scheme == "w8a8":
        if source == "biases":
            return  # the reference for int8 activations has no biases
        model = with_integer_layers(model)
    logits = LLM(tmp_path / "new", device="cpu", dtype="float32", output_dir=str(tmp_path)).logits(TOKENS)
    torch.testing.assert_close(logits, reference_logits(model, TOKENS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scales_have_the_dtype_of_the_weights(tmp_path, monkeypatch, dtype):
    make_model(**CONFIG).to(dtype).save_pretrained(tmp_path / "float")
    options = ["--model_path", tmp_path / "float", "--output", tmp_path / "new", *ARGUMENTS["w4a16"]]
    assert quantize(monkeypatch, *options) == 0
    stored = stored_tensors(tmp_path / "new")
    scales = {tensor.dtype for name, tensor in stored.items() if name.endswith("weight_scale")}
    assert scales == {torch.float32 if dtype is torch.float64 else dtype}
    assert stored["model.norm.weight"].dtype is dtype
    assert LLM(tmp_path / "new", device="cpu", output_dir=str(tmp_path)).logits(TOKENS).isfinite().all()


def test_names_without_prefix_become_those_of_published_checkpoints(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "float", **CONFIG)
    arguments = ["--scheme", "w8a8"]
    assert quantize(monkeypatch, "--model_path", tmp_path / "float", "--output", tmp_path / "one", *arguments) == 0

    def drop_prefix(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    rewrite(tmp_path / "float", drop_prefix)
    assert quantize(monkeypatch, "--model_path", tmp_path / "float", "--output", tmp_path / "other", *arguments) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


@pytest.mark.parametrize(
    ("fixture", "arguments"),
    [
        ("llmcompressor_w8a8", ["--scheme", "w8a8"]),
        ("llmcompressor_w4a16", ["--scheme", "w4a16", "--group-size", "32"]),
        ("llmcompressor_w4a16_asymmetric", ["--scheme", "w4a16", "--group-size", "32", "--asymmetric"]),
    ],
)
def test_layout_is_that_of_llmcompressor(tmp_path, monkeypatch, fixture, arguments):
    config = json.loads((FIXTURES / fixture / "config.json").read_text())
    theirs = config.pop("quantization_config")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes += ("num_key_value_heads", "head_dim", "num_experts", "num_experts_per_tok", "moe_intermediate_size")
    make_model(**{key: config[key] for key in sizes}).to(torch.bfloat16).save_pretrained(tmp_path / "float")
    assert quantize(monkeypatch, "--model_path", tmp_path / "float", "--output", tmp_path / "new", *arguments) == 0
    ours = json.loads((tmp_path / "new/config.json").read_text())["quantization_config"]
    theirs["config_groups"]["group_0"]["weights"].pop("observer")  # how the scales were found
    ours["config_groups"]["group_0"]["weights"].pop("observer")
    assert ours == theirs

    def layout(folder: Path) -> dict[str, tuple[torch.dtype, torch.Size]]:
        return {name: (tensor.dtype, tensor.shape) for name, tensor in stored_tensors(folder).items()}

    assert layout(tmp_path / "new") == layout(FIXTURES / fixture)


def test_zero_points_of_rows_that_do_not_fill_a_word(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "float", **{**CONFIG, "head_dim": 10, "moe_intermediate_size": 40, "num_experts": 3})
    options = ["--model_path", tmp_path / "float", "--output", tmp_path / "new", *ARGUMENTS["w4a16 asymmetric"]]
    assert quantize(monkeypatch, *options) == 0
    stored = stored_tensors(tmp_path / "new")
    assert stored["model.layers.0.self_attn.k_proj.weight_zero_point"].shape == (3, 8)  # of 20 rows
    assert LLM(tmp_path / "new", device="cpu", output_dir=str(tmp_path)).logits(TOKENS).isfinite().all()


def test_other_files_are_carried_over(tmp_path, monkeypatch):
    folder = tmp_path / "float"
    make_checkpoint(folder, **CONFIG)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / name, folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "LICENSE").write_text("free")
    (folder / "LICENSE").symlink_to(tmp_path / "LICENSE")  # as in the hub's cache
    for name in ("pytorch_model.bin", "adapter.safetensors", ".gitattributes", "model.safetensors.index.json.bak"):
        (folder / name).write_text("{}")
    (folder / "original").mkdir()
    assert quantize(monkeypatch, "--model_path", folder, "--output", tmp_path / "new", "--scheme", "w8a8") == 0
    carried = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "LICENSE")
    carried += ("model.safetensors.index.json.bak",)
    assert sorted(contents(tmp_path / "new")) == sorted((*carried, "config.json", "model.safetensors"))
    assert all((tmp_path / "new" / name).read_bytes() == (folder / name).read_bytes() for name in carried)
    assert not (tmp_path / "new/LICENSE").is_symlink()
    config = json.loads((tmp_path / "new/config.json").read_text())
    del config["quantization_config"]
    assert config == json.loads((folder / "config.json").read_text())
    assert not (tmp_path / "new.partial").exists()
    with safe_open(tmp_path / "new/model.safetensors", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_memory_is_a_few_matrices(tmp_path, monkeypatch):
    """The checkpoint has more than 60 MB, in one file."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 16, "num_hidden_layers": 5}
    make_model(**{**CONFIG, **sizes}).to(torch.bfloat16).save_pretrained(tmp_path / "float")
    assert (tmp_path / "float/model.safetensors").stat().st_size > 60e6
    options = ["--model_path", tmp_path / "float", "--output", tmp_path / "new", "--scheme", "w8a8"]

    def body() -> int:
        warm = make_model(**CONFIG)
        warm.save_pretrained(tmp_path / "warm")
        quantize(monkeypatch, "--model_path", tmp_path / "warm", "--output", tmp_path / "w8", "--scheme", "w8a8")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = memory("VmRSS")
        assert quantize(monkeypatch, *options) == 0
        grown = memory("VmHWM") - before
        return 0 if grown < 20e6 else 1

    assert in_child(body) == 0


def memory(key: str) -> int:
    """Bytes, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A checkpoint of several files of 1 MB once quantised, with a tokenizer."""
    folder = tmp_path_factory.mktemp("large") / "float"
    make_checkpoint(folder, **{**SMALL, "hidden_size": 128}, max_shard_size="1MB")
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, folder)
    (folder.parent / "text.txt").write_text((DEMO / "heldout.txt").read_text(encoding="utf-8")[:2000], encoding="utf-8")
    return folder


def large_options(patch: pytest.MonkeyPatch, large: Path, output: Path) -> list[object]:
    """Options to quantise `large`, with a short search."""
    patch.setattr(search, "EXPONENTS", (0.5,))
    text = large.parent / "text.txt"
    options = ["--shard-size", 1, "--scheme", "w4a16", "--group-size", 16, "--calibration", text]
    return ["--model_path", large, "--output", output, *options]


@pytest.fixture(scope="module")
def whole(large: Path) -> dict[str, bytes]:
    """Files that a run without interruption writes."""
    with pytest.MonkeyPatch.context() as patch:
        assert (
            quantize(patch, *large_options(patch, large, large.parent / "whole"), "--json", large.parent / "w.json")
            == 0
        )
    return contents(large.parent / "whole")


def test_files_have_a_limited_size_and_an_index(large, whole):
    index = json.loads(whole["model.safetensors.index.json"])
    files = sorted(name for name in whole if name.endswith(".safetensors"))
    assert len(files) > 2 and files == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    folder, total = large.parent / "whole", 0
    for file in files:
        with safe_open(folder / file, framework="pt") as handle:
            names = set(handle.keys())
            size = sum(tensor.nbytes for tensor in load_file(folder / file).values())
        assert names == {name for name, where in index["weight_map"].items() if where == file}
        assert size <= 1e6 or len(names) == 1
        total += size
    assert index["metadata"]["total_size"] == total


def test_report(large, whole):
    report = json.loads((large.parent / "w.json").read_text())
    assert report["scheme"] == "w4a16" and report["group_size"] == 16
    assert report["calibration"]["tokens"] > 512
    for layer in report["calibration"]["relative_squared_errors"]:
        assert layer.keys() == {"attention", "output", "feed_forward", "down"}
        assert all(0 < error["with_scales"] <= error["without_scales"] < 1 for error in layer.values())


def killed_at(monkeypatch: pytest.MonkeyPatch, point: str, count: int, options: list[object]) -> bool:
    """Runs with SIGKILL at the `count`-th fsync, rename or write of a tensor; False if there are not so many."""

    def body() -> int:
        owner, name = {"fsync": (os, "fsync"), "rename": (Path, "replace"), "write": (TensorFile, "write")}[point]
        real, calls = getattr(owner, name), iter(range(1, 10**6))

        def call(*arguments: Any) -> Any:
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        setattr(owner, name, call)
        return quantize(monkeypatch, *options)

    status = in_child(body)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def test_killed_run_is_continued(large, whole, tmp_path, monkeypatch):
    """A run is killed again and again; it gets a little further each time, and writes no finished file again."""
    output, partial = tmp_path / "new", tmp_path / "new.partial"
    options = large_options(monkeypatch, large, output)
    finished: dict[Path, int] = {}
    points = [("fsync", 1), ("fsync", 2), ("rename", 1), ("fsync", 4), ("rename", 2), ("write", 2), ("rename", 2)]
    for point, count in [*points, ("write", 5), ("fsync", 3), ("rename", 1), ("fsync", 2), ("fsync", 9), ("rename", 9)]:
        if not killed_at(monkeypatch, point, count, options):
            break
        assert not output.exists()
        for file, inode in finished.items():
            assert file.stat().st_ino == inode, f"{file} was written again"
        finished = {file: file.stat().st_ino for file in partial.glob("c*/*.safetensors")}
        shards = [file for file in finished if file.parent.name == "checkpoint"]
        assert all(file.read_bytes() == whole[file.name] for file in shards)
    assert len(shards) > 1
    if not output.exists():
        assert quantize(monkeypatch, *options) == 0
    assert contents(output) == whole
    assert not partial.exists()


@pytest.mark.parametrize("limit", [3_000, 600_000])
def test_full_disk(large, whole, tmp_path, monkeypatch, capfd, limit):
    options = large_options(monkeypatch, large, tmp_path / "new")

    def body() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return quantize(monkeypatch, *options)

    assert os.waitstatus_to_exitcode(in_child(body)) == 1
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert "File too large" in last and "the same command continues" in last
    assert not (tmp_path / "new").exists() and not list(tmp_path.rglob("*.part"))
    assert quantize(monkeypatch, *options) == 0
    assert contents(tmp_path / "new") == whole


def test_only_the_same_run_continues(large, tmp_path, monkeypatch, capsys):
    output = tmp_path / "new"
    options = large_options(monkeypatch, large, output)
    copied = tmp_path / "float"
    shutil.copytree(large, copied)
    assert killed_at(monkeypatch, "fsync", 3, options)
    before = contents(tmp_path / "new.partial/calibration")
    others = {
        "group_size (16, now 8)": ["--group-size", 8],
        "symmetric": ["--asymmetric"],
        "shard_size": ["--shard-size", 2],
        "calibration": ["--calibration", REPOSITORY / "README.md"],
        "source": ["--model_path", copied],
    }
    os.utime(next(copied.glob("model*.safetensors")), (1, 1))
    for key, arguments in others.items():
        assert quantize(monkeypatch, *options, *arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"another {key}" in error and "delete it" in error
    assert contents(tmp_path / "new.partial/calibration") == before


def test_another_run_is_not_disturbed(large, tmp_path, monkeypatch, capsys):
    options = large_options(monkeypatch, large, tmp_path / "new")
    with locked(Work(tmp_path / "new")):
        assert quantize(monkeypatch, *options) == 2
    assert "another run is writing to" in capsys.readouterr().err
    assert not list((tmp_path / "new.partial").iterdir())
    assert quantize(monkeypatch, *options) == 0


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "float"
    make_checkpoint(folder, **SMALL)
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


W4A16 = ("--scheme", "w4a16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "OUT", "--scheme", "w8a8", "--group-size", "128"], "--group-size: w8a8 has none"),
        (["--output", "OUT", "--scheme", "w8a8", "--asymmetric"], "--asymmetric: w8a8 has none"),
        (["--output", "OUT", "--scheme", "w8a8", "--calibration", "TEXT"], "--calibration: w8a8 has none"),
        (["--output", "OUT", *W4A16], "--group-size: 128 is impossible, model.layers.0.self_attn.q_proj.weight has 64"),
        (["--output", "OUT", *W4A16, "--group-size", "32"], "down_proj.weight has 48 columns; possible: 8, 16"),
        (["--output", "OUT", *W4A16, "--group-size", "4"], "8 values are packed to a word; possible: 8, 16"),
        (["--output", "OUT", *W4A16, "--group-size", "0"], "at least 1"),
        (["--output", "MODEL", "--scheme", "w8a8"], "exists: choose another folder"),
        (["--output", "TAKEN", "--scheme", "w8a8"], "it is not from an interrupted run"),
        (["--output", "/proc/none/new", "--scheme", "w8a8"], "--output: "),
        (["--output", "OUT", *W4A16, "--group-size", "16", "--calibration", "SHORT"], "at least 512 are needed"),
        (["--output", "OUT", *W4A16, "--group-size", "16", "--calibration", "BYTES"], "codec can't decode"),
        (["--output", "OUT", *W4A16, "--group-size", "16", "--calibration", "NONE"], "no such file"),
        (["--output", "OUT", "--scheme", "w8a8", "--json", "MODEL/config.json"], "choose another file"),
        (["--output", "OUT", "--scheme", "w8a8", "--model_path", "NONE"], "is not the folder of a checkpoint"),
    ],
)
def test_refused_before_any_work(small, tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "short").write_text("Too short.")
    (tmp_path / "bytes").write_bytes(b"\xff" * 5000)
    (tmp_path / "taken.partial").mkdir()
    (tmp_path / "taken.partial/mine").write_text("")
    places = {"OUT": "out", "TEXT": "text", "SHORT": "short", "BYTES": "bytes", "NONE": "none", "TAKEN": "taken"}
    filled = [
        str(tmp_path / places[word]) if word in places else word.replace("MODEL", str(small)) for word in arguments
    ]
    options = filled if "--model_path" in filled else ["--model_path", small, *filled]
    try:
        code = quantize(monkeypatch, *options)
    except SystemExit as error:
        code = error.code
    assert code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    assert sorted(file.name for file in (tmp_path / "taken.partial").iterdir()) == ["mine"]


def test_widths_that_do_not_fill_words_are_refused(tmp_path, monkeypatch, capsys):
    make_checkpoint(tmp_path / "float", **{**CONFIG, "moe_intermediate_size": 44})
    options = ["--model_path", tmp_path / "float", "--output", tmp_path / "new"]
    assert quantize(monkeypatch, *options, *W4A16) == 2
    assert "multiples of 8, model.layers.0.mlp.experts.0.down_proj.weight has 44" in capsys.readouterr().err
    assert quantize(monkeypatch, *options, "--scheme", "w8a8") == 0


def test_quantised_checkpoints_are_refused(tmp_path, monkeypatch, capsys):
    sources = {path.parent: "already quantised" for path in FIXTURES.glob("*/config.json")}
    assert len(sources) > 5
    unmarked = tmp_path / "unmarked"  # its config does not say so
    shutil.copytree(FIXTURES / "gptqmodel_gptq", unmarked)
    config = json.loads((unmarked / "config.json").read_text())
    (unmarked / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    for source in (*sources, unmarked):
        for scheme in ("w8a8", "w4a16"):
            options = ["--model_path", source, "--output", tmp_path / "new", "--scheme", scheme]
            assert quantize(monkeypatch, *options) == 2
            error = capsys.readouterr().err.strip().splitlines()[-1]
            assert "is already quantised (" in error, (source, error)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.experts.3.up_proj.weight", "model.embed_tokens.weight"]
)
@pytest.mark.parametrize("calibrated", [False, True])
def test_values_that_are_not_finite_are_refused(small, large, tmp_path, monkeypatch, capsys, name, calibrated):
    shutil.copytree(small, tmp_path / "float")
    rewrite(tmp_path / "float", lambda tensors: tensors[name].view(-1)[-1].fill_(float("nan")))
    options = large_options(monkeypatch, large, tmp_path / "new") if calibrated else ["--scheme", "w8a8"]
    options += ["--output", tmp_path / "new", "--model_path", tmp_path / "float"]
    assert quantize(monkeypatch, *options) == 2
    assert f"{name} has values that are not finite" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()
    assert len(list(tmp_path.rglob("layer_*"))) < 2 or name == "model.norm.weight"  # before the calibration


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_lowers_the_weighted_error_of_every_group(symmetric):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(24, 256, generator=generator)
    weight[3, 64:128] = 0
    importance = torch.rand(256, generator=generator) ** 4
    for columns in (None, importance):
        factor = torch.ones(256) if columns is None else columns

        def errors(found: torch.Tensor, factor: torch.Tensor = factor) -> torch.Tensor:
            return ((found - weight).square() * factor).view(24, 4, 64).sum(-1)

        found = errors(dequantize(round_int4_clipped(weight, 64, symmetric, importance=columns), torch.float32))
        each = [
            errors(dequantize(round_int4(weight, 64, symmetric, clipping=1 - step / 20), torch.float32))
            for step in range(10)
        ]
        torch.testing.assert_close(found, torch.stack(each).amin(0))
        assert (found <= each[0] + 1e-9).all() and found.sum() < 0.95 * each[0].sum()
    assert (dequantize(round_int4_clipped(weight, 64, symmetric), torch.float32)[3, 64:128] == 0).all()


def test_scales_that_are_too_small_for_float16_give_zeros():
    weight = torch.full((8, 16), 1e-7).half()
    for rounded in (round_int8(weight), round_int4(weight, 8, True), round_int4(weight, 8, False)):
        assert (dequantize(rounded, torch.float32).abs() < 1e-6).all()


def test_search_protects_columns_with_large_inputs():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(96, 64, generator=generator)
    inputs = torch.randn(500, 64, generator=generator)
    inputs[:, [3, 20, 41]] *= 40
    recipe = Recipe(scheme="w4a16", group_size=32)
    found = search_linear(recipe, [weight], InputStatistics(64, torch.device("cpu")).add(inputs))

    def error(scales: torch.Tensor) -> float:
        rounded = dequantize(round_int4(weight * scales, 32, True), torch.float32) / scales
        return float((inputs @ (rounded - weight).t()).square().sum() / (inputs @ weight.t()).square().sum())

    assert found.errors.tolist() == pytest.approx([error(torch.ones(64)), error(found.scales)], rel=1e-3)
    assert found.errors[1] < 0.6 * found.errors[0]


def random_scales(config: Any, layer: int, seed: int) -> LayerScales:
    generator = torch.Generator().manual_seed(seed)

    def scales(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) * 3 + 0.2

    rows = config.num_attention_heads * config.head_dim
    is_mha = config.num_attention_heads == config.num_key_value_heads
    output = scales(rows) if is_mha else torch.ones(rows)
    value = output if is_mha else torch.ones(config.num_key_value_heads * config.head_dim)
    is_dense = layer in config.mlp_only_layers
    experts, width = (1, config.intermediate_size) if is_dense else (config.num_experts, config.moe_intermediate_size)
    hidden = config.hidden_size
    return LayerScales(
        attention=scales(hidden),
        output=output,
        value=value,
        feed_forward=scales(hidden),
        down=scales(experts, width),
        attention_squares=scales(hidden),
        output_squares=scales(rows),
        feed_forward_squares=scales(experts, hidden),
        down_squares=scales(experts, width),
        errors=torch.zeros(4, 2),
    )


@pytest.mark.parametrize("kv_heads", [2, 8])
def test_folded_scales_leave_the_function_unchanged(tmp_path, kv_heads):
    config = {**CONFIG, "num_key_value_heads": kv_heads, "attention_bias": True, "mlp_only_layers": [1]}
    model = make_checkpoint(tmp_path, **config)
    before = reference_logits(model, TOKENS)

    def fold(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            scales = random_scales(model.config, layer, layer)
            for name in [name for name in tensors if name.startswith(f"model.layers.{layer}.")]:
                folding = folding_of(name, scales)
                if folding is not None:
                    tensors[name] = folding.apply(tensors[name])

    rewrite(tmp_path, fold)
    after = reference_logits(Qwen3MoeForCausalLM.from_pretrained(tmp_path).eval(), TOKENS)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    changed = load_file(tmp_path / "model.safetensors")
    untouched = [
        name for name, tensor in changed.items() if torch.equal(tensor, model.state_dict().get(name, tensor + 1))
    ]
    assert not [name for name in untouched if name.endswith(("input_layernorm.weight", "gate.weight", "q_proj.weight"))]


def with_outliers(folder: Path) -> None:
    """Makes some channels of the normed hidden states and of the experts' activations large."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("layernorm.weight"):
                tensor[[1, 30, 50]] *= 25
            elif name.endswith(
                ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
            ):
                tensor[:, [1, 30, 50]] /= 5
            elif name.endswith("mlp.gate.weight"):
                tensor[:, [1, 30, 50]] /= 25

    rewrite(folder, change)


@pytest.fixture(scope="module")
def outliers(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("outliers") / "float"
    make_checkpoint(folder, **{**SMALL, "num_key_value_heads": 8})  # so that o_proj has scales of its own
    with_outliers(folder)
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def test_calibration_lowers_the_error_of_the_logits(outliers, tmp_path, monkeypatch):
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    (tmp_path / "text.txt").write_text(text[:4000], encoding="utf-8")
    options = ["--model_path", outliers, "--scheme", "w4a16", "--group-size", 16]
    assert quantize(monkeypatch, *options, "--output", tmp_path / "plain") == 0
    options += ["--calibration", tmp_path / "text.txt"]
    assert quantize(monkeypatch, *options, "--output", tmp_path / "calibrated") == 0
    token_ids = AutoTokenizer.from_pretrained(DEMO).encode(text[-1500:])
    reference = reference_logits(Qwen3MoeForCausalLM.from_pretrained(outliers).eval(), token_ids)

    def error(folder: Path) -> float:
        found = LLM(folder, device="cpu", dtype="float32", output_dir=str(tmp_path)).logits(token_ids)
        return float((found - reference).square().mean())

    assert error(tmp_path / "calibrated") < 0.8 * error(tmp_path / "plain")


def test_calibration_sees_the_inputs_of_the_float_model(tmp_path, monkeypatch):
    """Mean squares of all layers' inputs, against hooks in transformers' model."""
    config = {**SMALL, "mlp_only_layers": [0], "num_hidden_layers": 3}
    model = make_checkpoint(tmp_path / "float", **config)
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "float")
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")[:1800]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    options = ["--model_path", tmp_path / "float", "--scheme", "w4a16", "--group-size", 16]
    options += ["--calibration", tmp_path / "text.txt", "--output", tmp_path / "new"]
    kept = tmp_path / "kept"
    monkeypatch.setattr("executor.quantize.work.shutil.rmtree", lambda folder, **_: Path(folder).rename(kept))
    assert quantize(monkeypatch, *options) == 0
    token_ids = AutoTokenizer.from_pretrained(DEMO).encode(text)
    assert len(token_ids) > 512  # two windows
    for index, layer in enumerate(model.model.layers):
        found = load_file(kept / f"calibration/layer_{index}.safetensors")
        modules = {"attention_squares": layer.self_attn.q_proj, "output_squares": layer.self_attn.o_proj}
        modules |= {"down_squares": layer.mlp.down_proj} if index == 0 else {}
        inputs: dict[str, list[torch.Tensor]] = {key: [] for key in modules}
        hooks = [
            module.register_forward_hook(lambda _, given, __, rows=inputs[key]: rows.append(given[0].flatten(0, -2)))
            for key, module in modules.items()
        ]
        for start in range(0, len(token_ids), 512):
            reference_logits(model, token_ids[start : start + 512])
        for hook in hooks:
            hook.remove()
        for key, rows in inputs.items():
            expected = torch.cat(rows).square().mean(0)
            torch.testing.assert_close(found[key].flatten(), expected, rtol=1e-4, atol=1e-6)


def test_interrupt_ends_in_one_line_and_is_continued(large, whole, tmp_path, monkeypatch, capfd):
    options = large_options(monkeypatch, large, tmp_path / "new")

    def body() -> int:
        real, calls = TensorFile.write, iter(range(1, 10**6))

        def write(*arguments: Any) -> None:
            if next(calls) == 20:
                os.kill(os.getpid(), signal.SIGINT)
            real(*arguments)

        TensorFile.write = write  # type: ignore[method-assign]
        return quantize(monkeypatch, *options)

    assert os.waitstatus_to_exitcode(in_child(body)) == 1
    assert capfd.readouterr().err.strip().splitlines()[-1] == "error: interrupted by SIGINT"
    assert not list(tmp_path.rglob("*.part"))
    assert quantize(monkeypatch, *options) == 0
    assert contents(tmp_path / "new") == whole
