# SPDX-License-Identifier: Apache-2.0
"""Free CPU memory under control group and process limits, and cache sizing."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from executor import LLM
from executor.config import REPOSITORY, settings_from_dict
from executor.loading import device
from executor.loading.cgroup import memory_left_bytes
from executor.loading.device import cpu_name, free_memory_bytes
from executor.loading.memory import allocate_cache, blocks_in_use
from ops import Ops
from ops.comm import Group, ParallelContext
from ops.step import BLOCK_SIZE, blocks_for

CPU = torch.device("cpu")
DEMO = REPOSITORY / "models/qwen3_moe/demo"
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"
V2_MOUNT = "31 23 0:28 {} /sys/fs/cgroup rw,nosuid,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "35 31 0:32 {} /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
CPU_MOUNT = "32 31 0:29 {} /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
UNLIMITED_V1 = 9223372036854771712
SHORT = "To be, or not to be"


def made(root: Path, cgroup: str, mountinfo: str, **groups: dict[str, object]) -> Path:
    """Fake /proc and /sys; groups: folder -> file name -> content."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text("22 1 8:1 / / rw,relatime - ext4 /dev/root rw\n" + mountinfo)
    for folder, files in groups.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (root / folder / name).write_text(f"{content}\n")
    return root


def v2(limit: object, current: object = 0, high: object = "max", stat: str = "") -> dict[str, object]:
    return {"memory.max": limit, "memory.high": high, "memory.current": current, "memory.stat": stat}


def v1(limit: object, usage: object = 0, stat: str = "") -> dict[str, object]:
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": usage, "memory.stat": stat}


# Control group limits


@pytest.mark.parametrize(
    ("files", "left"),
    [
        (v2(1000, 700), 300),
        (v2(1000, 700, high=900), 200),
        (v2("max", 700, high=900), 200),
        (v2("max", 700), None),
        (v2(1000, 700, stat="anon 500\nfile 200\ninactive_file 150\nactive_file 50"), 500),
        (v2(1000, 1200), 0),
        (v2(1000, 100, stat="inactive_file 300"), 1000),
        (v2(0), 0),
        (v2("", "", "", ""), None),
        (v2("lots", 700, "-1"), None),
        ({"memory.max": 1000}, 1000),
        ({"cgroup.procs": 1}, None),
    ],
)
def test_cgroup_v2(files, left, tmp_path):
    root = made(tmp_path, "0::/user.slice/job\n", V2_MOUNT.format("/"), **{f"{V2}/user.slice/job": files})
    assert memory_left_bytes(root) == left


@pytest.mark.parametrize(
    ("files", "left"),
    [
        (v1(1000, 700), 300),
        (v1(1000, 700, "cache 9\ninactive_file 5\nactive_file 5\ntotal_inactive_file 150\ntotal_active_file 50"), 500),
        (v1(1000, 1200), 0),
        (v1(-1), None),
    ],
)
def test_cgroup_v1(files, left, tmp_path):
    lines = "9:name=systemd:/\n5:memory:/docker/ab:c\n4:cpu,cpuacct:/limited\n0::/\n"
    root = made(tmp_path, lines, CPU_MOUNT.format("/") + V1_MOUNT.format("/"), **{f"{V1}/docker/ab:c": files})
    assert memory_left_bytes(root) == left


def test_unlimited_cgroup_v1(tmp_path, monkeypatch):
    root = made(tmp_path, "5:memory:/\n", V1_MOUNT.format("/"), **{V1: v1(UNLIMITED_V1, 10**9)})
    unlimited = free_memory_bytes(CPU)
    monkeypatch.setattr(device, "memory_left_bytes", lambda: memory_left_bytes(root))
    assert abs(free_memory_bytes(CPU) - unlimited) < unlimited / 2


