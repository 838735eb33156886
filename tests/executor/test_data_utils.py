# SPDX-License-Identifier: Apache-2.0
"""Prompts from the bundled file, LongBench and jsonl files."""

import json
import random
import zipfile
from pathlib import Path

import pytest

from executor.config import DataSettings
from executor.utils import data_utils
from executor.utils.data_utils import build_dataset_input, load_prompts

TASKS = ("gov_report", "hotpotqa")


def refusal(**data) -> str:
    """The one-line error of these data settings."""
    with pytest.raises(ValueError) as error:
        load_prompts(DataSettings(**data))
    assert "\n" not in str(error.value)
    return str(error.value)


def make_records(task: str) -> list[dict]:
    """LongBench records with random contents, braces, quotes and non-ASCII characters."""
    return [
        {
            "context": f"{task} {{x}} “é” {random.random()}",
            "input": f"why {random.random()}?",
            "length": 3,
            "answers": ["a"],
        }
        for _ in range(3)
    ]


def jsonl(records: list[dict]) -> str:
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n"


def write_longbench(folder: Path, layout: str, records: dict[str, list[dict]]) -> None:
    """Writes the tasks as jsonl files, as the unpacked archive, or as the hub's archive."""
    if layout == "data.zip":
        with zipfile.ZipFile(folder / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for task in records:
                archive.writestr(f"data/{task}.jsonl", jsonl(records[task]))
        return
    target = folder / "data" if layout == "data/*.jsonl" else folder
    target.mkdir(exist_ok=True)
    for task in records:
        (target / f"{task}.jsonl").write_text(jsonl(records[task]), encoding="utf-8")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    """Disables the network and the cache of the hub client."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


# dataset: default


def test_bundled_file():
    prompts = json.loads(data_utils.DEFAULT_PROMPTS.read_text(encoding="utf-8"))
    assert load_prompts(DataSettings()) == ([prompts] if isinstance(prompts, str) else prompts)


@pytest.mark.parametrize("content", ["one text", ["é", "b\nc"]])
def test_edited_file(content, tmp_path, monkeypatch):
    file = tmp_path / "p.json"
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    expected = [content] if isinstance(content, str) else content
    assert load_prompts(DataSettings(dataset_path=str(file))) == expected
    monkeypatch.setattr(data_utils, "DEFAULT_PROMPTS", file)
    assert load_prompts(DataSettings()) == expected


@pytest.mark.parametrize(
    "content", ["", "{", '{"a": "b"}', "3", "null", '""', '["a", ""]', '["a", 3]', '[["a"]]', b'"\xff"', "[]"]
)
def test_invalid_default_file(content, tmp_path):
    file = tmp_path / "p.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refusal(dataset_path=str(file))
    assert line.startswith(f"{file}: ") or line == "data_config.dataset: default holds no prompt"


@pytest.mark.parametrize("dataset", ["default", "LongBench", "jsonl"])
def test_missing_path(dataset):
    assert refusal(dataset=dataset, dataset_path="no/such") == "data_config.dataset_path: no/such does not exist"


def test_folder_instead_of_a_file(tmp_path):
    for dataset in ("default", "jsonl"):
        assert str(tmp_path) in refusal(dataset=dataset, dataset_path=str(tmp_path))


# dataset: LongBench


@pytest.mark.parametrize("layout", ["*.jsonl", "data/*.jsonl", "data.zip"])
@pytest.mark.parametrize("given", [False, True])
def test_longbench_folder(layout, given, tmp_path, monkeypatch):
    records = {task: make_records(task) for task in TASKS}
    write_longbench(tmp_path, layout, records)
    path = {"dataset_path": str(tmp_path)} if given else {}
    monkeypatch.setattr(data_utils, "LONGBENCH_FOLDER", Path("/nowhere") if given else tmp_path)
    data = DataSettings(dataset="LongBench", longbench_task="hotpotqa", prompt_template="{context}|{input}", **path)
    assert load_prompts(data) == [f"{record['context']}|{record['input']}" for record in records["hotpotqa"]]


@pytest.mark.parametrize("layout", ["*.jsonl", "data/*.jsonl", "data.zip"])
def test_unknown_task_lists_available_tasks(layout, tmp_path):
    write_longbench(tmp_path, layout, {task: make_records(task) for task in TASKS})
    line = refusal(dataset="LongBench", dataset_path=str(tmp_path), longbench_task="hotpot")
    assert line.startswith("data_config.longbench_task: 'hotpot' is not in ")
    assert line.endswith("which has gov_report, hotpotqa")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text"])
def test_damaged_archive(damage, tmp_path):
    records = [{"context": random.randbytes(3000).hex()}]
    write_longbench(tmp_path, "data.zip", {"gov_report": records})
    archive = tmp_path / "data.zip"
    content = bytearray(archive.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[200:1200] = bytes(255 - byte for byte in content[200:1200])
    else:
        content = b"version https://git-lfs.github.com/spec/v1\n"
    archive.write_bytes(content)
    line = refusal(dataset="LongBench", dataset_path=str(tmp_path))
    assert line.startswith(f"{archive}: ") and "download" in line


@pytest.mark.parametrize("layout", ["*.jsonl", "data.zip"])
@pytest.mark.parametrize("bad", ["{", "[1]", '"text"', "3"])
def test_error_has_line_number(layout, bad, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.jsonl", lambda records: f'{{"context": "a"}}\n\n{bad}\n')
    write_longbench(tmp_path, layout, {"gov_report": []})
    line = refusal(dataset="LongBench", dataset_path=str(tmp_path))
    assert "gov_report.jsonl: line 3: " in line and str(tmp_path) in line


def test_offline_without_data(tmp_path, monkeypatch):
    monkeypatch.setattr(data_utils, "LONGBENCH_FOLDER", tmp_path)
    line = refusal(dataset="LongBench")
    assert line.startswith("data_config.dataset: LongBench cannot be fetched") and str(tmp_path) in line


@pytest.mark.parametrize("path", [".", "data.zip", "notes.txt"])
def test_dataset_path_without_data_does_not_query_the_hub(path, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("asked the hub"))
    (tmp_path / "data").mkdir()
    (tmp_path / path).touch()
    line = refusal(dataset="LongBench", dataset_path=str(tmp_path / path))
    assert str(tmp_path / path) in line


def test_hub_archive_is_used(tmp_path, monkeypatch):
    import huggingface_hub

    records = make_records("gov_report")
    write_longbench(tmp_path, "data.zip", {"gov_report": records})
    asked = []
    monkeypatch.setattr(data_utils, "LONGBENCH_FOLDER", tmp_path / "empty")
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda *names, **options: asked.append((*names, options["repo_type"])) or str(tmp_path / "data.zip"),
    )
    prompts = load_prompts(DataSettings(dataset="LongBench", prompt_template="{input}"))
    assert prompts == [record["input"] for record in records]
    assert asked == [("zai-org/LongBench", "data.zip", "dataset")]


# Prompt templates


def test_default_template_holds_the_whole_context():
    [record] = make_records("x")[:1]
    prompt = build_dataset_input(record)
    assert record["context"] in prompt and "{context}" not in prompt and "summary" in prompt.lower()


@pytest.mark.parametrize(
    "template", ["{contxt}", "{}", "{0}", "{context", "{context!q}", "{context:d}", "{context.x}", "{context[x]}"]
)
def test_invalid_template(template):
    with pytest.raises(ValueError, match="^data_config.prompt_template: .*fields are context, input, length, answers$"):
        build_dataset_input(make_records("x")[0], template)


# dataset: jsonl


def test_jsonl(tmp_path):
    records = make_records("x")
    file = tmp_path / "my prompts.jsonl"
    file.write_text("\n" + jsonl(records) + "\n", encoding="utf-8")
    data = {"dataset": "jsonl", "dataset_path": str(file)}
    assert load_prompts(DataSettings(text_field="context", **data)) == [record["context"] for record in records]
    templated = DataSettings(prompt_template="{{{input}}} {length}", **data)
    assert load_prompts(templated) == [f"{{{record['input']}}} 3" for record in records]


@pytest.mark.parametrize("second", [{"txt": "a"}, {"text": 3}, {"text": None}, {"text": ["a"]}])
def test_missing_field_names_its_line(second, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(f'{{"text": "a"}}\n\n{json.dumps(second)}\n')
    line = refusal(dataset="jsonl", dataset_path=str(file))
    assert line.startswith(f"{file}: line 3: data_config.text_field 'text'") and f"fields are {[*second][0]}" in line


def test_jsonl_needs_a_path():
    assert "data_config.dataset_path: missing" in refusal(dataset="jsonl")


@pytest.mark.parametrize("dataset", ["jsonl", "LongBench"])
def test_no_records(dataset, tmp_path):
    (tmp_path / "gov_report.jsonl").write_text("\n\n")
    path = tmp_path / "gov_report.jsonl" if dataset == "jsonl" else tmp_path
    assert refusal(dataset=dataset, dataset_path=str(path)) == f"data_config.dataset: {dataset} holds no prompt"


@pytest.mark.parametrize(("max_prompts", "expected"), [(1, 1), (2, 2), (3, 3), (99, 3), (None, 3)])
def test_max_prompts(max_prompts, expected, tmp_path):
    texts = ["a", "b", "c"]
    (tmp_path / "p.json").write_text(json.dumps(texts))
    data = DataSettings(dataset_path=str(tmp_path / "p.json"), max_prompts=max_prompts)
    assert load_prompts(data) == texts[:expected]
