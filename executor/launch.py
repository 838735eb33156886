# SPDX-License-Identifier: Apache-2.0
"""Starts this node's ranks of a job: `python -m executor.launch` with the arguments of executor.infer.

Environment: NODE_IPS (all nodes in rank order), MASTER_PORT, RENDEZVOUS_TIMEOUT_S; see docs/parallelism.md.
"""

import ctypes
import dataclasses
import hashlib
import json
import logging
import os
import signal
import socket
import sys
import tempfile
from importlib.metadata import version
from typing import TYPE_CHECKING, NoReturn

from executor import infer
from executor.config import Settings, load_settings, resolve_path
from executor.rank import LAUNCHER_VARIABLE, forget_rank
from executor.utils.data_utils import load_prompts

if TYPE_CHECKING:
    from ops.cluster import Nodes


def main() -> int:
    arguments = infer.parse_arguments()
    try:
        settings = load_settings(arguments.yaml_file_path, arguments.set)
        if settings.world_size > 1:
            launch(settings, ["executor.infer", *sys.argv[1:]])
        forget_rank()
        return infer.main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, KeyboardInterrupt) as error:
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
        return 1


def launch(settings: Settings, command: list[str]) -> NoReturn:
    """Runs `command` (a module and its arguments) in this node's share of `world_size` ranks, then ends the process.

    Raises ValueError for what the user has to change and TimeoutError for a node that does not come.
    """
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup, which torchrun would undo by a handler of its own
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
    # What torchrun and torch's C++ side would say about a failed rank is said once, by this launcher.
    logging.getLogger("torch.distributed.elastic").setLevel(os.environ.setdefault("LOGLEVEL", "CRITICAL"))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from executor.before_loading import check_before_launch
    from ops.cluster import Watch, end_launcher, meet, open_store, run_ranks

    timeout_s, port = environment_number("RENDEZVOUS_TIMEOUT_S", 120), environment_number("MASTER_PORT", 29500)
    nodes, interface = find_node(os.environ.get("NODE_IPS", "127.0.0.1").split())
    processes = processes_per_node(settings.world_size, nodes.addresses)
    check_before_launch(settings)
    check_devices(settings, processes)
    print("environment:", set_environment(interface, nodes.addresses[nodes.index], processes), file=sys.stderr)

    store = open_store(nodes, port, timeout_s)
    first = nodes.index * processes
    print(
        f"{nodes.name(nodes.index)}, {interface}: ranks {first} to {first + processes - 1} of {settings.world_size}, "
        f"meeting at {nodes.addresses[0]}:{store.port}",
        file=sys.stderr,
    )
    failure = meet(store, nodes, job_facts(settings), timeout_s) if len(nodes) > 1 else None
    scratch = tempfile.mkdtemp(prefix="ranks_")
    if failure is None:
        watch = Watch(store, nodes, scratch)
        failure = watch.finish(run_ranks(nodes, store.port, processes, timeout_s, scratch, command))
    end_launcher(failure, scratch)


def environment_number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise ValueError(f"{name}: {text!r} is not a number from 1 to 65535, such as {default}")
    return int(text)


def find_node(hosts: list[str]) -> tuple["Nodes", str]:
    """The nodes named by addresses or host names, which of them this machine is, and its interface to the others."""
    from ops.cluster import Nodes

    addresses = []
    for host in hosts:
        try:
            addresses.append(socket.gethostbyname(host))
        except OSError as error:
            raise ValueError(f"IPs: {host!r} does not resolve to an IPv4 address: {error}") from None
    for host, address in zip(hosts, addresses, strict=True):
        if addresses.count(address) > 1:
            raise ValueError(f"IPs: {address} stands twice in {' '.join(hosts)}")
        if len(addresses) > 1 and address.startswith("127."):
            raise ValueError(f"IPs: {host} is {address}, which means every machine itself: name it as the others do")
    interfaces = local_interfaces()
    mine = [index for index, address in enumerate(addresses) if address in interfaces]
    if len(mine) != 1:
        found = "more than one" if mine else "none"
        raise ValueError(f"IPs: {found} of {' '.join(hosts)} is an address of this machine ({' '.join(interfaces)})")
    return Nodes(addresses=tuple(addresses), index=mine[0]), interfaces[addresses[mine[0]]]


