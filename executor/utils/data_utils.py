# SPDX-License-Identifier: Apache-2.0
"""Prompts of a run: the bundled file, LongBench, or any jsonl file."""

import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from executor.config import REPOSITORY, DataSettings, resolve_path

DEFAULT_PROMPTS = REPOSITORY / "dataset" / "default_prompt.json"
LONGBENCH_FOLDER = REPOSITORY / "dataset" / "LongBench"
LONGBENCH_HUB_NAME = "zai-org/LongBench"

LONG_SEQUENCE_PROMPT = (
    "Read the following text carefully, then write a summary of it that keeps the main points and leaves out details."
    "\n\nText:\n{context}\n\nSummary:"
)


def build_dataset_input(record: dict[str, Any], prompt_template: str | None = None) -> str:
    """The prompt made of one LongBench record. Edit LONG_SEQUENCE_PROMPT above, or set data_config.prompt_template.

    A template holds the names of record fields in braces: {context}, {input} (the question, where there is one).
    Raises ValueError for a field the record does not have.
    """
    try:
        return (prompt_template or LONG_SEQUENCE_PROMPT).format_map(record)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"data_config.prompt_template: {error} does not fit, the record's fields are {', '.join(record)}"
        ) from None


def load_prompts(data: DataSettings) -> list[str]:
    """All prompts the settings ask for. ValueError names the key, the file and line that are wrong."""
    loaders = {"default": default_prompts, "LongBench": longbench_prompts, "jsonl": jsonl_prompts}
    prompts = loaders[data.dataset](data)
    if not prompts:
        raise ValueError(f"data_config.dataset: {data.dataset} holds no prompt")
    return prompts[: data.max_prompts]


def default_prompts(data: DataSettings) -> list[str]:
    """A JSON file with one text or a list of texts."""
    if data.prompt_template is not None:
        raise ValueError("data_config.prompt_template: needs a dataset with records, LongBench or jsonl, not default")
    file = DEFAULT_PROMPTS if data.dataset_path is None else existing(data.dataset_path)
    try:
        prompts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not a readable JSON file: {error}") from None
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) and prompt for prompt in prompts):
        raise ValueError(f"{file}: expected a text or a list of texts, none of them empty")
    return prompts


def jsonl_prompts(data: DataSettings) -> list[str]:
    """A file with a JSON object a line; the text is in the field data_config.text_field, or made by a template."""
    if data.dataset_path is None:
        raise ValueError("data_config.dataset_path: missing, dataset: jsonl needs a file")
    file = existing(data.dataset_path)
    if not file.is_file():
        raise ValueError(f"data_config.dataset_path: {file} is not a file")
    with file.open("rb") as stream:
        records = list(json_lines(stream, str(file)))
    if data.prompt_template is not None:
        return [build_dataset_input(record, data.prompt_template) for _, record in records]
    for line, record in records:
        if not isinstance(record.get(data.text_field), str) or not record[data.text_field]:
            raise ValueError(
                f"{file}: line {line}: data_config.text_field {data.text_field!r} is no text there, "
                f"the fields are {', '.join(record)}"
            )
    return [record[data.text_field] for _, record in records]


def longbench_prompts(data: DataSettings) -> list[str]:
    """A task of LongBench from the local folder if there is one, else from the hub."""
    folder = LONGBENCH_FOLDER if data.dataset_path is None else existing(data.dataset_path)
    local = longbench_local(folder, data.longbench_task)
    if local is None and data.dataset_path is not None:
        raise ValueError(f"data_config.dataset_path: {folder} has neither *.jsonl, data/*.jsonl nor data.zip")
    records = longbench_online(data.longbench_task) if local is None else local
    return [build_dataset_input(record, data.prompt_template) for record in records]


def longbench_local(folder: Path, task: str) -> list[dict[str, Any]] | None:
    """Records of `task` from data/*.jsonl, *.jsonl or the hub's data.zip below `folder`; None if there is no data."""
    files = {file.stem: file for pattern in ("*.jsonl", "data/*.jsonl") for file in sorted(folder.glob(pattern))}
    if files:
        if task not in files:
            raise unknown_task(task, folder, list(files))
        with files[task].open("rb") as stream:
            return [record for _, record in json_lines(stream, str(files[task]))]
    archive = folder / "data.zip"
    if not archive.is_file():
        return None
    try:
        with zipfile.ZipFile(archive) as opened:
            members = {Path(name).stem: name for name in opened.namelist() if name.endswith(".jsonl")}
            if task not in members:
                raise unknown_task(task, archive, list(members))
            with opened.open(members[task]) as stream:
                return [record for _, record in json_lines(stream, f"{archive}:{members[task]}")]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"{archive}: {error} (an incomplete download?)") from None


def unknown_task(task: str, where: Path, tasks: list[str]) -> ValueError:
    return ValueError(f"data_config.longbench_task: {task!r} is not in {where}, which has {', '.join(sorted(tasks))}")


def longbench_online(task: str) -> list[dict[str, Any]]:
    """Records of `task` from the hub's data.zip; it ends in the hub's cache, so that it is fetched once."""
    advice = f"put its data/*.jsonl or data.zip into {LONGBENCH_FOLDER}"
    try:
        from huggingface_hub import hf_hub_download

        archive = hf_hub_download(LONGBENCH_HUB_NAME, "data.zip", repo_type="dataset")
    except Exception as error:  # offline, no such file, no permission: the hub client has a type for each
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"data_config.dataset: LongBench cannot be fetched from the hub ({reason}); {advice}"
        ) from None
    return longbench_local(Path(archive).parent, task) or []


def json_lines(stream: io.BufferedIOBase | Any, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a jsonl stream with their line numbers, empty lines left out."""
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: line {number}: not valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where}: line {number}: expected a JSON object")
        yield number, record


def existing(path: str) -> Path:
    """The file or folder data_config.dataset_path names."""
    found = resolve_path(path)
    if not found.exists():
        raise ValueError(f"data_config.dataset_path: {path} does not exist")
    return found
