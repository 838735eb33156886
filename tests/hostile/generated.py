# SPDX-License-Identifier: Apache-2.0
"""Fuzzed inputs: case N of a family depends only on the seed, the family and N."""

import json
import random
import struct
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from executor.config import SECTIONS, Settings
from tests.hostile.case import PROMPTS, YAML, Case
from tests.hostile.named import CHAT, DEEP, JSONL, LONGBENCH, base_config, safetensors_file, sets, zipped

Random = random.Random
KEYS = [key for key in typing.get_type_hints(Settings) if key not in SECTIONS and key != "output_dir"] + [
    f"{section}.{key}" for section, kind in SECTIONS.items() for key in typing.get_type_hints(kind)
]
DIGITS = int("9" * 400)
NUMBERS = [0, -1, 1, 2, 3, 7, 128, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**12, -(10**18), DIGITS, True, False]
NUMBERS += [0.5, -0.0, 1e-9, 1e308, float("nan"), float("inf"), -float("inf")]
TEXTS = ["", " ", "x", "0", "1e3", "nan", "\ud83d", "\0", "\x1b[31m", "名", "🙂", "\u202e", "a\nb"]
TEXTS += ["../..", "/", "/etc/passwd", "~nobody_of_that_name/x", "~", "{context}", "{0}", "%s%n", "yarn", "graph"]
TEXTS += ["a" * 300, "b" * 100_000]
FOR_FILE = {
    "generation_config.json": sets("data_config.sampling_from_checkpoint=True"),
    "tokenizer_config.json": CHAT,
}
PIECES = [b"", b"\0", b"\xff", b"[", b"]", b"{", b"}", b'"', b":", b",", b"\n", b"- ", b"*a", b"&a ", b"9" * 400]


def value(rng: Random, depth: int = 0) -> Any:
    """A random JSON or YAML value."""
    kind = rng.randrange(10 if depth < 3 else 8)
    if kind < 4:
        return rng.choice(NUMBERS)
    if kind < 7:
        return rng.choice(TEXTS)
    if kind == 7:
        return None
    if kind == 8:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    names = ["a", "rope_type", "factor", "type", "content", "x" * 200, "\x1b[0m", ""]
    return {rng.choice(names): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def as_yaml(found: Any) -> str:
    """Formats a value for `key=` or `key: `, as JSON, which YAML can read mostly."""
    text = json.dumps(found, ensure_ascii=True)
    for name, written in (("NaN", ".nan"), ("-Infinity", "-.inf"), ("Infinity", ".inf")):
        text = written if text == name else text
    return text


def damaged(rng: Random, data: bytes) -> bytes:
    """Mutates a few bytes (change, delete, duplicate, insert), or truncates."""
    for _ in range(rng.randrange(1, 4)):
        at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        end = min(end, at + rng.choice([1, 2, 8, 100]))
        put = rng.choice(PIECES)
        data = rng.choice(
            [data[:at] + put + data[at:], data[:at] + put + data[end:], data[:at], data[:end] + data[at:]]
        )
    return data


def changed(rng: Random, tree: Any) -> Any:
    """Mutates a JSON tree: replaces or removes one value at any depth, or renames a key."""
    tree = json.loads(json.dumps(tree))
    place = tree
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return tree
        key = rng.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
            place = place[key]
            continue
        action = rng.randrange(6)
        if action == 0:
            del place[key]
        elif action == 1 and isinstance(place, dict):
            place[rng.choice(TEXTS)] = place.pop(key)
        else:
            place[key] = value(rng)
        return tree


def as_json(rng: Random, tree: Any) -> bytes:
    """A mutated tree as text; one in five with mutated bytes, one in thirty deeply nested."""
    if rng.random() < 1 / 30:
        return json.dumps(tree).encode()[:-1] + b', "deep": ' + DEEP.encode()
    data = json.dumps(changed(rng, tree)).encode()
    return damaged(rng, data) if rng.random() < 0.2 else data


def yaml_values(rng: Random, base: Path) -> Case:
    tree = yaml.safe_load(YAML)
    for key in rng.sample(KEYS, rng.randrange(1, 3)):
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value(rng)
    text = ""
    for key, found in tree.items():
        if isinstance(found, dict) and key in SECTIONS:
            text += f"{key}:\n" + "".join(f"  {name}: {as_yaml(item)}\n" for name, item in found.items())
        else:
            text += f"{key}: {as_yaml(found)}\n"
    return Case("", {"run.yaml": text.encode()})


def yaml_structure(rng: Random, base: Path) -> Case:
    return Case("", {"run.yaml": damaged(rng, YAML.encode())})


def override(rng: Random, base: Path) -> Case:
    settings = []
    for _ in range(rng.randrange(1, 3)):
        key, text = rng.choice(KEYS), as_yaml(value(rng))
        settings.append(f"{key}={text}")
    if rng.random() < 0.2:
        settings.append(damaged(rng, settings[-1].encode()).decode("utf-8", "replace").replace("\0", "0")[:100_000])
    return Case("", arguments=sets(*(setting for setting in settings if not setting.startswith("output_dir"))))


def config(rng: Random, base: Path) -> Case:
    tree = base_config()
    extra = {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}}
    tree |= extra if rng.random() < 0.3 else {}
    arguments = sets("model_config.with_ckpt=False") if rng.random() < 0.3 else ()
    return Case("", {"checkpoint/config.json": as_json(rng, tree)}, arguments)