@pytest.mark.parametrize("limited", ["a/b/c", "a/b", "a", ""])
@pytest.mark.parametrize(("top", "files", "unlimited"), [(V2, v2, "max"), (V1, v1, UNLIMITED_V1)])
def test_parent_groups_limit(limited, top, files, unlimited, tmp_path):
    groups = {f"{top}/{folder}".rstrip("/"): files(unlimited, 5) for folder in ("", "a", "a/b", "a/b/c")}
    groups[f"{top}/{limited}".rstrip("/")] = files(1000, 400)
    line, mount = ("0::/a/b/c\n", V2_MOUNT) if top == V2 else ("7:memory:/a/b/c\n", V1_MOUNT)
    assert memory_left_bytes(made(tmp_path, line, mount.format("/"), **groups)) == 600


@pytest.mark.parametrize(
    ("path", "mounted", "visible"),
    [
        ("/", "/", ""),  # with a cgroup namespace
        ("/docker/ab", "/docker/ab", ""),  # without one
        ("/docker/ab/inner/job", "/docker/ab", "inner/job"),
        ("/docker/ab", "/", ""),  # its own group is mounted under another name
        ("/../../other", "/", ""),  # it was moved out of the root of the namespace
        ("/", "/../..", ""),
        ("/docker/ab (deleted)", "/", ""),
    ],
)
@pytest.mark.parametrize(("top", "files"), [(V2, v2), (V1, v1)])
def test_containers(path, mounted, visible, top, files, tmp_path):
    line, mount = (f"0::{path}\n", V2_MOUNT) if top == V2 else (f"7:memory:{path}\n", V1_MOUNT)
    folder = f"{top}/{visible}".rstrip("/")
    (tmp_path / "other").mkdir()  # not a control group
    assert memory_left_bytes(made(tmp_path, line, mount.format(mounted), **{folder: files(1000, 400)})) == 600


def test_both_versions_at_once(tmp_path):
    mounts = V1_MOUNT.format("/") + V2_MOUNT.format("/").replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
    groups = {f"{V1}/slurm/job": v1(1000, 400), f"{V2}/unified/slurm": {"cgroup.procs": ""}}
    assert memory_left_bytes(made(tmp_path, "7:memory:/slurm/job\n0::/slurm\n", mounts, **groups)) == 600


def test_mount_point_with_spaces(tmp_path):
    mounts = V2_MOUNT.format("/").replace("/sys/fs/cgroup", r"/my\040groups")
    assert memory_left_bytes(made(tmp_path, "0::/a b\n", mounts, **{"my groups/a b": v2(1000, 400)})) == 600


def test_unreadable_files_mean_no_limit(tmp_path):
    assert memory_left_bytes(tmp_path) is None
    assert memory_left_bytes(made(tmp_path, "0::/a\n", "")) is None
    (tmp_path / "proc/self/cgroup").unlink()
    (tmp_path / "proc/self/cgroup").mkdir()
    assert memory_left_bytes(tmp_path) is None


# Process limits


def test_ranks_of_a_node_share_a_group_s_limit(tmp_path, monkeypatch):
    root = made(tmp_path, "0::/\n", V2_MOUNT.format("/"), **{V2: v2(3 << 20, 1 << 20)})
    monkeypatch.setattr(device, "memory_left_bytes", lambda: memory_left_bytes(root))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert free_memory_bytes(CPU) == 2 << 20
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_memory_bytes(CPU) == 1 << 20