class InterfaceAddress(ctypes.Structure):
    """struct ifaddrs of getifaddrs(3), as far as it is read here."""


InterfaceAddress._fields_ = [
    ("next", ctypes.POINTER(InterfaceAddress)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.POINTER(ctypes.c_ubyte * 8)),  # struct sockaddr_in: family (2 bytes), port (2), address (4)
]


def local_interfaces() -> dict[str, str]:
    """IPv4 address -> name of the interface that has it."""
    libc = ctypes.CDLL(None)
    first = ctypes.POINTER(InterfaceAddress)()
    if libc.getifaddrs(ctypes.byref(first)) != 0:
        raise OSError("getifaddrs failed")
    found, entry = {}, first
    while entry:
        data = bytes(entry.contents.address.contents) if entry.contents.address else b""
        if int.from_bytes(data[:2], sys.byteorder) == socket.AF_INET:
            found[socket.inet_ntoa(data[4:8])] = entry.contents.name.decode()
        entry = entry.contents.next
    libc.freeifaddrs(first)
    return found


def processes_per_node(world_size: int, addresses: tuple[str, ...]) -> int:
    if world_size % len(addresses):
        raise ValueError(
            f"world_size: {world_size} ranks cannot be shared evenly by the {len(addresses)} nodes of IPs "
            f"({' '.join(addresses)}): make it a multiple, or name fewer nodes"
        )
    return world_size // len(addresses)


def check_devices(settings: Settings, processes: int) -> None:
    """Every rank of this node needs an accelerator of its own, if any."""
    import torch

    from executor.device import select_device

    kind = select_device(settings.device).type
    count = torch.accelerator.device_count()
    if settings.exe_mode == "graph" and kind == "cpu":
        raise ValueError(f"exe_mode: graph is not possible on device {kind}, only eager")
    if kind != "cpu" and count < processes:
        variable = {"npu": "ASCEND_RT_VISIBLE_DEVICES"}.get(kind, "CUDA_VISIBLE_DEVICES")
        visible = f" ({variable}={os.environ[variable]})" if variable in os.environ else ""
        raise ValueError(
            f"world_size: {settings.world_size} needs {processes} {kind} devices on {socket.gethostname()}, "
            f"it has {count}{visible}"
        )


def set_environment(interface: str, address: str, processes: int) -> str:
    """What the ranks inherit; what the user has set stays. `address` is this node's, on `interface`.

    Returns what is in force, for people.
    """
    defaults = {"GLOO_SOCKET_IFNAME": interface, "TP_SOCKET_IFNAME": interface}
    if interface != "lo":  # within one machine NCCL and HCCL need no hint
        defaults["NCCL_SOCKET_IFNAME"] = defaults["HCCL_SOCKET_IFNAME"] = f"={interface}"  # = : not all that begin so
        if "HCCL_SOCKET_IFNAME" not in os.environ:  # to HCCL, an address says more than an interface
            defaults["HCCL_IF_IP"] = address
    defaults["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // processes))
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    return " ".join(f"{name}={os.environ[name]}" for name in defaults)


def job_facts(settings: Settings) -> dict[str, str]:
    """What must be the same on every node: software, settings, prompts and checkpoint."""
    import torch

    facts = {"the version of torch": torch.__version__, "the version of transformers": version("transformers")}
    for key, value in dataclasses.asdict(settings).items():
        entries = {f"{key}.{name}": entry for name, entry in value.items()} if isinstance(value, dict) else {key: value}
        facts |= {name: str(entry) for name, entry in entries.items()}
    facts["sha256 of the prompts"] = sha256(json.dumps(load_prompts(settings.data_config)).encode())
    folder = resolve_path(settings.model_path)
    for file in sorted(file for pattern in ("*.json", "*.jinja", "*.txt") for file in folder.glob(pattern)):
        facts[f"sha256 of the checkpoint's {file.name}"] = sha256(file.read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        facts[f"size of the checkpoint's {file.name}"] = f"{file.stat().st_size} bytes"
    return facts


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
