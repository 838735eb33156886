# SPDX-License-Identifier: Apache-2.0
"""Starts this node's ranks of a job: `python -m executor.launch` with the arguments of executor.infer.

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
from executor.command import run_command
from executor.config import Settings, load_settings, resolve_path
from executor.interrupts import Interrupted
from executor.rank import DRAIN_S, LAUNCHER_VARIABLE, forget_rank
from executor.results import RUN_NAME_VARIABLE, RunFolder, create_run_folder
from executor.terminal import drain, print_error
from executor.utils.data_utils import load_prompts
from executor.utils.text import quoted

if TYPE_CHECKING:
    from ops.messages import Failure, Start
    from ops.nodes import Nodes

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
    """Runs `command` (a module and its arguments) in this node's share of `world_size` ranks, then ends the process.

    yaml_file: of a run that gets a result folder. Raises ValueError for what the user has to change.
    """
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup, which torchrun would undo by a handler of its own
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
    # What torchrun and torch's C++ side would say about a failed rank is said once, by this launcher.
    logging.getLogger("torch.distributed.elastic").setLevel(os.environ.setdefault("LOGLEVEL", "CRITICAL"))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from executor.before_loading import check_before_launch
    from ops.cluster import open_job
    from ops.messages import Failure

    timeout_s, port = environment_number("RENDEZVOUS_TIMEOUT_S", 120), environment_number("MASTER_PORT", 29500)
    secret = os.fsencode(os.environ.pop("JOB_SECRET", ""))  # the ranks do without
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
        outcome = job.meet(facts, timeout_s, run.decide)
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
    """Sets the ranks' environment; says what is in force and what this node does."""
    interface, address = (interface, nodes.addresses[nodes.index]) if len(nodes) > 1 else LOOPBACK
    print("environment:", set_environment(interface, address, processes), file=sys.stderr)
    first, meeting = nodes.index * processes, ""
    if len(nodes) > 1:
        meeting = f", meeting at {nodes.addresses[0]}:{port}"
        if not secret:
            print("warning: JOB_SECRET is not set: whoever reaches the port can end this job", file=sys.stderr)
    print(
        f"{nodes.name(nodes.index)}, {interface}: ranks {first} to {first + processes - 1} of {settings.world_size}"
        f"{meeting}",
        file=sys.stderr,
    )


@dataclasses.dataclass(kw_only=True)
class Run:
    """A node's part of a job, and what has to be cleared away when it ends."""

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
        """Where the ranks of all nodes meet."""
        return self.nodes.addresses[0] if len(self.nodes) > 1 else LOOPBACK[1]

    def decide(self) -> "Start":
        """What node 0 tells the others. Raises ValueError where the result folder cannot be made."""
        from ops.messages import Start
        from ops.ranks import open_store

        first = self.port + (len(self.nodes) > 1)  # several nodes meet at the port itself
        self.store = store = open_store(self.address, first, self.timeout_s)
        if len(self.nodes) == 1 and store.port != first:
            print(f"port {first} is in use, this job takes {store.port}", file=sys.stderr)
        if self.yaml_file is not None:
            self.folder = create_run_folder(self.settings, self.yaml_file)
        return Start(port=store.port, run_name=self.folder.name if self.folder else "")

    def run(self, start: "Start", processes: int) -> "Failure | None":
        """Runs this node's ranks; returns what became of them."""
        from ops.messages import Failure
        from ops.ranks import run_ranks

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
        """Ends this process from any thread, whatever the others wait for; the kernel then kills its ranks."""
        self.ending.acquire()  # by the first thread, for good
        if failure is not None:
            if self.folder is not None and (failure.exit_code == 2 or self.scratch is None):
                self.folder.discard()  # nothing has run
            print_error(failure.message)
        if self.scratch is not None:
            shutil.rmtree(self.scratch.path, ignore_errors=True)
        drain(DRAIN_S)
        os._exit(0 if failure is None else failure.exit_code)


class Scratch:
    """A folder for torchrun's files, which does not stay behind however this process ends."""

    def __init__(self) -> None:
        self.path = tempfile.mkdtemp(prefix="ranks_")
        self.remover = subprocess.Popen(  # reads until the kernel closes this process's end of the pipe
            ["sh", "-c", 'cat; rm -rf -- "$1"', "sh", self.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
            env={"PATH": os.environ.get("PATH", os.defpath)},
        )


def environment_number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or len(text) > 5 or not 0 < int(text) < 65536:
        raise ValueError(f"{name}: {quoted(text)} is not a number from 1 to 65535, such as {default}")
    return int(text)


def find_node(hosts: list[str]) -> tuple["Nodes", str]:
    """The nodes named by addresses or host names, which of them this machine is, and its interface to the others."""
    from ops.nodes import Nodes

    addresses = []
    for host in hosts:
        try:
            addresses.append(socket.gethostbyname(host))
        except (OSError, UnicodeError) as error:
            raise ValueError(f"IPs: {quoted(host)} does not resolve to an IPv4 address: {error}") from None
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


def local_interfaces() -> dict[str, str]:
    """IPv4 address -> name of the interface that has it."""
    return {
        entry.address: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    }


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


def job_facts(settings: Settings, command: list[str]) -> dict[str, str]:
    """What must be the same on every node: program, software, settings, prompts and checkpoint."""
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


if __name__ == "__main__":
    sys.exit(main())