CHILD = """
import json, os, resource, sys
import psutil, torch
from executor.loading.device import free_memory_bytes
from executor.llm import LLM
from executor.config import load_settings

MB = 1 << 20
process, found = psutil.Process(), {}


def limit(name, used_bytes, allowed_bytes):
    hard = resource.getrlimit(getattr(resource, name))[1]
    resource.setrlimit(getattr(resource, name), (used_bytes + allowed_bytes, hard))
    free = free_memory_bytes(torch.device("cpu"))
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    of_two_ranks = free_memory_bytes(torch.device("cpu"))
    del os.environ["LOCAL_WORLD_SIZE"]
    return lambda: resource.setrlimit(getattr(resource, name), (hard, hard)), [free, of_two_ranks]


for name, used_by in (("RLIMIT_AS", "vms"), ("RLIMIT_DATA", "data")):
    lift, found[name] = limit(name, getattr(process.memory_info(), used_by), 300 * MB)
    lift()
    lift, found[name + " used up"] = limit(name, 0, 50 * MB)
    lift()

settings = load_settings("models/qwen3_moe/config/demo.yaml", ["device=cpu", "data_config.batch_size=2000"])
LLM.from_settings(settings, ["warm up"])
before = process.memory_info().rss
llm = LLM.from_settings(settings, [PROMPT])
[(_, output)] = llm.finished(llm.requests(llm.known_prompts))
found["known"] = [llm.num_blocks, process.memory_info().rss - before, output.text]
del llm
lift, _ = limit("RLIMIT_AS", process.memory_info().vms, 1000 * MB)
llm = LLM.from_settings(settings)
[(_, output)] = llm.finished(llm.requests(llm.encode(PROMPT)))
found["unknown"] = [sum(t.nbytes for layer in llm.kv_caches for t in layer), output.text]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def child():
    """Free memory and cache sizes measured in a process with limited memory."""
    result = subprocess.run(
        [sys.executable, "-c", f"PROMPT = {SHORT!r}\n{CHILD}"],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_limit_of_the_process(child, name):
    """It is this process's own: not shared with the other ranks of the node."""
    free, of_two_ranks = child[name]
    assert 290 << 20 < of_two_ranks <= free <= 300 << 20
    assert child[f"{name} used up"] == [0, 0]


def test_large_batch_for_one_short_prompt_takes_little(child):
    num_blocks, growth, _ = child["known"]
    assert num_blocks == 1 and growth < 100 << 20


def test_cache_stays_within_the_limit_of_the_process(child):
    """Where the prompts are not known, a batch of 2000 would otherwise take 80% of the machine's memory."""
    cache_bytes, text = child["unknown"]
    assert 500 << 20 < cache_bytes < 1000 << 20
    assert text == child["known"][2]


# Cache size


def demo_settings(batch_size: int = 1, cache_tokens: int | None = None, **data):
    return settings_from_dict(
        {
            "model_name": "demo",
            "model_path": str(DEMO),
            "device": "cpu",
            "model_config": {"dtype": "float32", "cache_tokens": cache_tokens},
            "data_config": {"batch_size": batch_size, "max_new_tokens": 4, **data},
        },
        "test",
    )


def test_cache_for_known_prompts_runs_a_whole_batch_of_the_longest():
    prompts = [SHORT * count for count in (1, 40, 3, 1, 60, 20, 2)]
    llm = LLM.from_settings(demo_settings(batch_size=3), prompts)
    blocks = [blocks_for(len(token_ids) + 4 - 1) for _, token_ids in llm.known_prompts]
    assert [prompt for prompt, _ in llm.known_prompts] == prompts
    assert llm.num_blocks == sum(sorted(blocks)[-3:]) < sum(blocks)
    [scheduler], together = llm.engine.schedulers, []
    schedule = scheduler.schedule

    def counting(*arguments):
        batch = schedule(*arguments)
        together.append(len(batch))
        return batch

    scheduler.schedule = counting
    outputs = dict(llm.finished(llm.requests(llm.known_prompts)))
    assert max(together) == 3
    roomy = LLM.from_settings(demo_settings(batch_size=3, cache_tokens=8192))
    expected = dict(roomy.finished(roomy.requests(llm.known_prompts)))
    assert {i: output.token_ids for i, output in outputs.items()} == {i: out.token_ids for i, out in expected.items()}


@pytest.mark.parametrize(
    ("lens", "batch_size", "blocks"),
    [([1], 2000, 1), ([128, 129], 1, 2), ([128, 129], 2, 3), ([300, 1, 129, 1], 2, 5), ([300, 1, 129, 1], 9, 7)],
)
def test_blocks_in_use(lens, batch_size, blocks):
    assert blocks_in_use(lens, batch_size) == blocks


