# SPDX-License-Identifier: Apache-2.0
"""Validation of a request against model, tokenizer and KV cache, before it is queued."""

import logging
from dataclasses import dataclass

from transformers import Qwen3MoeConfig

from executor.loading.tokenizer import Tokenizer
from executor.sampling_params import SamplingParams
from models.qwen3_moe.architecture import attention_limit, trained_len
from ops.step import BLOCK_SIZE, blocks_for

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """Limits that a request must keep."""

    config: Qwen3MoeConfig
    tokenizer: Tokenizer
    max_len: int  # of a sequence, in tokens
    num_blocks: int  # of the cache of one attention DP group

    def check(self, token_ids: list[int], sampling: SamplingParams, name: str) -> None:
        """Validates token ids and sampling parameters. name: the prompt in errors. ValueError."""
        vocab_size = self.config.vocab_size
        whole_numbers = all(type(token_id) is int for token_id in token_ids)
        if not token_ids or not whole_numbers or min(token_ids) < 0 or max(token_ids) >= vocab_size:
            raise ValueError(f"{name}: token ids must be at least one, each from 0 to {vocab_size - 1}")
        if (sampling.stop or sampling.bad_words) and not self.tokenizer.can_decode:
            key = "stop" if sampling.stop else "bad_words"
            raise ValueError(f"{key}: this checkpoint has no tokenizer, so that no text can be searched for it")
        for key in ("logprobs", "prompt_logprobs"):
            if (getattr(sampling, key) or 0) > vocab_size:
                raise ValueError(f"{key}: {getattr(sampling, key)} is more than the {vocab_size} tokens of the model")
        for key in ("logit_bias", "stop_token_ids"):
            other = [token_id for token_id in getattr(sampling, key) or () if not 0 <= token_id < vocab_size]
            if other:
                raise ValueError(f"{key}: token id {other[0]} is not one of the model, from 0 to {vocab_size - 1}")
        self.check_length(len(token_ids), sampling.max_new_tokens, name)

    def check_length(self, prompt_len: int, new_tokens: int, name: str) -> None:
        """Validates the length of a sequence; a warning beyond the positions that the model was trained on."""
        lengths, longest = f"{name} of {prompt_len} tokens and {new_tokens} new ones", prompt_len + new_tokens - 1
        if longest > self.max_len:
            limit = attention_limit(self.config)
            remedy = "raise data_config.input_max_len or data_config.max_new_tokens"
            if limit is not None and limit[0] == self.max_len:
                remedy = f"config.json's {limit[1]} is not supported beyond it"
            raise ValueError(f"{lengths} is more than {self.max_len}: {remedy}")
        if blocks_for(longest) > self.num_blocks:
            raise ValueError(
                f"{lengths} needs more than the cache's {self.num_blocks * BLOCK_SIZE} tokens: shorten it, or "
                "raise model_config.cache_tokens or model_config.cache_memory_fraction"
            )
        if longest > trained_len(self.config):
            logger.warning("%s go beyond the %d positions of the checkpoint", lengths, trained_len(self.config))
