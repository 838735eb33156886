# SPDX-License-Identifier: Apache-2.0
"""Prompt data sets: the bundled file, LongBench, or any jsonl file."""

import contextlib
import itertools
import json
import re
import string
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from executor.config import REPOSITORY, DataSettings, resolve_path
from executor.utils.reading import open_file, read_json, refusing
from executor.utils.text import MAX_LINE, one_line, quoted
from executor.utils.values import is_unicode

DEFAULT_PROMPTS = REPOSITORY / "dataset" / "default_prompt.json"
LONGBENCH_FOLDER = REPOSITORY / "dataset" / "LongBench"
LONGBENCH_HUB_NAME = "zai-org/LongBench"
MAX_PROMPT = 16 << 20  # characters
MAX_RECORD_BYTES = 64 << 20  # one line of a jsonl file
MAX_MEMBER_BYTES = 512 << 20  # one task in data.zip, uncompressed
MAX_EMPTY_LINES = 100_000  # in a jsonl file
FIELD = re.compile(r"[^.{}\[\]]+(\[[^.{}\[\]]+\])*")  # {name} or {name[key]}; no attribute access
FORMAT_SPEC = re.compile(r"(.?[<>=^])?[-+ ]?#?0?\d{0,4}[_,]?(\.\d{1,7})?[a-zA-Z%]?", re.DOTALL)
DAMAGED = "damaged or cannot be unpacked, perhaps an incomplete download"

LONG_SEQUENCE_PROMPT = (
    "Read the following text carefully, then write a summary of it that keeps the main points and leaves out details."
    "\n\nText:\n{context}\n\nSummary:"
)


def build_dataset_input(record: dict[str, Any], prompt_template: str | None = None) -> str:
    """Formats a LongBench record as a prompt, by data_config.prompt_template, else LONG_SEQUENCE_PROMPT.

    Templates name record fields in braces: {context}, {input} (the question, if there is one).
    Raises ValueError for a field that the record lacks.
    """
    try:
        text = ""
        for literal, field in template_parts(prompt_template or LONG_SEQUENCE_PROMPT):
            text += literal + field.format_map(record)
            if len(text) > MAX_PROMPT:
                raise ValueError(f"a prompt of more than {MAX_PROMPT} characters")
        return text
    except Exception as error:  # formatting raises many types
        problem = one_line(error, MAX_LINE // 4) or type(error).__name__
        raise ValueError(
            f"data_config.prompt_template: {problem} does not fit, the record's fields are {fields_of(record)}"
        ) from None


def template_parts(template: str) -> list[tuple[str, str]]:
    """Parses a template into (literal text, replacement field or "").

    ValueError unless every replacement field is a field name with an optional short format.
    """
    parts = []
    for literal, name, spec, conversion in string.Formatter().parse(template):
        field = ""
        if name is not None:
            field = "{" + name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "") + "}"
            if not FIELD.fullmatch(name) or name.isdecimal():
                raise ValueError(f"{quoted(field)} does not name a field; double a literal brace")
            if conversion not in (None, "r", "s", "a") or not FORMAT_SPEC.fullmatch(spec or ""):
                raise ValueError(f"{quoted(field)} is not a field with a short format, such as {{name:.100}}")
        parts.append((literal, field))
    return parts


def fields_of(record: dict[str, Any]) -> str:
    return one_line(", ".join(itertools.islice(record, 20)), MAX_LINE // 3)


def load_prompts(data: DataSettings) -> list[str]:
    """Loads all prompts of the configured data set. ValueError with the key, or the file and line."""
    if data.prompt_template is not None:
        if data.dataset == "default":
            raise ValueError(
                "data_config.prompt_template: needs a dataset with records, LongBench or jsonl, not default"
            )
        with refusing("data_config.prompt_template"):
            template_parts(data.prompt_template)
    loaders = {"default": default_prompts, "LongBench": longbench_prompts, "jsonl": jsonl_prompts}
    prompts = []
    for where, prompt in itertools.islice(loaders[data.dataset](data), data.max_prompts):
        if len(prompt) > MAX_PROMPT:
            raise ValueError(one_line(f"{where}: a prompt of more than {MAX_PROMPT} characters"))
        if not is_unicode(prompt):
            raise ValueError(one_line(f"{where}: {unpaired_surrogate(prompt)}"))
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"data_config.dataset: {data.dataset} holds no prompt")
    return prompts