def safetensors(rng: Random, base: Path) -> Case:
    file = base / "model-00001-of-00002.safetensors"
    data = file.read_bytes()
    [length] = struct.unpack("<Q", data[:8])
    header = as_json(rng, json.loads(data[8 : 8 + length]))
    stated = rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(header) - 1]) if rng.random() < 0.15 else len(header)
    content = struct.pack("<Q", stated % 2**64) + header + data[8 + length :]
    if rng.random() < 0.1:
        content = content[: rng.randrange(len(content))]
    if rng.random() < 0.2:
        return Case("", safetensors_file(header, data=data[8 + length :]))
    return Case("", {f"checkpoint/{file.name}": content})


def json_of(name: str) -> Callable[[Random, Path], Case]:
    def make(rng: Random, base: Path) -> Case:
        arguments = FOR_FILE.get(name, ())
        return Case("", {f"checkpoint/{name}": as_json(rng, json.loads((base / name).read_text()))}, arguments)

    return make


def chat_template(rng: Random, base: Path) -> Case:
    tree = json.loads((base / "tokenizer_config.json").read_text())
    template = damaged(rng, tree["chat_template"].encode()).decode("utf-8", "replace")
    if rng.random() < 0.3:
        return Case("", {"checkpoint/chat_template.jinja": template.encode()}, CHAT)
    return Case("", {"checkpoint/tokenizer_config.json": json.dumps(tree | {"chat_template": template}).encode()}, CHAT)


def prompts(rng: Random, base: Path) -> Case:
    if rng.random() < 0.5:
        return Case("", {"prompts.json": as_json(rng, [*json.loads(PROMPTS), rng.choice(TEXTS), "three"])})
    record = {"text": rng.choice(TEXTS), "other": value(rng)}
    data = b"\n".join([b'{"text": "a"}', as_json(rng, record), b'{"text": "b"}'])
    return Case("", {"p.jsonl": data}, (*JSONL, *sets("data_config.prompt_template='{text}'")[: rng.choice([0, 2])]))


def longbench(rng: Random, base: Path) -> Case:
    record = {"context": "some text", "input": "why?", "answers": ["a"], "length": 3}
    data = b"\n".join([json.dumps(record).encode(), as_json(rng, record)])
    task = rng.choice(["gov_report"] * 5 + TEXTS)
    arguments = (*LONGBENCH, *sets(f"data_config.longbench_task={as_yaml(task)}"))
    if rng.random() < 0.3:
        return Case("", {"bench/data/gov_report.jsonl": data}, arguments)
    archive = zipped(data)
    return Case("", {"bench/data.zip": damaged(rng, archive) if rng.random() < 0.7 else archive}, arguments)


FAMILIES: dict[str, tuple[int, Callable[[Random, Path], Case]]] = {
    "YAML values": (160, yaml_values),
    "YAML structure": (100, yaml_structure),
    "--set": (140, override),
    "config.json": (140, config),
    "safetensors": (90, safetensors),
    "index": (50, json_of("model.safetensors.index.json")),
    "tokenizer.json": (50, json_of("tokenizer.json")),
    "tokenizer_config.json": (50, json_of("tokenizer_config.json")),
    "generation_config.json": (50, json_of("generation_config.json")),
    "chat template": (40, chat_template),
    "prompts": (70, prompts),
    "LongBench": (60, longbench),
}


def generated_cases(seed: int, base: Path) -> list[Case]:
    """Cases of all families. base: the valid checkpoint to modify."""
    cases = []
    for family, (count, make) in FAMILIES.items():
        for number in range(count):
            case = make(random.Random(f"{seed} {family} {number}"), base)
            cases.append(Case(f"{family} {number}", case.files, case.arguments, case.yaml))
    return cases
