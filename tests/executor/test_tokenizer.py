# SPDX-License-Identifier: Apache-2.0
"""Encoding, truncation, decoding, end tokens, and invalid tokenizer files."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

import executor.loading.tokenizer
from executor import LLM, SamplingParams
from executor.config import REPOSITORY, DataSettings
from executor.loading.before_loading import default_sampling
from executor.loading.tokenizer import Tokenizer, eos_token_ids, load_tokenizer
from tests.checkpoints import make_checkpoint

DEMO = REPOSITORY / "models/qwen3_moe/demo"
TEXTS = [
    "To be, or not to be, that is the question. " * 40,
    "é “quoted” 東京の天気は晴れです 🎭 naïve\n\n\tindented  text " * 12,
    "🎭" * 60,
    " \n" * 50 + "x" * 300,
]


@pytest.fixture(scope="module")
def demo_tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


def make_tokenizer(input_max_len: int = 4080, long_prompt: str = "cut", enable_thinking: bool = False) -> Tokenizer:
    return Tokenizer(DEMO, input_max_len, long_prompt, enable_thinking)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("limit", [16, 17, 33, 100])
def test_long_prompt_is_cut_in_the_middle(limit, text, demo_tokenizer, caplog):
    full = demo_tokenizer.encode(text)
    cut = make_tokenizer(limit).encode(text, "prompt 3 of 4")
    assert limit // 2 < len(cut) <= limit < len(full)
    kept = demo_tokenizer.decode(cut)
    splits = [i for i in range(1, len(kept)) if text.startswith(kept[:i]) and text.endswith(kept[i:])]
    assert splits, kept  # the beginning and the end of the text, in whole characters
    assert f"prompt 3 of 4 of {len(full)} tokens was cut in the middle to {len(cut)}" in caplog.text


def test_cut_keeps_halves_of_equal_size(demo_tokenizer):
    words = " ".join(random.choices(["thou", "art", "king", "speak", "night"], k=500))
    full = demo_tokenizer.encode(words)
    cut = make_tokenizer(101).encode(words)
    assert cut == full[:51] + full[-50:]


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5])
def test_tiny_limits(limit):
    for text in TEXTS:
        try:
            assert 0 < len(make_tokenizer(limit).encode(text)) <= limit
        except ValueError as error:
            assert "data_config.input_max_len" in str(error)


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("long_prompt", ["cut", "refuse"])
def test_limit_is_inclusive(extra, long_prompt, demo_tokenizer, caplog):
    full = demo_tokenizer.encode(TEXTS[0])
    tokenizer = make_tokenizer(len(full) - extra, long_prompt)
    if extra and long_prompt == "refuse":
        with pytest.raises(ValueError, match=f"{len(full)} tokens, data_config.input_max_len is {len(full) - 1} "):
            tokenizer.encode(TEXTS[0])
    else:
        assert (tokenizer.encode(TEXTS[0]) == full) == (not extra)
    assert ("was cut" in caplog.text) == (extra == 1 and long_prompt == "cut")


@pytest.mark.parametrize("unit", ["thou art ", "x", "東京"])
def test_prompt_that_is_far_too_long_is_refused_by_its_beginning(unit, monkeypatch):
    tokenizer, encoded = make_tokenizer(100, "refuse"), []
    encode = tokenizer.tokenizer.encode
    monkeypatch.setattr(
        tokenizer.tokenizer, "encode", lambda text, **how: encoded.append(len(text)) or encode(text, **how)
    )
    with pytest.raises(ValueError, match=r"^prompt 2 of 3 has more than \d+ tokens, data_config.input_max_len is 100 "):
        tokenizer.encode(unit * 10**6, "prompt 2 of 3")
    assert encoded == [1600]
    with pytest.raises(ValueError, match="^the prompt has more than "):
        tokenizer.encode_chat([{"role": "user", "content": unit * 10**5}])


def test_few_tokens_of_many_characters_are_not_refused(monkeypatch):
    monkeypatch.setattr(executor.loading.tokenizer, "PROBED", 4)
    spaces = " " * 10**4 + "a"
    limit = len(make_tokenizer(10**6).encode(spaces))
    assert len(make_tokenizer(limit, "refuse").encode(spaces)) == limit and len(spaces) > 4 * limit


def test_empty_prompt():
    with pytest.raises(ValueError, match="^the prompt is empty: it has no tokens$"):
        make_tokenizer().encode("")


def test_decode_skips_special_and_out_of_vocabulary_tokens(demo_tokenizer):
    token_ids = demo_tokenizer.encode("Good morrow<|im_end|>, é 🎭") + [len(demo_tokenizer), len(demo_tokenizer) + 7]
    assert make_tokenizer().decode(token_ids) == "Good morrow, é 🎭"


def test_decode_of_out_of_vocabulary_ids():
    assert make_tokenizer().decode([-1, 10**30, 2**32]) == ""


@pytest.mark.parametrize(
    ("text", "place"), [("\ud83d", 1), ("a\ude00b", 2), ("ok " * 300 + "\udfff", 901), ("\ud83d🎭", 1), ("🎭\ude00", 2)]
)
def test_lone_surrogates_are_rejected(text, place):
    half = ascii(text[place - 1]).replace("\\", r"\\")
    with pytest.raises(ValueError, match=f"^prompt 2 of 3: character {place} is {half}, half of a surrogate pair"):
        make_tokenizer(16).encode(text, "prompt 2 of 3")


# End tokens


def transformers_eos(folder: Path) -> set[int]:
    """End tokens of transformers: from_pretrained's generation config."""
    own = (folder / "generation_config.json").exists()
    source = {} if own else {"config_file_name": "config.json", "_from_model_config": True}
    found = GenerationConfig.from_pretrained(folder, **source).eos_token_id
    return set() if found is None else {found} if isinstance(found, int) else set(found)


