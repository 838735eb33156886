# SPDX-License-Identifier: Apache-2.0
"""Runs cases in forked children of one process that has imported everything: `python -m tests.hostile.warm FOLDER`.

FOLDER/cases.pickle holds the cases, FOLDER/base the valid checkpoint; writes {name: Outcome} to FOLDER/outcomes.pickle.
The folder of each case is FOLDER/NUMBER.
"""

import gc
import os
import pickle
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

from tests.hostile.case import Case, Outcome, limit_s, listing

MEMORY_BYTES = 4 << 30  # additional address space of a child over the parent


def run_all(folder: Path, cases: list[Case], num_parallel: int) -> dict[str, Outcome]:
    """Outcomes by name; at most `num_parallel` children at a time."""
    outcomes: dict[str, Outcome] = {}
    running: dict[int, tuple[Case, Path, set[str], float]] = {}
    waiting = list(enumerate(cases))[::-1]
    while waiting or running:
        while waiting and len(running) < num_parallel:
            number, case = waiting.pop()
            place = folder / str(number)
            case.write(place, folder / "base")
            before = listing(place)
            running[start(case, place)] = case, place, before, time.monotonic()
        process, status = os.waitpid(-1, os.WNOHANG)
        if process in running:
            case, place, before, _ = running.pop(process)
            outcomes[case.name] = outcome(place, os.waitstatus_to_exitcode(status), before)
            continue
        for process, (case, place, before, started_s) in list(running.items()):
            if time.monotonic() > started_s + limit_s():
                del running[process]
                os.killpg(process, signal.SIGKILL)
                os.waitpid(process, 0)
                outcomes[case.name] = outcome(place, None, before)
        time.sleep(0.002)
    return outcomes


def outcome(place: Path, code: int | None, before: set[str]) -> Outcome:
    stdout, stderr = ((place.parent / f"{place.name}.{name}").read_bytes() for name in ("stdout", "stderr"))
    created = sorted(os.path.relpath(path, place) for path in listing(place) - before)
    return Outcome(code, stdout.decode("utf-8", "replace"), stderr.decode("utf-8", "replace"), created)


def start(case: Case, place: Path) -> int:
    """Forks a child that runs the case in its own process group; returns its process id."""
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        os.setpgid(0, 0)
        code = 1
        try:
            code = run_in_child(case, place)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return process


def run_in_child(case: Case, place: Path) -> int:
    from executor import infer

    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(place.parent / f"{place.name}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(place)
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (address_space + MEMORY_BYTES,) * 2)
    sys.argv = ["executor.infer", *case.argv()]
    return infer.main()


def import_all(folder: Path) -> None:
    """Imports all modules that a run imports, as recorded by a first run in a child."""
    import torch

    import executor.infer
    import executor.llm  # noqa: F401
    import executor.loading.chat_template

    torch.set_num_threads(1)
    executor.loading.chat_template.RENDER_TIMEOUT_S = 2.0
    process = os.fork()
    if process == 0:
        place = folder / "first"
        case = Case("first")
        case.write(place, folder / "base")
        code = run_in_child(case, place)
        (folder / "modules").write_text("\n".join(name for name in sys.modules if name.startswith("t")))
        os._exit(code)
    _, status = os.waitpid(process, 0)
    assert status == 0, (folder / "first.stderr").read_text()
    for name in (folder / "modules").read_text().split():
        if name not in sys.modules and name.partition(".")[0] in ("torch", "transformers", "tokenizers", "tqdm"):
            try:
                __import__(name)
            except ImportError:  # created at run time
                continue
    gc.collect()
    gc.freeze()  # a collection in a child would write to the pages of all that is imported here


def main() -> None:
    folder = Path(sys.argv[1])
    cases = pickle.loads((folder / "cases.pickle").read_bytes())
    import_all(folder)
    outcomes = run_all(folder, cases, num_parallel=len(os.sched_getaffinity(0)))
    (folder / "outcomes.pickle").write_bytes(pickle.dumps(outcomes))


if __name__ == "__main__":
    main()