def unpaired_surrogate(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"half of a surrogate pair, {quoted(text[error.start])}, at character {error.start + 1}: no text"
    raise AssertionError("text without a surrogate")


def source_files(data: DataSettings) -> list[Path]:
    """Existing files that `load_prompts` reads."""
    default = LONGBENCH_FOLDER if data.dataset == "LongBench" else DEFAULT_PROMPTS
    source = default if data.dataset_path is None else existing(data.dataset_path)
    if data.dataset == "LongBench":
        source = task_files(source).get(data.longbench_task, source / "data.zip")
    return [source] if source.is_file() else []


def default_prompts(data: DataSettings) -> Iterator[tuple[str, str]]:
    """Yields ("FILE: prompt N", text) from a JSON file with one text or a list of texts."""
    file = DEFAULT_PROMPTS if data.dataset_path is None else existing(data.dataset_path)
    prompts = read_json(file)
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, list):
        raise ValueError(one_line(f"{file}: expected a text or a list of texts, none of them empty"))
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str) or not prompt:
            problem = f"expected a text that is not empty, got {quoted(prompt)}"
            raise ValueError(one_line(f"{file}: prompt {number}: {problem}"))
    return ((f"{file}: prompt {number}", prompt) for number, prompt in enumerate(prompts, 1))


def jsonl_prompts(data: DataSettings) -> Iterator[tuple[str, str]]:
    """Yields ("FILE: line N", text) from a jsonl file: data_config.text_field, or prompt_template filled in."""
    if data.dataset_path is None:
        raise ValueError("data_config.dataset_path: missing, dataset: jsonl needs a file")
    file = existing(data.dataset_path)
    with open_file(file) as stream:
        for where, record in json_lines(stream, str(file)):
            if data.prompt_template is not None:
                yield where, prompt_of(record, data.prompt_template, where)
                continue
            text = record.get(data.text_field)
            if not isinstance(text, str) or not text:
                problem = f"data_config.text_field {quoted(data.text_field)} is no text there"
                raise ValueError(one_line(f"{where}: {problem}, the fields are {fields_of(record)}"))
            yield where, text


def longbench_prompts(data: DataSettings) -> Iterator[tuple[str, str]]:
    """Yields ("FILE: line N", text) of a LongBench task, from the local folder if it has one, else from the hub."""
    folder = LONGBENCH_FOLDER if data.dataset_path is None else existing(data.dataset_path)
    if data.dataset_path is not None and not folder.is_dir():
        raise ValueError(one_line(f"data_config.dataset_path: {folder} is not a folder"))
    records = longbench_records(folder, data.longbench_task)
    if records is None and data.dataset_path is not None:
        raise ValueError(one_line(f"data_config.dataset_path: {folder} has neither *.jsonl, data/*.jsonl nor data.zip"))
    for where, record in longbench_online(data.longbench_task) if records is None else records:
        yield where, prompt_of(record, data.prompt_template, where)


def prompt_of(record: dict[str, Any], template: str | None, where: str) -> str:
    try:
        return build_dataset_input(record, template)
    except ValueError as error:
        raise ValueError(one_line(f"{where}: {error}")) from None


def task_files(folder: Path) -> dict[str, Path]:
    """Maps task -> file, for *.jsonl and data/*.jsonl in a LongBench folder."""
    files: dict[str, Path] = {}
    for parent in (folder, folder / "data"):
        with refusing(str(parent), "cannot be read"):
            if parent.is_dir():
                files |= {file.stem: file for file in sorted(parent.iterdir()) if file.name.endswith(".jsonl")}
    return files