@pytest.mark.parametrize("generation", [None, {}, {"eos_token_id": None}, {"eos_token_id": 7}, {"eos_token_id": [8]}])
@pytest.mark.parametrize("config", [{}, {"eos_token_id": None}, {"eos_token_id": 5}, {"eos_token_id": [5, 6]}])
def test_end_tokens_equal_transformers(config, generation, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert eos_token_ids(tmp_path, None) == transformers_eos(tmp_path)
    assert eos_token_ids(tmp_path, load_tokenizer(DEMO)) == transformers_eos(tmp_path) | {2045}


def test_generation_ends_as_in_transformers(tmp_path):
    model = make_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    [free] = LLM(tmp_path, device="cpu", dtype="float32").generate([[1, 2, 3]], SamplingParams(max_new_tokens=20))
    eos = free.token_ids[5]
    config = json.loads((tmp_path / "config.json").read_text()) | {"eos_token_id": [eos, 210]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    [output] = LLM(tmp_path, device="cpu", dtype="float32").generate([[1, 2, 3]], SamplingParams(max_new_tokens=20))
    expected = free.token_ids[: free.token_ids.index(eos) + 1]
    assert output.token_ids == expected and output.finish_reason == "stop"
    theirs = type(model).from_pretrained(tmp_path)
    inputs = theirs.dummy_inputs["input_ids"].new_tensor([[1, 2, 3]])
    generated = theirs.generate(inputs, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert generated[0, 3:].tolist() == expected


def test_null_among_end_tokens_is_none(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, null]}')
    assert eos_token_ids(tmp_path, None) == {1}


@pytest.mark.parametrize("value", [True, 5.0, "5", [[5]], {"a": 1}, [1.5], ["x" * 10**6]])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_invalid_end_tokens(name, value, tmp_path):
    (tmp_path / name).write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError) as raised:
        eos_token_ids(tmp_path, None)
    line = str(raised.value)
    assert line.startswith(f"{tmp_path / name}: eos_token_id: expected whole numbers, got ") and len(line) < 500


@pytest.mark.parametrize("value", [-1, 10**6, 10**300])
def test_out_of_vocabulary_end_tokens_are_ignored(value, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [value, 3]}))
    assert eos_token_ids(tmp_path, None) == {value, 3}


