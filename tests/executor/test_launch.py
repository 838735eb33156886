# SPDX-License-Identifier: Apache-2.0
"""The launcher's checks and environment, before any rank starts."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed

from executor.config import load_settings
from executor.launch import launcher
from executor.launch.nodes import Nodes
from executor.launch.rank import is_consequence, share_of_cores
from executor.utils.hccl_ports import hccl_ports
from tests.jobs import wait_for

ROOT = Path(__file__).resolve().parents[2]
HERE = {"127.0.0.1": "lo", "10.0.0.2": "eth0", "10.0.1.2": "eth1"}


@pytest.fixture
def two_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "local_interfaces", lambda: HERE)
    monkeypatch.setattr(socket, "gethostbyname", lambda host: {"head": "10.0.0.1", "own": "127.0.1.1"}.get(host, host))


def test_node_rank_and_interface(two_interfaces: None) -> None:
    nodes, interface = launcher.find_node(["head", "10.0.0.2", "10.0.0.3"])
    assert (nodes.addresses, nodes.index, interface) == (("10.0.0.1", "10.0.0.2", "10.0.0.3"), 1, "eth0")
    nodes, interface = launcher.find_node(["127.0.0.1"])
    assert (nodes.index, interface) == (0, "lo")


@pytest.mark.parametrize(
    ("hosts", "named"),
    [
        (["head", "10.0.0.3"], "none of head 10.0.0.3 is an address of this machine (127.0.0.1 10.0.0.2 10.0.1.2)"),
        (["10.0.0.2", "10.0.1.2"], "more than one of 10.0.0.2 10.0.1.2"),
        (["head", "10.0.0.1"], "10.0.0.1 is listed twice"),
        (["head", "own"], "own is the loopback address 127.0.1.1"),
        ([], "NODE_IPS is blank"),
    ],
)
def test_invalid_node_list(two_interfaces: None, hosts: list[str], named: str) -> None:
    with pytest.raises(ValueError, match="^IPs: ") as raised:
        launcher.find_node(hosts)
    assert named in str(raised.value)


@pytest.mark.parametrize("host", ["nowhere.invalid", "x" * 100, "a..b", "\udcff", "\x1b[2J"])
def test_unresolvable_host(host: str) -> None:
    with pytest.raises(ValueError, match="IPs: '.*' does not resolve") as raised:
        launcher.find_node([host])
    assert str(raised.value).isprintable() and len(str(raised.value)) < 300


def test_local_interfaces() -> None:
    assert launcher.local_interfaces()["127.0.0.1"] == "lo"


def test_processes_per_node() -> None:
    assert launcher.processes_per_node(16, ("10.0.0.1", "10.0.0.2")) == 8
    with pytest.raises(ValueError, match="world_size: 3 ranks cannot be split evenly over the 2 nodes"):
        launcher.processes_per_node(3, ("10.0.0.1", "10.0.0.2"))


def test_fewer_devices_than_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executor.loading.device.count_devices", lambda name: ("cuda", 2))
    settings = load_settings(ROOT / "models/qwen3_moe/config/demo.yaml", ["world_size=4"])
    launcher.check_devices(settings, 2)
    with pytest.raises(ValueError, match="world_size: 4 needs 4 cuda devices on .*, it has 2$"):
        launcher.check_devices(settings, 4)
    monkeypatch.setattr("executor.loading.device.count_devices", lambda name: ("npu", 2))
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "4,5")
    with pytest.raises(ValueError, match=r"needs 4 npu devices on .*, it has 2 \(ASCEND_RT_VISIBLE_DEVICES=4,5\)$"):
        launcher.check_devices(settings, 4)


def test_devices_are_counted_without_using_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A context of the launcher would take memory of a rank's NPU."""
    monkeypatch.setattr("executor.loading.device.npu_available", lambda: True)
    monkeypatch.setattr(torch, "npu", SimpleNamespace(device_count=lambda: 2), raising=False)  # has no set_device
    settings = load_settings(ROOT / "models/qwen3_moe/config/demo.yaml", ["world_size=2", "device=npu"])
    launcher.check_devices(settings, 2)
    with pytest.raises(ValueError, match="needs 3 npu devices on .*, it has 2"):
        launcher.check_devices(settings, 3)


