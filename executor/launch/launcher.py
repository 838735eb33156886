# SPDX-License-Identifier: Apache-2.0
"""Launcher: starts this node's ranks and reports their outcome.

Environment: NODE_IPS (all nodes in rank order), MASTER_PORT, RENDEZVOUS_TIMEOUT_S, JOB_SECRET; see docs/parallelism.md.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import psutil

from executor import infer
from executor.config import Settings, load_settings, resolve_path
from executor.launch.command import run_command
from executor.launch.interrupts import Interrupted
from executor.launch.rank import DRAIN_S, LAUNCHER_VARIABLE, forget_rank
from executor.launch.results import RUN_NAME_VARIABLE, RunFolder, create_run_folder
from executor.launch.terminal import drain, print_error
from executor.utils.data_utils import load_prompts
from executor.utils.hccl_ports import hccl_ports
from executor.utils.text import quoted

if TYPE_CHECKING:
    from executor.launch.messages import Failure, Start
    from executor.launch.nodes import Nodes

LOOPBACK = ("lo", "127.0.0.1")


def main() -> int:
    forget_rank()
    return run_command(start)


def start() -> int:
    arguments = infer.parse_arguments()
    settings = load_settings(arguments.yaml_file_path, arguments.set)
    if settings.world_size > 1:
        launch(settings, ["executor.infer", *sys.argv[1:]], Path(arguments.yaml_file_path))
    return infer.main()


def launch(settings: Settings, command: list[str], yaml_file: Path | None = None) -> NoReturn:
    """Runs `command` (a module and its arguments) in this node's ranks, then exits the process.

    yaml_file: given if the run has a result folder. Raises ValueError for wrong input.
    """
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup: torchrun would install its own handler
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
    # A failed rank is reported once, by this launcher, not also by torchrun and the C++ side of torch.
    logging.getLogger("torch.distributed.elastic").setLevel(torchrun_log_level())
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from executor.launch.cluster import open_job
    from executor.launch.messages import Failure
    from executor.loading.before_loading import check_before_launch

    timeout_s, port = environment_number("RENDEZVOUS_TIMEOUT_S", 120), environment_number("MASTER_PORT", 29500)
    secret = os.fsencode(os.environ.pop("JOB_SECRET", ""))  # not passed on to the ranks
    nodes, interface = find_node(os.environ.get("NODE_IPS", "127.0.0.1").split())
    processes = processes_per_node(settings.world_size, nodes.addresses)
    check_before_launch(settings)
    check_devices(settings, processes)
    announce(settings, nodes, interface, processes, port, secret)
    facts = job_facts(settings, command) if len(nodes) > 1 else {}

    run = Run(settings=settings, command=command, yaml_file=yaml_file, nodes=nodes, port=port, timeout_s=timeout_s)
    watched = None
    try:
        job = open_job(nodes, port, secret, timeout_s)
        outcome = job.rendezvous(facts, timeout_s, run.decide)
        if isinstance(outcome, Failure):
            run.end(outcome)
        job.watch(run.end)
        watched = job
        run.end(job.finish(run.run(outcome, processes)))
    except (OSError, RuntimeError, Interrupted) as error:
        message = str(error)
        if isinstance(error, Interrupted):
            message = f"{run.here}: the launcher was ended by {message.removeprefix('interrupted by ')}"
        failure = Failure(message=message)
        run.end(watched.finish(failure) if watched else failure)


def announce(settings: Settings, nodes: "Nodes", interface: str, processes: int, port: int, secret: bytes) -> None:
    """Sets the ranks' environment; prints it and this node's ranks."""
    interface, address = (interface, nodes.addresses[nodes.index]) if len(nodes) > 1 else LOOPBACK
    print("environment:", set_environment(interface, address, processes), file=sys.stderr)
    first, rendezvous = nodes.index * processes, ""
    if len(nodes) > 1:
        rendezvous = f", rendezvous at {nodes.addresses[0]}:{port}"
        if not secret:
            print("warning: JOB_SECRET is not set: whoever reaches the port can end this job", file=sys.stderr)
    print(
        f"{nodes.name(nodes.index)}, {interface}: ranks {first} to {first + processes - 1} of {settings.world_size}"
        f"{rendezvous}",
        file=sys.stderr,
    )


@dataclasses.dataclass(kw_only=True)
class Run:
    """This node's part of a job, with the resources to clean up when it ends."""

    settings: Settings
    command: list[str]
    yaml_file: Path | None
    nodes: "Nodes"
    port: int
    timeout_s: int
    folder: RunFolder | None = None
    scratch: "Scratch | None" = None
    store: object = None
    ending: threading.RLock = dataclasses.field(default_factory=threading.RLock)

    @property
    def here(self) -> str:
        return self.nodes.name(self.nodes.index)

    @property
    def address(self) -> str:
        """Rendezvous address of all ranks."""
        return self.nodes.addresses[0] if len(self.nodes) > 1 else LOOPBACK[1]

    def decide(self) -> "Start":
        """Opens the rendezvous store and creates the result folder, on node 0; returns the start message for all nodes.

        ValueError if the folder cannot be created.
        """
        from executor.launch.messages import Start
        from executor.launch.ranks import open_store

        first = self.port + (len(self.nodes) > 1)  # with several nodes MASTER_PORT is the control channel's
        self.store = store = open_store(self.address, first, self.timeout_s)
        if len(self.nodes) == 1 and store.port != first:
            print(f"port {first} is in use, this job takes {store.port}", file=sys.stderr)
        if self.yaml_file is not None:
            self.folder = create_run_folder(self.settings, self.yaml_file)
        return Start(port=store.port, run_name=self.folder.name if self.folder else "")

    def run(self, start: "Start", processes: int) -> "Failure | None":
        """Runs this node's ranks until they exit; returns their failure, or None."""
        from executor.launch.messages import Failure
        from executor.launch.ranks import run_ranks

        try:
            if self.yaml_file is not None and self.folder is None:
                self.folder = create_run_folder(self.settings, self.yaml_file, start.run_name)
        except ValueError as error:
            return Failure(message=f"{self.here}: {error}", exit_code=2)
        os.environ[RUN_NAME_VARIABLE] = start.run_name
        self.scratch = Scratch()
        return run_ranks(
            self.nodes, self.address, start.port, processes, self.timeout_s, self.scratch.path, self.command
        )

    def end(self, failure: "Failure | None") -> NoReturn:
        """Exits this process from any thread, even while others block; the kernel then kills its ranks."""
        self.ending.acquire()  # never released: only the first thread proceeds
        if failure is not None:
            if self.folder is not None and (failure.exit_code == 2 or self.scratch is None):
                self.folder.discard()  # nothing has run
            if self.scratch is not None:
                print(file=sys.stderr)  # rank 0 may have left a progress bar on the line
            print_error(failure.message)
        if self.scratch is not None:
            shutil.rmtree(self.scratch.path, ignore_errors=True)
        drain(DRAIN_S)
        os._exit(0 if failure is None else failure.exit_code)


