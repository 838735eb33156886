# SPDX-License-Identifier: Apache-2.0
"""Runs the float model on a calibration text, layer by layer, and searches the channel scales of each layer.

Shape letters as in models/qwen3_moe/model.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from tqdm import tqdm

from executor.engine.kv_cache import cache_tensors
from executor.loading.loader import load_parameters
from executor.quantize.plan import Plan
from executor.quantize.recipe import Recipe
from executor.quantize.scales import LayerScales
from executor.quantize.search import Found, FoundExperts, InputStatistics, search_experts, search_linear
from executor.quantize.shards import synced
from executor.utils.text import one_line
from models.layers.expert_exchange import GatherExchange
from models.layers.mlp import DenseMlp, SparseMoe
from models.layers.parameter import ParameterSpec
from models.layers.rotary import RotaryEmbedding
from models.qwen3_moe.architecture import trained_len
from models.qwen3_moe.model import Building, DecoderLayer
from models.qwen3_moe.sharding import Layout
from models.qwen3_moe.weights import EMBEDDING, parameter_specs
from ops import DenseWeight, GroupedRows, RouterLogits, Routing, Weight
from ops.comm import ParallelContext
from ops.reference import ReferenceOps
from ops.step import Span, blocks_for, step_inputs

WINDOW = 512  # tokens of a sequence
MAX_TOKENS = 128 * WINDOW  # of the text: the activations of all are kept


class Recorder(ReferenceOps):
    """Reference operations that gather statistics of the inputs of linear layers, and keep those of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics: dict[int, InputStatistics] = {}  # by id of the weight
        self.rows: list[torch.Tensor] = []  # [T, D] each
        self.routing: list[Routing] = []

    def linear(self, hidden_states: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        if id(weight) not in self.statistics:
            self.statistics[id(weight)] = InputStatistics(weight.shape[-1], hidden_states.device)
        self.statistics[id(weight)].add(hidden_states)
        return super().linear(hidden_states, weight, bias)

    def experts(
        self, hidden_states: torch.Tensor, routing: Routing | RouterLogits | GroupedRows, gate_up: Weight, down: Weight
    ) -> torch.Tensor:
        assert not isinstance(routing, GroupedRows)
        self.rows.append(hidden_states)
        self.routing.append(routing.chosen())
        return super().experts(hidden_states, routing, gate_up, down)

    def of(self, weight: Weight) -> InputStatistics:
        return self.statistics[id(weight)]


@dataclass(frozen=True)
class Calibration:
    """Token ids of the calibration text, and the device that runs the model."""

    token_ids: list[int]
    device: torch.device

    def windows(self, length: int) -> list[list[int]]:
        """Sequences of at most `length` tokens."""
        return [self.token_ids[start : start + length] for start in range(0, len(self.token_ids), length)]


@torch.inference_mode()
def calibrate(plan: Plan, calibration: Calibration, folder: Path) -> None:
    """Searches the scales of all layers that have no file in `folder` yet, and writes them there.

    Memory: a layer in float32 and the activations of all tokens between two layers.
    """
    layers = range(plan.config.num_hidden_layers)
    missing = [layer for layer in layers if not scales_file(folder, layer).exists()]
    if not missing:
        return
    windows = calibration.windows(min(WINDOW, trained_len(plan.config)))
    hidden = list(embedded(plan, windows, calibration.device))
    rotary = RotaryEmbedding(plan.config, WINDOW, calibration.device)
    with tqdm(total=len(layers), desc="calibrating layers") as progress:
        for layer_id in range(missing[-1] + 1):
            recorder = Recorder()
            layer = build_layer(plan, layer_id, recorder, calibration.device)
            hidden = [run_layer(plan, layer, states, rotary, recorder) for states in hidden]
            if layer_id in missing:
                scales = search_layer(plan, layer, recorder)
                with synced(scales_file(folder, layer_id)) as stream:
                    stream.write(save({name: tensor.cpu().clone() for name, tensor in scales.tensors().items()}))
            progress.update()
        progress.update(len(layers) - progress.n)


def scales_file(folder: Path, layer_id: int) -> Path:
    return folder / f"layer_{layer_id}.safetensors"


def read_scales(folder: Path, layer_id: int) -> LayerScales:
    return LayerScales(**load_file(scales_file(folder, layer_id)))


def embedded(plan: Plan, windows: list[list[int]], device: torch.device) -> Iterator[torch.Tensor]:
    """Hidden states [T, D] float32 of each window before the first layer."""
    specs = [spec for spec in parameter_specs(plan.config, Layout()) if spec.sources[0].name == EMBEDDING]
    dtype = next(job.dtype for job in plan.jobs if job.name == EMBEDDING)
    table = load_parameters(plan.stored, specs, dtype, torch.device("cpu"), quiet=True)[specs[0].name]
    assert isinstance(table, torch.Tensor)
    check_finite(plan, specs[0], table)
    for token_ids in windows:
        yield table[torch.tensor(token_ids)].to(device, torch.float32)


def build_layer(plan: Plan, layer_id: int, recorder: Recorder, device: torch.device) -> DecoderLayer:
    """Loads a layer in float32."""
    prefix = f"layers.{layer_id}."
    specs = [spec for spec in parameter_specs(plan.config, Layout()) if spec.name.startswith(prefix)]
    parameters = load_parameters(plan.stored, specs, torch.float32, device, quiet=True)
    for spec in specs:
        check_finite(plan, spec, parameters[spec.name])
    parallel = ParallelContext()
    exchange = GatherExchange(parallel, plan.config.num_experts)
    build = Building(
        config=plan.config, ops=recorder, parallel=parallel, decode_exchange=exchange, prefill_exchange=exchange
    )
    return DecoderLayer(build, layer_id, parameters.within(f"layers.{layer_id}"))


def check_finite(plan: Plan, spec: ParameterSpec, value: torch.Tensor | Weight) -> None:
    """Raises ValueError that names a tensor of the checkpoint with values that are not finite."""
    data = value if isinstance(value, torch.Tensor) else dense(value)
    if not data.isfinite().all():
        name = next(source.name for source in spec.sources if not data[source.region].isfinite().all())
        raise ValueError(one_line(f"{plan.model_path}: {name} has values that are not finite"))


def run_layer(
    plan: Plan, layer: DecoderLayer, hidden_states: torch.Tensor, rotary: RotaryEmbedding, recorder: Recorder
) -> torch.Tensor:
    """Hidden states [T, D] of one window after a layer."""
    count, device = hidden_states.shape[0], hidden_states.device
    span = Span(0, count, list(range(1, 1 + blocks_for(count))), count)
    _, step = step_inputs([span], [[]], device)
    cos_sin, step = recorder.prepare_attention(rotary(step), step, torch.float32)
    sizes = (1, blocks_for(count), plan.config.num_key_value_heads, plan.config.head_dim)
    cache = cache_tensors(*sizes, torch.float32, device, recorder)[0]
    output, residual = layer(hidden_states, None, cos_sin, cache, step)
    return output + residual


def search_layer(plan: Plan, layer: DecoderLayer, recorder: Recorder) -> LayerScales:
    """Searches the scales of a layer whose inputs were recorded."""
    config, recipe = plan.config, plan.recipe
    query_rows, kv_rows = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    attention_inputs, output_inputs = recorder.of(layer.qkv_proj.weight), recorder.of(layer.o_proj.weight)
    attention = search_linear(
        recipe, dense(layer.qkv_proj.weight).split([query_rows, kv_rows, kv_rows]), attention_inputs
    )
    output, value = search_output(recipe, dense(layer.o_proj.weight), output_inputs, kv_rows)
    block = search_block(recipe, layer.mlp, recorder)
    return LayerScales(
        attention=attention.scales,
        output=output.scales,
        value=value,
        feed_forward=block.scales,
        down=block.down_scales,
        attention_squares=attention_inputs.mean_squares,
        output_squares=output_inputs.mean_squares,
        feed_forward_squares=block.squares,
        down_squares=block.down_squares,
        errors=torch.stack([attention.errors, output.errors, block.errors, block.down_errors]),
    )


def search_output(
    recipe: Recipe, weight: torch.Tensor, inputs: InputStatistics, kv_rows: int
) -> tuple[Found, torch.Tensor]:
    """Searches the scales of o_proj, which divide the rows of v_proj; returns them for both.

    Ones under grouped-query attention, where several heads share a row of v_proj.
    """
    found = search_linear(recipe, [weight], inputs, only_ones=weight.shape[1] != kv_rows)
    return found, found.scales[:kv_rows]


def search_block(recipe: Recipe, block: SparseMoe | DenseMlp, recorder: Recorder) -> FoundExperts:
    """Searches the scales of a feed-forward block."""
    if isinstance(block, SparseMoe):
        ids = torch.cat([routing.topk_ids for routing in recorder.routing])
        weights = torch.cat([routing.topk_weights for routing in recorder.routing])
        gate_up, down = dense(block.gate_up_proj), dense(block.down_proj)
        return search_experts(recipe, gate_up, down, torch.cat(recorder.rows), ids, weights)
    inputs, down_inputs = recorder.of(block.gate_up_proj.weight), recorder.of(block.down_proj.weight)
    found = search_linear(recipe, dense(block.gate_up_proj.weight).chunk(2), inputs)
    down_found = search_linear(recipe, [dense(block.down_proj.weight)], down_inputs)
    return FoundExperts(
        scales=found.scales,
        squares=inputs.mean_squares[None],
        errors=found.errors,
        down_scales=down_found.scales[None],
        down_squares=down_inputs.mean_squares[None],
        down_errors=down_found.errors,
    )


def dense(weight: Weight) -> torch.Tensor:
    assert isinstance(weight, DenseWeight)
    return weight.data