def test_unreserved_hccl_ports(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job of several NPU ranks warns once; others do not."""
    monkeypatch.delenv("HCCL_IF_BASE_PORT", raising=False)
    monkeypatch.setattr(launcher, "hccl_ports", lambda: hccl_ports(tmp_path))
    (tmp_path / "ip_local_port_range").write_text("32768\t60999\n", encoding="utf-8")
    (tmp_path / "ip_local_reserved_ports").write_text("8080\n", encoding="utf-8")
    settings = load_settings(ROOT / "models/qwen3_moe/config/demo.yaml", ["world_size=2"])
    for kind in ("cpu", "cuda", "npu"):
        monkeypatch.setattr("executor.loading.device.count_devices", lambda name, kind=kind: (kind, 2))
        launcher.check_devices(settings, 2)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: HCCL needs the ports 60000-60031")
    assert line.endswith("run sysctl -w net.ipv4.ip_local_reserved_ports=8080,60000-60031")
    (tmp_path / "ip_local_reserved_ports").write_text("8080,60000-60031\n", encoding="utf-8")
    launcher.check_devices(settings, 2)
    (tmp_path / "ip_local_reserved_ports").unlink()  # as in some containers
    launcher.check_devices(settings, 2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("port", ["http", "0", "65536", "70000", "-1", "", "9" * 5000, "²"])
def test_invalid_port(monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(ValueError, match=f"MASTER_PORT: '{port[:20]}.* is not a number from 1 to 65535"):
        launcher.environment_number("MASTER_PORT", 29500)


def test_user_environment_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"NCCL_SOCKET_IFNAME": "ib0"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(10))
    shown = launcher.set_environment("eth0", "10.0.0.2", 4)
    expected = {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "eth0", "HCCL_SOCKET_IFNAME": "=eth0"}
    expected |= {"HCCL_IF_IP": "10.0.0.2", "TP_SOCKET_IFNAME": "eth0"}
    expected |= {"OMP_NUM_THREADS": "2"}
    assert {name: os.environ[name] for name in expected} == expected
    assert set(shown.split()) == {f"{name}={value}" for name, value in expected.items()}
    assert launcher.set_environment("lo", "127.0.0.1", 2).startswith("GLOO_SOCKET_IFNAME=eth0 ")


def test_hccl_address_does_not_overrule_the_users_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"HCCL_SOCKET_IFNAME": "ib0"})
    launcher.set_environment("eth0", "10.0.0.2", 4)
    assert os.environ["HCCL_SOCKET_IFNAME"] == "ib0" and "HCCL_IF_IP" not in os.environ


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})


@pytest.mark.parametrize("secret", [b"", b"a"])
def test_warning_without_job_secret(environment: None, capsys: pytest.CaptureFixture, secret: bytes) -> None:
    settings = load_settings(ROOT / "models/qwen3_moe/config/demo.yaml", ["world_size=4"])
    launcher.announce(settings, Nodes(addresses=("10.0.0.1", "10.0.0.2"), index=1), "eth0", 2, 29500, secret)
    shown = capsys.readouterr().err.splitlines()
    assert [line for line in shown if "JOB_SECRET" in line] == shown[1:-1] and len(shown) == (2 if secret else 3)
    assert shown[-1] == "node 1 (10.0.0.2), eth0: ranks 2 to 3 of 4, rendezvous at 10.0.0.1:29500"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth0"


def test_single_node_uses_loopback(environment: None, capsys: pytest.CaptureFixture) -> None:
    settings = load_settings(ROOT / "models/qwen3_moe/config/demo.yaml", ["world_size=4"])
    launcher.announce(settings, Nodes(addresses=("10.0.0.1",), index=0), "eth0", 4, 29500, b"")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo" and "JOB_SECRET" not in capsys.readouterr().err


def test_scratch_folder_is_removed_after_sigkill(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\nfrom executor.launch.launcher import Scratch\nscratch = Scratch()\n"
        "open(scratch.path + '/file', 'w').close()\nprint(scratch.path, flush=True)\n"
        "os.kill(os.getpid(), getattr(signal, sys.argv[1]))"
    )
    for name in ("SIGKILL", "SIGTERM"):
        done = subprocess.run(
            [sys.executable, "-c", program, name], env=os.environ | {"TMPDIR": str(tmp_path)}, cwd=ROOT,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == -getattr(signal, name) and done.stdout.startswith(str(tmp_path))
    wait_for(lambda: not list(tmp_path.iterdir()), 5)


def test_launcher_and_ranks_do_not_import_the_models_of_transformers() -> None:
    """They take seconds to import; whoever wants them gets them all the same."""
    program = (
        "import sys, executor.llm, executor.launch.launcher, executor.launch.ranks, executor.loading.before_loading\n"
        "executor.llm.LLM('models/qwen3_moe/demo', device='cpu')\n"
        "heavy = ['torch._dynamo', 'transformers.modeling_utils', 'transformers.models.auto.modeling_auto']\n"
        "print([name for name in heavy if name in sys.modules])\n"
        "import transformers\n"
        "print(transformers.AutoModelForCausalLM.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\nAutoModelForCausalLM\n", done.stderr


def test_cores_are_partitioned_over_ranks() -> None:
    cores = list(range(3, 14))
    shares = [share_of_cores(cores, index, 4) for index in range(4)]
    assert sum(shares, []) == cores and min(map(len, shares)) == 2
    assert share_of_cores([5], 1, 2) == [5]


def test_job_facts(tmp_path: Path) -> None:
    yaml = tmp_path / "a.yaml"
    yaml.write_text(f"model_name: a\nmodel_path: {tmp_path}\noutput_dir: of_this_node\n")
    for name in ("config.json", "a.safetensors", "a.pth"):
        (tmp_path / name).write_text(name)

    def different() -> set[str]:
        now = launcher.job_facts(load_settings(yaml), ["executor.infer"])
        return {key for key, value in now.items() if value != facts.get(key)}

    facts = launcher.job_facts(load_settings(yaml), ["executor.infer"])
    assert facts["data_config.max_new_tokens"] == "32" and facts["the program"] == "executor.infer" and not different()
    yaml.write_text(yaml.read_text().replace("of_this_node", "of_another"))
    assert not different()
    (tmp_path / "config.json").write_text("other")
    (tmp_path / "a.safetensors").write_text("longer than it was")
    yaml.write_text(yaml.read_text() + "parallel_config: {attn_tp_size: 2}\ndata_config: {dataset_path: p.json}\n")
    (tmp_path / "p.json").write_text('"other prompts"')
    yaml.write_text(yaml.read_text().replace("p.json", str(tmp_path / "p.json")))
    assert different() == {
        "parallel_config.attn_tp_size",
        "data_config.dataset_path",
        "sha256 of the prompts",
        "sha256 of the checkpoint's config.json",
        "size of the checkpoint's a.safetensors",
        "sha256 of the checkpoint's p.json",
    }


def test_failed_collective_is_a_consequence() -> None:
    with pytest.raises(ValueError) as raised:
        torch.distributed.all_reduce(torch.ones(1))  # there is no process group
    assert is_consequence(raised.value)
    assert is_consequence(torch.distributed.DistNetworkError("x")) and not is_consequence(OSError("x"))


def test_platform_rank_variables_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["launch", "--yaml_file_path", str(ROOT / "models/qwen3_moe/config/demo.yaml")])
    monkeypatch.setattr("executor.infer.main", lambda: 3 if "RANK" in os.environ else 0)
    monkeypatch.setenv("RANK", "1")
    assert launcher.main() == 0
