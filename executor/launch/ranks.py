# SPDX-License-Identifier: Apache-2.0
"""Starts a node's ranks with torchrun, hosts their rendezvous store and finds the root cause of failures."""

import datetime
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from torch.distributed import DistError, TCPStore
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run

from executor.launch.messages import Failure, clean
from executor.launch.nodes import Nodes

ROOT = Path(__file__).resolve().parents[2]  # root of the repository
PORTS_TRIED = 100
# `python -m` with ROOT in sys.path instead of the current folder, whose files may shadow modules (random.py)
RUN_MODULE = """import sys
sys.path = [sys.argv.pop(1), *(folder for folder in sys.path if folder)]
module, sys.argv = sys.argv[1], ["-m", *sys.argv[2:]]
import runpy
runpy.run_module(module, run_name="__main__", alter_sys=True)"""
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # signals whose handlers torchrun replaces


def open_store(address: str, port: int, timeout_s: float) -> TCPStore:
    """Opens the TCPStore of the ranks' process groups, listening on `address` only: on `port` or the next free one.

    Raises ValueError if this machine cannot listen there.
    """
    reason = ""
    for candidate in [*range(port, min(port + PORTS_TRIED, 65536)), 0]:  # 0: any free port
        try:
            listener = socket.create_server((address, candidate), backlog=1024)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            continue
        taken = listener.getsockname()[1]
        timeout, fd = datetime.timedelta(seconds=timeout_s), listener.detach()
        # torchrun's own store on that port reuses the server in this process
        return TCPStore(
            address,
            taken,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=fd,
        )
    raise ValueError(f"IPs: cannot listen on {address}: {reason}")


def run_ranks(
    nodes: Nodes, address: str, port: int, processes: int, timeout_s: float, scratch: str, command: list[str]
) -> Failure | None:
    """Runs `command` (a module and its arguments) in `processes` ranks on this node with torchrun; blocks until exit.

    torchrun runs in this process, so that a signal cannot end one without the other. address, port: of the store.
    scratch: folder for torchrun's files.
    """
    arguments = [f"--nnodes={len(nodes)}", f"--node_rank={nodes.index}", f"--nproc_per_node={processes}"]
    arguments += [f"--master_addr={address}", f"--master_port={port}", f"--log_dir={scratch}"]
    arguments += [f"--rdzv_conf=timeout={timeout_s:g}", "--max_restarts=0", "--no_python"]
    arguments += [sys.executable, "-u", "-c", RUN_MODULE, str(ROOT), *command]
    here = nodes.name(nodes.index)
    options = parse_args(arguments)
    # With this, newer torchruns keep this process's handlers of the other signals. When those raise, torchrun ends the
    # ranks by SIGTERM; SIGINT, which older ones pass on, prints a traceback in a rank that is still importing.
    options.signals_to_handle = "SIGQUIT"
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    try:
        run(options)
    except ChildFailedError as error:
        return first_failure(here, error.failures)
    except SignalException as error:
        return Failure(message=f"{here}: the launcher was ended by {error.sigval.name}")
    except DistError as error:
        reason = clean(str(error).splitlines()[0])
        return Failure(message=f"{here}: no connection to {nodes.name(0)}: {reason}", is_consequence=True)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return None


def first_failure(here: str, failures: dict[int, ProcessFailure]) -> Failure:
    """Selects the root cause among this node's failures, given by rank in order of detection."""
    described = [describe(f"rank {rank} on {here}", failure) for rank, failure in failures.items()]
    return min(described, key=lambda failure: failure.is_consequence)


def describe(where: str, failure: ProcessFailure) -> Failure:
    reported = read_report(failure.error_file_data)
    if reported is not None:
        message, exit_code, is_consequence = reported
        return Failure(message=f"{where}: {message}", exit_code=exit_code, is_consequence=is_consequence)
    if failure.exitcode >= 0:
        return Failure(message=f"{where}: ended with exit code {failure.exitcode}")
    name = failure.signal_name()
    # torchrun ends the remaining ranks with SIGTERM; NCCL's watchdog aborts (SIGABRT) a rank that waits for a dead one
    return Failure(
        message=f"{where}: killed by {name}" + (" (out of memory?)" if failure.exitcode == -signal.SIGKILL else ""),
        is_consequence=failure.exitcode in (-signal.SIGTERM, -signal.SIGABRT),
    )


def read_report(report: Any) -> tuple[str, int, bool] | None:
    """Parses the error file of executor.launch.rank.fail: message, exit code, is_consequence; None if it is not one."""
    if not isinstance(report, dict) or report.get("exit_code") not in (1, 2):
        return None
    return clean(str(report.get("message", ""))), report["exit_code"], report.get("is_consequence") is True
