# SPDX-License-Identifier: Apache-2.0
"""Loading checkpoints: parameters, errors before allocation, and peak memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig

from executor.config import REPOSITORY
from executor.loading.before_loading import load_config
from executor.loading.loader import MAPPED_BYTES, load_parameters, random_parameters
from executor.loading.stored_model import check_tensors
from models.layers.parameter import Parameters, ParameterSpec, Role
from models.quantization.scheme import Scheme
from models.qwen3_moe.sharding import Layout
from models.qwen3_moe.weights import parameter_specs
from ops import DenseWeight
from tests.checkpoints import TINY, make_checkpoint, rewrite
from tests.quantized_checkpoints import FORMATS

CPU = torch.device("cpu")
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """A checkpoint in a single file."""
    folder = tmp_path_factory.mktemp("single")
    make_checkpoint(folder)
    return folder


@pytest.fixture
def checkpoint(single, tmp_path) -> Path:
    """A modifiable copy of `single`."""
    return Path(shutil.copytree(single, tmp_path / "checkpoint"))


@pytest.fixture
def sharded(tmp_path) -> Path:
    """The same weights as shards with an index."""
    make_checkpoint(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Parameters:
    return load_whole(folder, parameter_specs(load_config(folder), Layout()), dtype)


def load_whole(folder: Path, specs: list[ParameterSpec], dtype: torch.dtype) -> Parameters:
    return load_parameters(check_tensors(folder, specs, Scheme()), specs, dtype, CPU)


def tensor(value: torch.Tensor | DenseWeight) -> torch.Tensor:
    return value.data if isinstance(value, DenseWeight) else value


def assert_loaded(loaded: Parameters, folder: Path, stored: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Asserts that every stored tensor is in its parameter's region, in `dtype`."""
    for spec in parameter_specs(load_config(folder), Layout()):
        value = tensor(loaded[spec.name])
        assert value.dtype == dtype and value.shape == spec.shape
        for source in spec.sources:
            assert torch.equal(value[source.region], stored.pop(source.name).to(dtype)), source.name
    assert not stored


def refusal(folder: Path, monkeypatch) -> str:
    """The one-line error of an invalid checkpoint, raised before any allocation."""
    specs = parameter_specs(load_config(folder), Layout())
    with monkeypatch.context() as patch, pytest.raises(ValueError) as error:
        patch.setattr(torch, "empty", lambda *_, **__: pytest.fail("memory was allocated"))
        load_whole(folder, specs, torch.float32)
    assert "\n" not in str(error.value) and len(str(error.value)) <= 500
    return str(error.value)


def test_merged_parameters(single):
    stored = load_file(single / "model.safetensors")
    attention, mlp = "model.layers.2.self_attn", "model.layers.2.mlp.experts"
    loaded = load(single)
    qkv = torch.cat([stored[f"{attention}.{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(tensor(loaded["layers.2.self_attn.qkv_proj.weight"]), qkv)
    gate_up = [torch.cat([stored[f"{mlp}.{e}.{part}_proj.weight"] for part in ("gate", "up")]) for e in range(10)]
    assert torch.equal(tensor(loaded["layers.2.mlp.experts.gate_up_proj"]), torch.stack(gate_up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(stored_dtype, dtype, checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.update({k: v.to(stored_dtype) for k, v in tensors.items()}))
    assert_loaded(load(checkpoint, dtype), checkpoint, load_file(checkpoint / "model.safetensors"), dtype)


def test_sharded(single, sharded):
    (sharded / "stray.safetensors").write_bytes(b"garbage")
    shutil.copy(single / "model.safetensors", sharded / "model-copy.safetensors")
    assert_loaded(load(sharded), sharded, load_file(single / "model.safetensors"), torch.float32)


def test_file_larger_than_one_mapping(single, monkeypatch):
    monkeypatch.setattr("executor.loading.loader.MAPPED_BYTES", 10_000)
    assert_loaded(load(single), single, load_file(single / "model.safetensors"), torch.float32)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(EXPERT), f"1 missing: {EXPERT}"),
        (lambda t: t.pop("model.norm.weight"), "1 missing: model.norm.weight"),
        (lambda t: t.pop("lm_head.weight"), "1 missing: lm_head.weight"),
        (lambda t: [t.pop(name) for name in list(t) if ".experts.9." in name], "9 missing: "),
        (lambda t: t.update({"model.layers.3.mlp.gate.weight": torch.ones(1)}), "1 not expected: model.layers.3.mlp."),
        (lambda t: t.update({"x": torch.ones(1), "lm_head.bias": torch.ones(211)}), "2 not expected: lm_head.bias, x"),
        (
            lambda t: t.update({EXPERT: torch.ones(48, 40)}),
            f"of wrong shape: {EXPERT} is [48, 40] instead of [40, 48]",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(1, 48)}), "model.norm.weight is [1, 48] instead of [48]"),
        (lambda t: t.update({EXPERT: torch.ones(40, 48).to(torch.int8)}), f"{EXPERT} of int8 with no quantization_"),
        (lambda t: t.update({EXPERT: torch.ones(40, 48).long()}), f"1 of wrong dtype: {EXPERT} is I64"),
        (lambda t: t.update({EXPERT: torch.ones(40, 48).to(torch.float8_e4m3fn)}), f"{EXPERT} of FP8 without weight_"),
        (lambda t: t.update({"renamed": t.pop(EXPERT)}), f"1 missing: {EXPERT}; 1 not expected: renamed"),
    ],
)
def test_mismatched_tensors(change, named, checkpoint, monkeypatch):
    rewrite(checkpoint, change)
    line = refusal(checkpoint, monkeypatch)
    assert line.startswith(f"{checkpoint}: ") and named in line, line