@pytest.mark.parametrize(("cache_tokens", "num_blocks"), [(10**5, 2), (256, 2), (128, 1), (None, 2)])
def test_cache_tokens_are_capped_for_known_prompts(cache_tokens, num_blocks, caplog):
    caplog.set_level(logging.INFO)
    llm = LLM.from_settings(demo_settings(batch_size=2, cache_tokens=cache_tokens), [SHORT, SHORT, SHORT])
    assert llm.num_blocks == num_blocks
    [line] = [record.getMessage() for record in caplog.records if record.getMessage().startswith("cache: ")]
    assert line.startswith(f"cache: {num_blocks * BLOCK_SIZE} tokens, ")
    assert line.endswith("the maximum that the known prompts can use") == (num_blocks == 2)


def test_cache_tokens_without_known_prompts():
    assert LLM.from_settings(demo_settings(cache_tokens=10**4)).num_blocks == blocks_for(10**4)


def test_cache_tokens_beyond_memory_are_rejected():
    with pytest.raises(ValueError, match=r"^model_config\.cache_tokens: 1000000000 tokens need "):
        LLM.from_settings(demo_settings(cache_tokens=10**9), [SHORT])


def test_cache_of_a_server_takes_all_of_its_share(monkeypatch):
    """Prefixes of earlier requests stay in what running sequences do not use."""
    monkeypatch.setattr("executor.loading.memory.free_memory_bytes", lambda device: 2 << 30)
    settings = demo_settings()
    settings = dataclasses.replace(
        settings, model_config=dataclasses.replace(settings.model_config, cache_memory_fraction=0.05)
    )
    own, of_a_server = (LLM.from_settings(settings, fills_memory=fills_memory) for fills_memory in (False, True))
    assert own.num_blocks == blocks_for(own.max_len)
    block_bytes = sum(cache[0].nbytes for caches in own.kv_caches for cache in caches)
    assert of_a_server.num_blocks == int((2 << 30) * 0.05) // block_bytes - 1 > own.num_blocks
    assert LLM.from_settings(settings, [SHORT]).num_blocks == 1


def test_a_group_of_ranks_has_a_cache_for_its_share_of_the_batch():
    settings = demo_settings(batch_size=5)
    config = LLM.from_settings(settings, [SHORT]).config
    parallel = ParallelContext(attn_dp=Group(name="attn_dp", ranks=(0, 1)))
    lens = [100, 1000, 300, 200, 400]
    for known, expected in ((lens, 8 + 4 + 3), ([], 3 * blocks_for(512))):
        assert allocate_cache(settings, config, 512, parallel, torch.float32, CPU, Ops(), known)[0] == expected


def test_known_prompt_is_rejected_before_loading_weights(tmp_path):
    for file in (*DEMO.glob("*.json"), DEMO / "model.safetensors"):
        (tmp_path / file.name).write_bytes(file.read_bytes()[:200_000])  # truncated weights
    raw = {"model_name": "demo", "model_path": str(tmp_path), "device": "cpu"}
    data = {"data_config": {"input_max_len": 8, "long_prompt": "refuse"}}
    with pytest.raises(ValueError, match="tokens, data_config.input_max_len is 8"):
        LLM.from_settings(settings_from_dict(raw | data, "test"), [SHORT])


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"processor\t: 0\nmodel name\t: A CPU @ 2 GHz\nmodel name\t: B\n", "A CPU @ 2 GHz"),
        (b"model name : caf\xe9\n", "caf\N{REPLACEMENT CHARACTER}"),
        (b"processor\t: 0\nBogoMIPS\t: 200.00\nCPU part\t: 0xd01\n", "CPU"),
        (b"", "CPU"),
    ],
)
def test_cpu_name(content, name, tmp_path):
    (tmp_path / "cpuinfo").write_bytes(content)
    assert cpu_name(tmp_path / "cpuinfo") == name
    assert cpu_name(tmp_path / "absent") == cpu_name(tmp_path) == "CPU"


@pytest.mark.parametrize("kind", ["cuda", "npu"])
def test_what_an_allocator_caches_is_free(kind, monkeypatch):
    module = SimpleNamespace(
        mem_get_info=lambda device: (100, 500), memory_reserved=lambda device: 30, memory_allocated=lambda device: 10
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert free_memory_bytes(SimpleNamespace(type=kind)) == 120