# Sampling defaults of the checkpoint


def sampling(folder: Path) -> SamplingParams:
    return default_sampling(DataSettings(sampling_from_checkpoint=True), folder)


def test_sampling_in_config_json(tmp_path):
    stated = {"do_sample": True, "temperature": 0.7, "top_k": 4, "top_p": 0.9, "repetition_penalty": 1.1}
    (tmp_path / "config.json").write_text(json.dumps(stated | {"min_p": None}))
    stated.pop("do_sample")
    assert sampling(tmp_path) == SamplingParams(**stated)
    (tmp_path / "generation_config.json").write_text("{}")  # as in transformers, config.json is then ignored
    assert sampling(tmp_path) == SamplingParams()


@pytest.mark.parametrize(
    ("key", "value"),
    [("do_sample", "false"), ("do_sample", 1), ("temperature", "hot"), ("top_k", 2.5), ("top_p", 7), ("min_p", -1)]
    + [("repetition_penalty", 10**400), ("top_k", 10**400), ("temperature", float("nan")), ("top_p", ["x" * 10**5])],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_invalid_sampling_in_the_checkpoint(name, key, value, tmp_path):
    (tmp_path / name).write_text(json.dumps({"do_sample": True, "temperature": 0.5, key: value}))
    with pytest.raises(ValueError) as raised:
        sampling(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path / name}: {key}: ") and len(str(raised.value)) < 500


# Invalid files

STEMS = ("tokenizer", "tokenizer_config", "added_tokens", "special_tokens_map")


def deep(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


@pytest.fixture
def folder(tmp_path) -> Path:
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b'"a"', b"\xff\xfe", b"\x00", deep(10**5), b"9" * 10**4, b'{"model": {"type": 3}}'],
)
def test_invalid_tokenizer_files(name, content, folder):
    (folder / name).write_bytes(content)
    if name == "tokenizer_config.json" and content.startswith(b'{"model"'):
        assert load_tokenizer(folder).chat_template is None  # an ignored key
        return
    with pytest.raises(ValueError) as raised:
        load_tokenizer(folder)
    line = str(raised.value)
    assert str(folder) in line and len(line) < 500 and "\n" not in line


@pytest.mark.parametrize("name", [f"{stem}.json" for stem in STEMS] + ["chat_template.jinja"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling", "not UTF-8"])
def test_tokenizer_paths_that_are_not_files(kind, name, folder):
    file = folder / name
    file.unlink(missing_ok=True)
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "dangling":
        file.symlink_to(folder / "none")
    else:
        file.write_bytes(b"{\xff}")
    with pytest.raises(ValueError, match=f"^{file}: cannot be read: "):
        Tokenizer(folder, 100, "cut", False)


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_class": 5},
        {"tokenizer_class": "Nobody", "auto_map": {"AutoTokenizer": ["nobody.Nobody", None]}},
        {"added_tokens_decoder": {"x": 3}},
        {"added_tokens_decoder": {"2043": {"content": 5}}},
        {"eos_token": 7},
        {"eos_token": ["a"]},
        {"chat_template": [{"name": "a"}]},
    ],
)
def test_tokenizer_config_of_wrong_types(change, folder):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError) as raised:
        load_tokenizer(folder)
    line = str(raised.value)
    assert str(folder) in line and len(line) < 500 and "\n" not in line


def test_code_in_a_checkpoint_is_never_run(folder, monkeypatch):
    """transformers would prompt on the terminal for permission."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Own: pass\n")
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError):
        load_tokenizer(folder)
    assert not (folder / "ran").exists()