def longbench_records(folder: Path, task: str) -> Iterator[tuple[str, dict[str, Any]]] | None:
    """Records of `task`, as ("FILE: line N", record), from *.jsonl, data/*.jsonl or data.zip; None without those.

    Raises ValueError if the folder has only other tasks.
    """
    files = task_files(folder)
    if files:
        if task not in files:
            raise unknown_task(task, folder, list(files))
        return file_records(files[task])
    archive = folder / "data.zip"
    return archive_records(archive, task) if archive.is_file() else None


def file_records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open_file(file) as stream:
        yield from json_lines(stream, str(file))


def archive_records(archive: Path, task: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("FILE: line N", record) of a task, read from data.zip in place."""
    with contextlib.ExitStack() as stack:
        with refusing(str(archive), DAMAGED):
            opened_archive = stack.enter_context(zipfile.ZipFile(archive))
        found = [info for info in opened_archive.infolist() if info.filename.endswith(".jsonl")]
        members = {Path(info.filename).stem: info for info in found}
        if task not in members:
            raise unknown_task(task, archive, list(members))
        where = f"{archive}: {one_line(members[task].filename, MAX_LINE // 4)}"
        if members[task].file_size > MAX_MEMBER_BYTES:  # zipfile never reads more than this
            raise ValueError(one_line(f"{where}: larger than {MAX_MEMBER_BYTES >> 20} MiB when unpacked"))
        with refusing(where, DAMAGED):
            stream = stack.enter_context(opened_archive.open(members[task]))
        yield from json_lines(stream, where, DAMAGED)


def unknown_task(task: str, where: Path, tasks: list[str]) -> ValueError:
    there = one_line(", ".join(sorted(tasks)), MAX_LINE // 2)
    return ValueError(one_line(f"data_config.longbench_task: {quoted(task)} is not in {where}, which has {there}"))


def longbench_online(task: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records of `task` from the hub's data.zip, which is downloaded once, to the hub's cache."""
    advice = f"put its data/*.jsonl or data.zip into {LONGBENCH_FOLDER}"
    try:
        from huggingface_hub import hf_hub_download

        archive = hf_hub_download(LONGBENCH_HUB_NAME, "data.zip", repo_type="dataset")
    except Exception as error:  # offline, no such file, no permission: the hub client has a type for each
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            one_line(f"data_config.dataset: LongBench cannot be fetched from the hub ({reason}); {advice}")
        ) from None
    return archive_records(Path(archive), task)


def json_lines(stream: Any, where: str, problem: str = "cannot be read") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("WHERE: line N", object) from a jsonl stream, skipping empty lines; problem: text of read errors."""
    num_empty = 0
    for number in itertools.count(1):
        source = f"{where}: line {number}"
        with refusing(source, problem):
            line = stream.readline(MAX_RECORD_BYTES + 1)
        if not line:
            return
        if len(line) > MAX_RECORD_BYTES:
            raise ValueError(one_line(f"{source}: longer than {MAX_RECORD_BYTES >> 20} MiB"))
        if not line.strip():
            num_empty += 1
            if num_empty > MAX_EMPTY_LINES:
                raise ValueError(one_line(f"{source}: more than {MAX_EMPTY_LINES} empty lines"))
            continue
        with refusing(source, "not valid JSON"):
            record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError(one_line(f"{source}: expected a JSON object"))
        yield source, record


def existing(path: str) -> Path:
    """Resolves data_config.dataset_path; ValueError if it does not exist."""
    with refusing("data_config.dataset_path"):
        found = resolve_path(path)
        if not found.exists():
            raise ValueError(f"{one_line(path, MAX_LINE // 2)} does not exist")
        return found
