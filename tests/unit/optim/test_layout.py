"""Sums and factors of whole parameters on flat tensors."""

from __future__ import annotations

import pytest
import torch

from dstrain.optim.layout import multiply, parameters_in, sums_of_squares
from tests.support.layouts import flattened


def parts() -> list[torch.Tensor]:
    return [torch.arange(6.0).view(2, 3), torch.full((4,), 2.0), torch.tensor([7.0])]


def test_sums_of_squares_are_those_of_the_parameters_and_padding_counts_for_nothing() -> None:
    flat, layout = flattened(parts(), padding=3)
    assert sums_of_squares([flat.detach()], [flat], layout).tolist() == pytest.approx([55.0, 16.0, 49.0])
    assert parameters_in([flat], layout) == (0, 1, 2)


def test_every_element_is_multiplied_by_its_parameters_factor() -> None:
    flat, layout = flattened(parts(), padding=3)
    values = torch.ones_like(flat).detach()
    multiply([values], [flat], torch.tensor([2.0, 3.0, 5.0]), layout)
    assert values[:11].tolist() == [2.0] * 6 + [3.0] * 4 + [5.0]
