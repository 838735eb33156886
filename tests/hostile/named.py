# SPDX-License-Identifier: Apache-2.0
"""Named inputs: past causes of tracebacks, hangs and memory exhaustion, and similar ones."""

import functools
import io
import json
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

from tests.hostile.case import DEMO, YAML, Case

DEEP = "[" * 50_000
HALF = '"\\ud83d"'
LONG_NAME = "n" * 300
NESTED_LOOPS = "".join(f"{{% for a{n} in range(9999) %}}" for n in range(9)) + "x" + "{% endfor %}" * 9
DOUBLED = "{{% set ns = namespace(n=3) %}}{{% for i in range(99) %}}{{% set ns.n = ns.n {} ns.n %}}{{% endfor %}}"
CHAT = ("--set", "data_config.chat_template=True")
BOMB = "l0: &l0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]\n" for n in range(1, 10)
)


def with_yaml(line: str) -> dict[str, Any]:
    """The valid YAML with one line replaced."""
    key = line.partition(":")[0] + ":"
    lines = [old for old in YAML.splitlines() if not old.startswith(key)]
    return {"run.yaml": "\n".join([*lines, line]).encode()}


def sets(*settings: str) -> tuple[str, ...]:
    return tuple(part for setting in settings for part in ("--set", setting))


def with_json(name: str, **changed: Any) -> dict[str, Any]:
    """A JSON file of the checkpoint with some keys replaced."""
    source = base_config() if name == "config.json" else json.loads((DEMO / name).read_text())
    return {f"checkpoint/{name}": json.dumps(source | changed).encode()}


