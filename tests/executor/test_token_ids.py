# SPDX-License-Identifier: Apache-2.0
"""Token ids that cannot be read, or are too many to be meant."""

from typing import Any

import pytest
import torch

from executor.loading.prompts import MAX_TOKEN_IDS, prompt_list, token_id_list


@pytest.mark.parametrize("count", [MAX_TOKEN_IDS + 1, 10**12, 10**30])
def test_too_many_are_refused_at_once(count: int) -> None:
    for prompts in (range(count), [range(count)], (range(3), range(count))):
        with pytest.raises(ValueError, match=f"more than {MAX_TOKEN_IDS} token ids"):
            prompt_list(prompts)
    with pytest.raises(ValueError, match="^token_ids: more than"):
        token_id_list(range(count))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(3, dtype=torch.int64, device="meta"),
        torch.empty(2, 3, dtype=torch.int64, device="meta"),
        torch.tensor([1, 2]).to_sparse(),
        torch.tensor([[1, 2], [0, 4]]).to_sparse(),
    ],
)
def test_tensors_without_numbers_are_a_type_error(tensor: Any) -> None:
    for prompts in (tensor, [tensor], [[tensor]]):
        with pytest.raises(TypeError, match="expected a text, token ids") as raised:
            prompt_list(prompts)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 400