def test_lm_head_with_tied_embedding(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("executor.loading.loader.MAPPED_BYTES", 10_000)
    make_checkpoint(tmp_path, tie_word_embeddings=True)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    caplog.set_level("INFO")
    load(tmp_path)
    assert "not needed: lm_head.weight (equals the embedding)" in caplog.text
    rewrite(tmp_path, lambda t: t["lm_head.weight"][-1].neg_())
    line = refusal(tmp_path, monkeypatch)
    assert "lm_head.weight differs from the embedding model.embed_tokens.weight" in line and "must be false" in line


@pytest.mark.parametrize("keep", [0, 4, 500, -1])
def test_truncated_file(keep, checkpoint, sharded, monkeypatch):
    for file in (checkpoint / "model.safetensors", sorted(sharded.glob("*.safetensors"))[1]):
        file.write_bytes(file.read_bytes()[:keep])
        assert refusal(file.parent, monkeypatch).startswith(f"{file}: truncated or not a safetensors file: ")


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"\x80" * 4096, b"\0" * 4096])
def test_not_a_safetensors_file(content, checkpoint, monkeypatch):
    (checkpoint / "model.safetensors").write_bytes(content)
    assert f"{checkpoint / 'model.safetensors'}: truncated or not a" in refusal(checkpoint, monkeypatch)


def test_no_weights(checkpoint, monkeypatch):
    (checkpoint / "model.safetensors").rename(checkpoint / "other.safetensors")
    assert f"{checkpoint} has neither" in refusal(checkpoint, monkeypatch)


def test_missing_shard(sharded, monkeypatch):
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    line = refusal(sharded, monkeypatch)
    assert line.startswith(f"{sharded / INDEX}: {gone.name} named there but not in the folder")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ["b"]}}', b"\xff"],
)
def test_invalid_index(content, sharded, monkeypatch):
    (sharded / INDEX).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refusal(sharded, monkeypatch).startswith(f"{sharded / INDEX}: not a safetensors index")


def test_tensor_in_two_shards(sharded, monkeypatch):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    tensors = load_file(first)
    save_file({**load_file(second), **dict([next(iter(tensors.items()))])}, second)
    assert f"{second}: tensor {next(iter(tensors))} is also in another file" in refusal(sharded, monkeypatch)


