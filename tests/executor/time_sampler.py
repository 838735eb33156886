# SPDX-License-Identifier: Apache-2.0
"""Times sampling of a batch whose rows have the same or different settings.

python -m tests.executor.time_sampler [--device cuda] [--rows 64] [--vocab 151936]
"""

import argparse
import time
from collections.abc import Callable

import torch

from executor import SamplingParams
from executor.engine.sampler import Sampler, make_random
from models.layers.lm_head import ShardedLogits
from ops.comm import SINGLE
from tests.executor.sampling_rows import Row

# Mixtures of settings, each compared with the first of its settings, which needs what the others need, in all rows.
MIXTURES = {
    "greedy": [{}, {"max_new_tokens": 5}],
    "temperature": [{"temperature": 0.7}, {"temperature": 1.3}, {"temperature": 1.0, "min_p": 0.1}, {}],
    "top_k": [
        {"temperature": 0.7, "top_k": 20, "top_p": 0.95},
        {"temperature": 1.3, "top_k": 40},
        {"temperature": 1.0, "top_k": 5, "min_p": 0.1},
        {},
    ],
    "top_p": [
        {"temperature": 0.7, "top_p": 0.95},
        {"temperature": 1.3, "top_p": 0.5, "min_p": 0.05},
        {"temperature": 1.0, "top_k": 20},
        {"temperature": 1.0},
        {},
    ],
    "penalties": [
        {
            **{"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05, "presence_penalty": 0.1},
            **{"logit_bias": {7: 2.0}, "min_tokens": 2},
        },
        {"presence_penalty": 0.5},
        {"repetition_penalty": 1.1, "frequency_penalty": 0.2},
        {"logit_bias": {7: 2.0}, "min_tokens": 2},
        {},
    ],
    "logprobs": [{"logprobs": 5, "temperature": 0.7, "top_k": 20}, {"logprobs": 0}, {"logprobs": 5}, {}],
}


def make_rows(settings: list[dict], count: int) -> list[Row]:
    samplings = [SamplingParams(**settings[i % len(settings)], seed=i) for i in range(count)]
    return [Row(sampling, list(range(1000)), [5], random=make_random(sampling)) for sampling in samplings]


def time_ms(step: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Median time of a step."""
    times_ms = []
    for _ in range(repeats):
        synchronize(device)
        start_s = time.perf_counter()
        step()
        synchronize(device)
        times_ms.append((time.perf_counter() - start_s) * 1e3)
    return sorted(times_ms)[len(times_ms) // 2]


def synchronize(device: torch.device) -> None:
    torch.get_device_module(device).synchronize()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    logits = torch.randn(arguments.rows, arguments.vocab, device=device) * 3
    for name, settings in MIXTURES.items():
        found = []
        for chosen in (settings[:1], settings):
            rows = make_rows(chosen, arguments.rows)
            sampler = Sampler(frozenset([3]))
            own = logits.clone()

            def step(rows: list[Row] = rows, sampler: Sampler = sampler, own: torch.Tensor = own) -> None:
                sampler.sample(ShardedLogits(own, SINGLE["lmhead_tp"], 0, len(rows)), rows)
                for row in rows:
                    row.token_ids.append(9)

            step()
            found.append(time_ms(step, device, arguments.repeats))
        print(f"{name:12} one setting {found[0]:8.3f} ms, mixed {found[1]:8.3f} ms, ratio {found[1] / found[0]:.2f}")


if __name__ == "__main__":
    main()
