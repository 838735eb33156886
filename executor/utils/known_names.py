# SPDX-License-Identifier: Apache-2.0
"""Hints for unknown keys and values: settings of vLLM, SGLang and transformers, and their counterparts here."""

LENGTH = "data_config.input_max_len limits the prompt and data_config.max_new_tokens the generated tokens"
NEW_TOKENS = "did you mean data_config.max_new_tokens?"
ATTENTION_AND_EXPERTS = (
    "parallel_config.attn_tp_size splits attention and parallel_config.moe_tp_size the experts, over world_size ranks"
)
CACHE_SHARE = "did you mean model_config.cache_memory_fraction?"
NO_PIPELINE = "there is no pipeline parallelism; parallel_config splits attention and experts"
NO_QUANTIZATION = "there is no such setting: the number format of the weights is that of the checkpoint"
NO_REMOTE_CODE = "there is no such setting: code in a checkpoint is never run"
NO_REVISION = "there is no such setting: model_path is a folder on this machine"
DTYPE = "did you mean model_config.dtype?"
DEVICE = "did you mean device? Each rank uses the visible device with its local rank"
EAGER = 'set exe_mode: "eager" or "graph"'
SAMPLES = "only from Python: SamplingParams.n"
ALLOWED = "only from Python: SamplingParams.mask, a function that returns the allowed tokens"
NO_BEAMS = "there is no beam search, only greedy decoding and sampling"
NO_SAMPLE = "temperature 0 is greedy, above 0 samples"
ONLY_FROM_PYTHON = (
    *("n", "logprobs", "prompt_logprobs", "presence_penalty", "frequency_penalty"),
    *("logit_bias", "min_tokens", "stop_token_ids", "bad_words"),
)

HINTS = {
    "model": "did you mean model_path?",
    "model_id": "did you mean model_path?",
    "pretrained_model_name_or_path": "did you mean model_path?",
    "tokenizer": "there is no such setting: the tokenizer is the one in the folder model_path",
    "tokenizer_path": "there is no such setting: the tokenizer is the one in the folder model_path",
    "tokenizer_mode": "there is no such setting: the tokenizer is the one in the folder model_path",
    "max_model_len": LENGTH,
    "max_seq_len": LENGTH,
    "max_seq_length": LENGTH,
    "context_length": LENGTH,
    "max_length": LENGTH,
    "max_prompt_len": "did you mean data_config.input_max_len?",
    "max_tokens": NEW_TOKENS,
    "max_completion_tokens": NEW_TOKENS,
    "max_output_tokens": NEW_TOKENS,
    "truncation": "set data_config.long_prompt: cut or refuse",
    "truncate_prompt_tokens": "set data_config.input_max_len and data_config.long_prompt",
    "tensor_parallel_size": ATTENTION_AND_EXPERTS,
    "tp_size": ATTENTION_AND_EXPERTS,
    "tp": ATTENTION_AND_EXPERTS,
    "data_parallel_size": "it is derived: parallel_config.attn_dp_size is world_size / attn_tp_size",
    "dp_size": "it is derived: parallel_config.attn_dp_size is world_size / attn_tp_size",
    "enable_expert_parallel": "it is derived: parallel_config.moe_ep_size is world_size / moe_tp_size",
    "expert_parallel_size": "it is derived: parallel_config.moe_ep_size is world_size / moe_tp_size",
    "ep_size": "it is derived: parallel_config.moe_ep_size is world_size / moe_tp_size",
    "pipeline_parallel_size": NO_PIPELINE,
    "pp_size": NO_PIPELINE,
    "num_gpus": "did you mean world_size?",
    "gpu_memory_utilization": CACHE_SHARE,
    "mem_fraction_static": CACHE_SHARE,
    "cache_fraction": CACHE_SHARE,
    "num_gpu_blocks_override": "did you mean model_config.cache_tokens?",
    "max_total_tokens": "did you mean model_config.cache_tokens?",
    "kv_cache_dtype": "there is no such setting: the cache has model_config.dtype",
    "block_size": "there is no such setting: a cache block holds 128 tokens",
    "max_num_seqs": "did you mean data_config.batch_size?",
    "max_running_requests": "did you mean data_config.batch_size?",
    "max_batch_size": "did you mean data_config.batch_size?",
    "torch_dtype": DTYPE,
    "precision": DTYPE,
    "quantization": NO_QUANTIZATION,
    "quantization_config": NO_QUANTIZATION,
    "load_in_8bit": NO_QUANTIZATION,
    "load_in_4bit": NO_QUANTIZATION,
    "device_map": DEVICE,
    "devices": DEVICE,
    "enforce_eager": EAGER,
    "use_cuda_graph": EAGER,
    "disable_cuda_graph": EAGER,
    "trust_remote_code": NO_REMOTE_CODE,
    "revision": NO_REVISION,
    "download_dir": NO_REVISION,
    "attn_implementation": "there is no such setting: the device's backend selects the attention kernel",
    "load_format": "model_config.with_ckpt: False means random weights; checkpoints are safetensors files",
    "rope_parameters": "did you mean model_config.rope_scaling?",
    "hf_overrides": "only rotary parameters can be replaced, by model_config.rope_scaling",
    "generation_config": "data_config.sampling_from_checkpoint: True uses generation_config.json",
    **{name: f"only from Python: SamplingParams.{name}" for name in ONLY_FROM_PYTHON},
    "best_of": SAMPLES,
    "num_return_sequences": SAMPLES,
    "top_logprobs": "only from Python: SamplingParams.logprobs",
    "min_new_tokens": "only from Python: SamplingParams.min_tokens",
    "min_length": "only from Python: SamplingParams.min_tokens",
    "sequence_bias": "only from Python: SamplingParams.logit_bias",
    "bad_words_ids": "only from Python: SamplingParams.bad_words",
    "allowed_token_ids": ALLOWED,
    "logits_processors": ALLOWED,
    "prefix_allowed_tokens_fn": ALLOWED,
    "num_beams": NO_BEAMS,
    "use_beam_search": NO_BEAMS,
    "do_sample": NO_SAMPLE,
    "stop_strings": "did you mean data_config.stop?",
    "eos_token_id": "end tokens are those of the checkpoint; from Python, SamplingParams.stop_token_ids adds others",
    "random_seed": "did you mean data_config.seed?",
    "prompts": "did you mean data_config.dataset_path?",
    "log_file": "logs are in the result folder of each run, below output_dir",
}

VALUES = {  # other names of devices and dtypes -> the names here
    "gpu": "cuda",
    "ascend": "npu",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
}


def hint(key: str) -> str | None:
    """Hint for another engine's setting `key`: its counterpart here, or that there is none; None if unknown."""
    return HINTS.get(key.lower().replace("-", "_"))


def known_value(value: str) -> str | None:
    """Name in these settings of a device or dtype that other engines call `value`; None if unknown."""
    return VALUES.get(value.lower().rpartition(":")[2].removeprefix("torch."))
