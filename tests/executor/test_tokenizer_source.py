# SPDX-License-Identifier: Apache-2.0
"""Keys of config.json that the network ignores do not reach the tokenizer."""

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from executor.loading.tokenizer import Tokenizer, load_tokenizer
from tests.conversations import DEMO


def with_config(folder: Path, **changed: Any) -> Path:
    for file in DEMO.glob("*.json"):
        shutil.copy(file, folder)
    config = json.loads((DEMO / "config.json").read_text()) | changed
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "changed",
    [
        {"num_labels": 10**7},
        {"problem_type": "none"},
        {"id2label": {"a": 1}},
        {"id2label": {"0": "a"}, "num_labels": 3},
        {"dtype": [1]},
        {"tokenizer_class": 3},
        {"tokenizer_class": ["a"]},
    ],
)
def test_ignored_keys_are_ignored(changed: dict[str, Any], tmp_path: Path) -> None:
    started_s = time.process_time()
    tokenizer = Tokenizer(with_config(tmp_path, **changed), 4080, "cut", False)
    assert time.process_time() - started_s < 3
    assert tokenizer.encode("Good morrow, é 東京") == Tokenizer(DEMO, 4080, "cut", False).encode("Good morrow, é 東京")


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", None])
def test_class_is_the_one_that_transformers_selects(name: str | None, tmp_path: Path) -> None:
    folder = with_config(tmp_path)
    stated = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**stated, "tokenizer_class": name}))
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert type(ours) is type(theirs) and ours.chat_template == theirs.chat_template
    assert ours.get_vocab() == theirs.get_vocab() and ours.special_tokens_map == theirs.special_tokens_map
    text = f"{random.random()} é 東京 🎭 <|im_end|>\n\n\ttwo  words"
    assert ours.encode(text) == theirs.encode(text)


def test_class_of_a_tokenizer_is_found_in_config_json_too(tmp_path: Path) -> None:
    folder = with_config(tmp_path, tokenizer_class="GPT2Tokenizer")
    stated = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**stated, "tokenizer_class": None}))
    assert type(load_tokenizer(folder)).__name__ == "GPT2Tokenizer"