class Scratch:
    """Temporary folder for torchrun's files, removed even if this process is killed."""

    def __init__(self) -> None:
        self.path = tempfile.mkdtemp(prefix="ranks_")
        self.remover = subprocess.Popen(  # removes the folder at EOF: the kernel closes the pipe when this process dies
            ["sh", "-c", 'cat; rm -rf -- "$1"', "sh", self.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
            env={"PATH": os.environ.get("PATH", os.defpath)},
        )


def torchrun_log_level() -> str:
    """Sets and returns LOGLEVEL, which torchrun reads: CRITICAL where it is unset or, meant for others, no level."""
    level = os.environ.get("LOGLEVEL", "").upper()
    os.environ["LOGLEVEL"] = level if isinstance(logging.getLevelName(level), int) else "CRITICAL"
    return os.environ["LOGLEVEL"]


def environment_number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or len(text) > 5 or not 0 < int(text) < 65536:
        raise ValueError(f"{name}: {quoted(text)} is not a number from 1 to 65535, such as {default}")
    return int(text)


def find_node(hosts: list[str]) -> tuple["Nodes", str]:
    """Resolves the nodes' host names; returns them with this machine's index, and its network interface."""
    from executor.launch.nodes import Nodes

    if not hosts:
        raise ValueError("IPs: NODE_IPS is blank: it names the nodes, such as 10.0.0.1 10.0.0.2, or is not set")
    addresses = []
    for host in hosts:
        try:
            addresses.append(socket.gethostbyname(host))
        except (OSError, UnicodeError) as error:
            raise ValueError(f"IPs: {quoted(host)} does not resolve to an IPv4 address: {error}") from None
    for host, address in zip(hosts, addresses, strict=True):
        if addresses.count(address) > 1:
            raise ValueError(f"IPs: {address} is listed twice in {' '.join(hosts)}")
        if len(addresses) > 1 and address.startswith("127."):
            raise ValueError(f"IPs: {host} is the loopback address {address}: name it as the other nodes do")
    interfaces = local_interfaces()
    mine = [index for index, address in enumerate(addresses) if address in interfaces]
    if len(mine) != 1:
        found = "more than one" if mine else "none"
        raise ValueError(f"IPs: {found} of {' '.join(hosts)} is an address of this machine ({' '.join(interfaces)})")
    return Nodes(addresses=tuple(addresses), index=mine[0]), interfaces[addresses[mine[0]]]


def local_interfaces() -> dict[str, str]:
    """Maps each local IPv4 address to the name of its network interface."""
    return {
        entry.address: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    }


def processes_per_node(world_size: int, addresses: tuple[str, ...]) -> int:
    if world_size % len(addresses):
        raise ValueError(
            f"world_size: {world_size} ranks cannot be split evenly over the {len(addresses)} nodes of IPs "
            f"({' '.join(addresses)}): make it a multiple, or name fewer nodes"
        )
    return world_size // len(addresses)


def check_devices(settings: Settings, processes: int) -> None:
    """Raises ValueError if this node has fewer accelerators than ranks, or the device has no graph mode.

    Uses no device: a context of this process would take memory from a rank's, and some drivers allow one per device.
    """
    from executor.loading.device import count_devices

    kind, count = count_devices(settings.device)
    if settings.exe_mode == "graph" and kind == "cpu":
        raise ValueError(f"exe_mode: graph is not possible on device {kind}, only eager")
    if kind != "cpu" and count < processes:
        variable = {"npu": "ASCEND_RT_VISIBLE_DEVICES"}.get(kind, "CUDA_VISIBLE_DEVICES")
        visible = f" ({variable}={os.environ[variable]})" if variable in os.environ else ""
        raise ValueError(
            f"world_size: {settings.world_size} needs {processes} {kind} devices on {socket.gethostname()}, "
            f"it has {count}{visible}"
        )
    ports, command = hccl_ports() if kind == "npu" else ("", None)
    if command is not None:
        print(
            f"warning: HCCL needs the ports {ports}, which other programs may be given: run {command}", file=sys.stderr
        )


def set_environment(interface: str, address: str, processes: int) -> str:
    """Sets defaults of the ranks' environment variables; those set by the user stay.

    address: of this node, on `interface`. Returns the resulting values for display.
    """
    defaults = {"GLOO_SOCKET_IFNAME": interface, "TP_SOCKET_IFNAME": interface}
    if interface != "lo":  # within one machine NCCL and HCCL need no hint
        # "=" matches the exact name, not a prefix
        defaults["NCCL_SOCKET_IFNAME"] = defaults["HCCL_SOCKET_IFNAME"] = f"={interface}"
        if "HCCL_SOCKET_IFNAME" not in os.environ:  # HCCL_IF_IP takes precedence over HCCL_SOCKET_IFNAME
            defaults["HCCL_IF_IP"] = address
    defaults["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // processes))
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    return " ".join(f"{name}={os.environ[name]}" for name in defaults)


def job_facts(settings: Settings, command: list[str]) -> dict[str, str]:
    """Facts that must be equal on all nodes: code and library versions, settings, prompts, checkpoint."""
    import torch

    facts = {"the program": command[0]}
    facts |= {"the version of torch": torch.__version__, "the version of transformers": version("transformers")}
    for key, value in dataclasses.asdict(dataclasses.replace(settings, output_dir=None)).items():
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
