# SPDX-License-Identifier: Apache-2.0
"""The Python API as docs/python.md shows it: its script under torchrun, and the help of LLM."""

import os
import re
import subprocess
import sys
import typing
from pathlib import Path

from executor import LLM
from executor.config import REPOSITORY, SECTIONS, Settings

DEMO = REPOSITORY / "models/qwen3_moe/demo"


def test_script_of_the_docs_under_torchrun(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs/python.md").read_text()
    [script] = re.findall(r"```python\n(# two_ranks.py.*?)```", text, re.DOTALL)
    script = script.replace('"path/of/the/checkpoint"', f'"{DEMO}", device="cpu", dtype="float32"')
    (tmp_path / "two_ranks.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "two_ranks.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    prompts = ["A farmer has 17 sheep.", "To be, or not to be"]
    outputs = LLM(DEMO, device="cpu", dtype="float32").generate(prompts, use_tqdm=False)
    assert done.stdout == "".join(f"{output.text}\n" for output in outputs)


def test_help_names_every_setting() -> None:
    documented = set(re.findall(r"\w+", LLM.__doc__ or ""))
    names = {name for kind in SECTIONS.values() for name in typing.get_type_hints(kind)}
    names |= set(typing.get_type_hints(Settings)) - set(SECTIONS)
    assert not names - documented
