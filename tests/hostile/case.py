# SPDX-License-Identifier: Apache-2.0
"""A hostile input: files and a command line, and the checks of its outcome."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.checkpoints import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "models" / "qwen3_moe" / "demo"
LIMIT_S = 30
MAX_ERROR = 500  # characters of an error line
MAX_LOG = 2000  # characters of a log line
YAML = """\
model_name: hostile
model_path: checkpoint
device: cpu
model_config:
  dtype: float32
  cache_tokens: 256
data_config:
  dataset: default
  dataset_path: prompts.json
  input_max_len: 64
  max_new_tokens: 2
  chat_template: False
"""
PROMPTS = '["one", "two words"]'
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR) \[rank 0\] ")


@dataclasses.dataclass(frozen=True)
class Case:
    """files: path in the case's folder -> content; None removes a file of the base; a function creates the path.

    arguments: after `--yaml_file_path run.yaml`. yaml: the argument of that option.
    """

    name: str
    files: dict[str, bytes | None | Callable[[Path], None]] = dataclasses.field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    yaml: str = "run.yaml"

    def argv(self) -> list[str]:
        given = any(argument.startswith("output_dir=") for argument in self.arguments)
        return ["--yaml_file_path", self.yaml, *self.arguments, *([] if given else ["--set", "output_dir=out"])]

    def write(self, folder: Path, base: Path) -> None:
        """Writes the case's folder; the files of `base`, a valid checkpoint, are linked."""
        (folder / "checkpoint").mkdir(parents=True)
        for file in base.iterdir():
            if f"checkpoint/{file.name}" not in self.files:
                (folder / "checkpoint" / file.name).symlink_to(file)
        for name, content in {"run.yaml": YAML.encode(), "prompts.json": PROMPTS.encode(), **self.files}.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if callable(content):
                content(file)
            elif content is not None:
                file.write_bytes(content)

    def reproduction(self, folder: Path) -> str:
        """Text to reproduce a failing case: the command and the modified files."""
        lines = [f"cd {folder}", f"PYTHONPATH={ROOT} python -m executor.infer {' '.join(map(shortened, self.argv()))}"]
        for name, content in self.files.items():
            lines.append(f"    {name}: {'made by the case' if callable(content) else shortened(content)}")
        return "\n".join(lines)


def shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-80:]} ({len(text)} characters)"


def make_base(folder: Path) -> Path:
    """Creates a tiny sharded checkpoint with the demo's tokenizer."""
    demo = json.loads((DEMO / "config.json").read_text())
    small = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 16, "head_dim": 16}
    few = {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": demo["vocab_size"]}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    make_checkpoint(folder, max_shard_size="200KB", **small, **few, **heads, eos_token_id=demo["eos_token_id"])
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / name, folder / name)
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def limit_s() -> float:
    """Time limit of a case: LIMIT_S, scaled up if the load exceeds two processes per core."""
    return LIMIT_S * max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)) / 2)


def listing(folder: Path) -> set[str]:
    return {os.path.join(root, name) for root, *kinds in os.walk(folder) for names in kinds for name in names}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of a case's process. code: exit code, None if it was killed after `limit_s`."""

    code: int | None
    stdout: str
    stderr: str
    created: list[str]

    def faults(self, folder: Path) -> list[str]:
        """Violations of the expected behaviour; empty if there are none."""
        if self.code is None:
            return [f"still ran after {LIMIT_S} s and more"]
        if self.code not in (0, 2):
            return [f"exit code {self.code}"]
        lines = [line for line in self.stderr.splitlines() if not LOG_LINE.match(line)]
        found = ["a traceback"] if "Traceback" in self.stderr + self.stdout else []
        found += [f"a line of {len(line)} characters" for line in self.stderr.splitlines() if len(line) > MAX_LOG]
        if any(ord(character) < 32 and character not in "\n\r\t" for character in self.stderr):
            found.append("control characters on stderr")
        return found + (self._faults_of_refusal(lines) if self.code == 2 else faults_of_results(folder, self.created))

    def _faults_of_refusal(self, lines: list[str]) -> list[str]:
        found = []
        if len(lines) != 1 or not lines[0].startswith("error: ") or len(lines[0]) > MAX_ERROR:
            found.append(f"not one line `error: ...` of at most {MAX_ERROR} characters")
        elif not lines[0].isprintable():
            found.append("an error line with characters that do not print")
        if self.created:
            found.append(f"a refused run created {self.created[:3]}")
        return found


def faults_of_results(folder: Path, created: list[str]) -> list[str]:
    """Violations in the results of a run with exit code 0."""
    results = [name for name in created if name.endswith("/result.jsonl") and "/latest/" not in name]
    if len(results) != 1:
        return [f"exit code 0 and {len(results)} files of results"]
    text = (folder / results[0]).read_bytes().decode("utf-8")
    try:
        *lines, last = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    except ValueError as error:
        return [f"results are not JSON lines: {error}"]
    whole = text.endswith("\n") and "summary" in last and lines and all("token_ids" in line for line in lines)
    return [] if whole else ["incomplete results"]


def refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
