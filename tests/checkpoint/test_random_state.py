"""The global random generators carried over a restart."""

import random

import numpy as np
import torch

from tim.checkpoint import random_states, seed_everything, set_random_states


def draw() -> tuple:
    numbers = random.random(), np.random.rand(), random.gauss(0, 1), np.random.randn()
    return (*numbers, torch.rand(1).item())


def test_random_states_continue(tmp_path) -> None:
    cpu = torch.device("cpu")
    draw()
    torch.save(random_states(cpu), tmp_path / "states.pt")
    expected = draw()
    seed_everything(0)
    assert draw() != expected
    set_random_states(torch.load(tmp_path / "states.pt", weights_only=True), cpu)
    assert draw() == expected


def test_a_seed_means_the_same_numbers() -> None:
    seen = []
    for seed in (3, 3, 4):
        seed_everything(seed)
        seen.append(draw())
    assert seen[0] == seen[1] and all(a != b for a, b in zip(*seen[1:], strict=True))