def base_config() -> dict[str, Any]:
    """config.json as written by `make_base`."""
    small = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 16, "head_dim": 16}
    few = {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return json.loads((DEMO / "config.json").read_text()) | small | few | heads


def raw(name: str, text: str | bytes) -> dict[str, Any]:
    return {name: text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")}


def make_fifo(file: Path) -> None:
    os.mkfifo(file)


def make_folder(file: Path) -> None:
    file.mkdir()


def make_loop(file: Path) -> None:
    file.symlink_to(file.name)


def make_link(target: str, file: Path) -> None:
    file.symlink_to(target)


ODD_FILES = {
    "a pipe": make_fifo,
    "a folder": make_folder,
    "a link to itself": make_loop,
    "a dangling link": functools.partial(make_link, "gone"),
    "an endless device": functools.partial(make_link, "/dev/zero"),
}
BROKEN_TEXTS = {
    "empty": "",
    "null": "null",
    "deep": DEEP,
    "deep objects": '{"a": ' * 50_000,
    "digits": "9" * 5000,
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a null character": "\0",
    "a list": "[]",
    "half an object": '{"a":',
}
READERS = (
    "run.yaml",
    "prompts.json",
    "checkpoint/config.json",
    "checkpoint/generation_config.json",
    "checkpoint/tokenizer.json",
    "checkpoint/tokenizer_config.json",
    "checkpoint/model.safetensors.index.json",
    "checkpoint/model-00001-of-00002.safetensors",
)


def safetensors_file(header: str | bytes, length: int | None = None, data: bytes = b"") -> dict[str, Any]:
    """A single-file checkpoint with a given header."""
    header = header if isinstance(header, bytes) else header.encode()
    content = struct.pack("<Q", len(header) if length is None else length) + header + data
    return {"checkpoint/model.safetensors.index.json": None, "checkpoint/model.safetensors": content}


def tensor(**changed: Any) -> str:
    return json.dumps({"lm_head.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changed})


def zipped(content: bytes, name: str = "data/gov_report.jsonl") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)  # fixed time stamp
    return stream.getvalue()


LONGBENCH = sets("data_config.dataset=LongBench", "data_config.dataset_path=bench")
JSONL = sets("data_config.dataset=jsonl", "data_config.dataset_path=p.jsonl")


def every_reader() -> list[Case]:
    """Each input file replaced by a non-file, or by invalid text."""
    cases = []
    for name in READERS:
        cases += [Case(f"{name} is {kind}", {name: make}) for kind, make in ODD_FILES.items()]
        cases += [Case(f"{name}: {kind}", raw(name, text)) for kind, text in BROKEN_TEXTS.items()]
    return cases


def settings() -> list[Case]:
    lines = {
        "world_size of 10**12": "world_size: 1000000000000",
        "world_size of 400 digits": "world_size: " + "9" * 400,
        "world_size of 5000 digits": "world_size: " + "9" * 5000,
        "world_size of a prime": "world_size: 1000000007",
        "a model_path of 300 letters": f"model_path: {LONG_NAME}",
        "a model_path of nobody": "model_path: ~nobody_of_that_name/x",
        "a model_path with a null character": 'model_path: "a\\0b"',
        "a model_path of half a character": f"model_path: {HALF}",
        "a model_name of 300 letters": f"model_name: {LONG_NAME}",
        "a model_name with escapes": 'model_name: "\\e[31m"',
        "a model_name that leaves the folder": "model_name: ../../x",
        "an alias bomb": BOMB,
        "an alias bomb as a value": BOMB + "model_name: *l9",
        "a list in itself": "model_name: &a [*a]",
        "a Python object": "model_name: !!python/object/apply:os.system [ls]",
        "a key of a million letters": "? " + "k" * 10**6 + "\n: 1",
        "a value of a million letters": "exe_mode: " + "v" * 10**6,
        "two documents": "---\na: 1",
    }
    cases = [Case(name, with_yaml(line)) for name, line in lines.items()]
    overrides = {
        "digits": "data_config.batch_size=" + "9" * 400,
        "digits as a float": "data_config.temperature=" + "9" * 400,
        "NaN": "data_config.temperature=.nan",
        "deep": "model_config.rope_scaling=" + "[" * 5000,
        "lengths beyond memory": "data_config.input_max_len=2147483647",
        "new tokens beyond memory": "data_config.max_new_tokens=2147483647",
        "a huge batch": "data_config.batch_size=1048576",
        "a huge cache": "model_config.cache_tokens=2147483647",
        "half a stop string": f"data_config.stop=[{HALF}]",
        "an output folder of nobody": "output_dir=~nobody_of_that_name/x",
        "an output folder of 300 letters": f"output_dir={LONG_NAME}",
        "an output folder that is a file": "output_dir=prompts.json",
        "an output folder in /proc": "output_dir=/proc/x",
        "a dataset_path of nobody": "data_config.dataset_path=~nobody_of_that_name/x",
        "a dataset_path of 300 letters": f"data_config.dataset_path={LONG_NAME}",
        "a dataset_path that is a folder": "data_config.dataset_path=checkpoint",
        "no equals sign": "x" * 10_000,
        "escapes": "\x1b[31m=1",
        "bytes that are no UTF-8": "model_name=\udcff",
        "a date": "data_config.seed=2024-02-03",
        "rope: no factor": "model_config.rope_scaling={rope_type: yarn}",
        "rope: a factor of digits": "model_config.rope_scaling={rope_type: yarn, factor: " + "9" * 400 + "}",
        "rope: an infinite factor": "model_config.rope_scaling={rope_type: linear, factor: .inf}",
        "rope: factor 0": "model_config.rope_scaling={rope_type: linear, factor: 0}",
        "rope: a type that is a list": "model_config.rope_scaling={rope_type: [a], factor: 2}",
        "rope: an empty mapping": "model_config.rope_scaling={}",
    }
    cases += [Case(f"--set: {name}", arguments=sets(setting)) for name, setting in overrides.items()]
    names = {"of 300 letters": f"{LONG_NAME}.yaml", "of nobody": "~nobody_of_that_name/x", "of bytes": "\udcff.yaml"}
    cases += [Case(f"a YAML {name}", yaml=file) for name, file in names.items()]
    outputs = {"of 300 letters": LONG_NAME, "in no folder": "no/such/x", "that is the prompts": "prompts.json"}
    outputs |= {"that is the YAML": "run.yaml", "that is a weight": "checkpoint/model-00001-of-00002.safetensors"}
    return cases + [Case(f"an output {name}", arguments=("--output", file)) for name, file in outputs.items()]


def checkpoints() -> list[Case]:
    config = {
        "10**9 layers": {"num_hidden_layers": 10**9},
        "10**9 experts": {"num_experts": 10**9},
        "10**18 experts a token": {"num_experts_per_tok": 10**18},
        "a vocabulary of 10**12": {"vocab_size": 10**12},
        "10**12 positions": {"max_position_embeddings": 10**12},
        "a head of 0": {"head_dim": 0},
        "no kv heads": {"num_key_value_heads": 0},
        "a size of 400 digits": {"hidden_size": 10**400},
        "a size that is NaN": {"rms_norm_eps": float("nan")},
        "a theta of 0": {"rope_theta": 0},
        "a theta that is a list": {"rope_theta": [1]},
        "odd rope values": {"rope_scaling": {"rope_type": "yarn", "factor": "4", "beta_fast": None}},
        "rope values that are a text": {"rope_scaling": "yarn"},
        "end tokens that are texts": {"eos_token_id": ["a"]},
        "an end token of 400 digits": {"eos_token_id": 10**400},
        "layers that are a text": {"mlp_only_layers": "all"},
        "an activation that is a list": {"hidden_act": ["silu"]},
        "a format that is a number": {"torch_dtype": 7},
    }
    cases = [Case(f"config.json: {name}", with_json("config.json", **changed)) for name, changed in config.items()]
    random = sets("model_config.with_ckpt=False")
    cases += [Case(f"{case.name}, random weights", case.files, random) for case in cases[:7]]
    headers = {
        "a length of 2**63": safetensors_file("{}", length=2**63),
        "a length beyond the file": safetensors_file("{}", length=100),
        "no tensors": safetensors_file("{}"),
        "deep": safetensors_file(DEEP),
        "not UTF-8": safetensors_file(b"\xff\xff"),
        "a negative size": safetensors_file(tensor(shape=[-1]), data=bytes(4)),
        "a size of 400 digits": safetensors_file(tensor(shape=[10**400]), data=bytes(4)),
        "a product beyond 2**64": safetensors_file(tensor(shape=[2**40, 2**40]), data=bytes(4)),
        "offsets beyond the file": safetensors_file(tensor(data_offsets=[0, 400]), data=bytes(4)),
        "offsets that go back": safetensors_file(tensor(data_offsets=[4, 0]), data=bytes(4)),
        "an unknown format": safetensors_file(tensor(dtype="X9"), data=bytes(4)),
        "a name with escapes": safetensors_file(tensor().replace("lm_head", "\\u001b[31m"), data=bytes(4)),
        "a name of a million letters": safetensors_file(tensor().replace("lm_head", "n" * 10**6), data=bytes(4)),
    }
    cases += [Case(f"safetensors: {name}", files) for name, files in headers.items()]
    maps = {"leaves the folder": "../x", "is a number": 3, "is long": LONG_NAME, "is half a character": "\ud83d"}
    for name, file in maps.items():
        index = json.dumps({"weight_map": {"lm_head.weight": file}})
        cases.append(Case(f"index: a file that {name}", raw("checkpoint/model.safetensors.index.json", index)))
    return cases + [Case("a checkpoint without a tokenizer", {"checkpoint/tokenizer.json": None})]


def texts() -> list[Case]:
    templates = {
        "a syntax error": "{% for %}",
        "raise_exception": "{{ raise_exception('no') }}",
        "nested loops": NESTED_LOOPS,
        "a huge text": "{{ 'x' * 1000000000 }}",
        "a huge power": "{{ 9 ** (9 ** 9) }}",
        "a huge repetition": "{{ ('x' * 1000000) * 1000000 }}",
        "a huge batch": "{{ range(10)|batch(10**9, 'x')|list }}",
        "a text that doubles": DOUBLED.format("~"),
        "a number that doubles its digits": DOUBLED.format("*"),
        "an attribute of an attribute": "{{ messages.__class__.__mro__ }}",
        "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "deep": "{% if 1 %}" * 3000,
        "a missing name": "{{ nothing.at.all }}",
        "nothing": "",
    }
    cases = [
        Case(f"chat template: {name}", with_json("tokenizer_config.json", chat_template=template), CHAT)
        for name, template in templates.items()
    ]
    odd = {"a number": 3, "a list": [3], "an object": {"a": 1}, "half a character": "\ud83d"}
    cases += [
        Case(f"chat template: {name}", with_json("tokenizer_config.json", chat_template=template), CHAT)
        for name, template in odd.items()
    ]
    prompts = {"half a character": f"[{HALF}]", "a number": "[3]", "an empty list": "[]", "an empty text": '""'}
    cases += [Case(f"prompts: {name}", raw("prompts.json", text)) for name, text in prompts.items()]
    lines = {"half a character": f'{{"text": {HALF}}}', "deep": DEEP, "a list": "[1]", "not UTF-8": b'{"text": "\xff"}'}
    cases += [Case(f"jsonl: {name}", raw("p.jsonl", text), JSONL) for name, text in lines.items()]
    fills = ("{text:>9999999999}", "{text.__class__}", "{0}", "{text", "{text!q}", "{" * 9999)
    good = raw("p.jsonl", '{"text": "a"}')
    for fill in fills:
        cases.append(Case(f"template {fill[:20]}", good, (*JSONL, *sets(f"data_config.prompt_template='{fill}'"))))
    archive = zipped(b'{"context": "a"}')
    flags = archive.index(b"PK\x01\x02") + 8
    archives = {
        "encrypted": archive[:6] + b"\1\0" + archive[8:flags] + b"\1\0" + archive[flags + 2 :],
        "of another method": archive[:8] + b"\x63\0" + archive[10 : flags + 2] + b"\x63\0" + archive[flags + 4 :],
        "cut off": archive[:-30],
        "no archive": b"version https://git-lfs.github.com/spec/v1\n",
        "with half a character": zipped(f'{{"context": {HALF}}}'.encode()),
        "of another task": zipped(b"{}", "data/x.jsonl"),
        "of a long line": zipped(b"a" * (65 << 20)),
    }
    cases += [
        Case(f"LongBench: an archive {name}", {"bench/data.zip": data}, LONGBENCH) for name, data in archives.items()
    ]
    cases += [
        Case(f"LongBench: a task that is {kind}", {"bench/gov_report.jsonl": make}, LONGBENCH)
        for kind, make in ODD_FILES.items()
    ]
    folder = {"bench/gov_report.jsonl": b'{"context": "a"}'}
    for task in ("../x", "*", LONG_NAME, "/etc/passwd"):
        arguments = (*LONGBENCH, *sets(f"data_config.longbench_task='{task}'"))
        cases.append(Case(f"LongBench: task {task[:20]}", folder, arguments))
    return cases


def named_cases() -> list[Case]:
    return [Case("a good run"), *settings(), *checkpoints(), *texts(), *every_reader()]