def test_tensor_of_the_index_missing_in_its_shard(sharded, monkeypatch):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    name, _ = tensors.popitem()
    save_file(tensors, shard)
    assert json.loads((sharded / INDEX).read_text())["weight_map"][name] == shard.name
    assert f"1 missing: {name}" in refusal(sharded, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_random_parameters(dtype, single):
    specs = parameter_specs(load_config(single), Layout())
    first, again, other = (random_parameters(specs, dtype, CPU, std=0.1, seed=seed) for seed in (1, 1, 2))
    for spec in specs:
        value = tensor(first[spec.name])
        assert value.shape == spec.shape and value.dtype == dtype
        assert torch.equal(value, tensor(again[spec.name]))
        if spec.role is Role.NORM:
            assert (value == 1).all()
        else:
            assert not torch.equal(value, tensor(other[spec.name]))
            assert value.float().std().item() == pytest.approx(0.1, rel=0.2)


LOAD_AND_MEASURE = """
import json, sys
from pathlib import Path
import torch
from executor.loading import loader
from executor.loading.loader import load_parameters
from executor.loading.stored_model import check_tensors
from executor.loading.before_loading import load_config, load_scheme
from models.quantization.scheme import Scheme
from models.qwen3_moe.sharding import Layout
from models.qwen3_moe.weights import parameter_specs

read_parts, read_bytes = loader.read_parts, 0

def counted(file, wanted):
    global read_bytes
    for part, piece in read_parts(file, wanted):
        read_bytes += part.nbytes
        yield part, piece

loader.read_parts = counted

def memory(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

folder, warm_up = map(Path, sys.argv[1:3])
layout = Layout(**json.loads(sys.argv[3]))
specs = parameter_specs(load_config(warm_up), Layout())
load_parameters(check_tensors(warm_up, specs, Scheme()), specs, torch.bfloat16, torch.device("cpu"))
whole_model = parameter_specs(load_config(folder), Layout())
specs = parameter_specs(load_config(folder), layout)
read_bytes = 0
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # resets the peak memory
stored = check_tensors(folder, whole_model, load_scheme(folder, json.loads((folder / "config.json").read_text())))
parameters = load_parameters(stored, specs, torch.bfloat16, torch.device("cpu"))
print(json.dumps([sum(value.nbytes for value in parameters.values.values()), memory("VmHWM") - before, read_bytes]))
"""


def write_large(folder: Path, num_layers: int, stacked: bool) -> None:
    """Random bfloat16 checkpoint in one file: 38 MB per layer plus 34 MB, larger than one mapping."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 384, "num_experts": 32, "vocab_size": 16384}
    config = Qwen3MoeConfig(**{**TINY, **sizes, "num_hidden_layers": num_layers})
    config.save_pretrained(folder)
    specs = parameter_specs(config, Layout())
    sources = [source for spec in specs for source in (stacked and spec.stacked or spec.sources)]
    tensors = {source.name: torch.randn(source.shape).bfloat16() for source in sources}
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture(scope="module", params=[False, True], ids=["experts", "stacked"])
def large(tmp_path_factory, request) -> Path:
    """LOADER_TEST_LAYERS=52 makes it 2 GB."""
    folder = tmp_path_factory.mktemp("large")
    write_large(folder, num_layers=int(os.environ.get("LOADER_TEST_LAYERS", "8")), stacked=request.param)
    return folder


def load_and_measure(folder: Path, warm_up: Path, layout: dict[str, tuple[int, int]]) -> list[int]:
    """Bytes of the loaded weights, of the growth of memory at its peak, and of what was read."""
    command = [sys.executable, "-c", LOAD_AND_MEASURE, str(folder), str(warm_up), json.dumps(layout)]
    measured = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert measured.returncode == 0, measured.stderr
    return json.loads(measured.stdout)


@pytest.mark.parametrize(
    "layout",
    [{}, {"attn_tp": (1, 2), "moe_tp": (1, 2)}, {"attn_tp": (0, 2), "moe_ep": (1, 2)}],
    ids=["one", "tp", "ep"],
)
def test_memory_while_loading(layout, large, single):
    weights_bytes, growth_bytes, read_bytes = load_and_measure(large, single, layout)
    growth = growth_bytes / weights_bytes
    print(f"{weights_bytes / 1e9:.3f} GB, peak growth {growth:.4f} of it, read {read_bytes / 1e9:.3f} GB")
    assert read_bytes == weights_bytes  # no other rank's shard
    assert weights_bytes > 4 * MAPPED_BYTES
    # Beyond the weights: the mapped part of the file, of constant size, and some slack.
    assert growth_bytes <= 1.1 * weights_bytes + MAPPED_BYTES, (growth_bytes, weights_bytes)


@pytest.mark.parametrize("name", ["awq", "w8a8"])
def test_memory_while_loading_quantised(name, tmp_path, single):
    """Of the second of two ranks: half of every quantised tensor, all of the others."""
    write, quantization_config = FORMATS[name]
    write_large(tmp_path, num_layers=8, stacked=False)
    tensors = load_file(tmp_path / "model.safetensors")
    rest_bytes, half_bytes = 0, 0
    for key in list(tensors):
        if "_proj" in key:
            parts, _ = write(tensors.pop(key).float())
            tensors |= {f"{key.removesuffix('.weight')}.{suffix}": part.contiguous() for suffix, part in parts.items()}
            half_bytes += sum(part.nbytes for part in parts.values()) // 2
        else:
            rest_bytes += tensors[key].nbytes
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization_config}))
    weights_bytes, growth_bytes, read_bytes = load_and_measure(tmp_path, single, {"attn_tp": (1, 2), "moe_tp": (1, 2)})
    stored_bytes = half_bytes + rest_bytes
    print(f"stored {stored_bytes}, read {read_bytes}, loaded {weights_bytes}, peak growth {growth_bytes}")
    assert stored_bytes <= read_bytes <= 1.01 * stored_bytes  # scales by row of matrices split by columns are whole
    assert weights_bytes <= 1.1 * stored_bytes
    assert growth_bytes <= 1.1 * stored_bytes + 2 * MAPPED_BYTES
