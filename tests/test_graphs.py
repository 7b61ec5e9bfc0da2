"""Replayed functions: what can be told without a GPU, and on one that they change nothing."""

import dataclasses

import numpy as np
import pytest
import torch

from rehearsal import Rehearsed
from tim.config import GuidanceConfig, ObjectiveConfig
from tim.data import ArrayDataset, Batch
from tim.graphs import WARM_UP, Replayed, check_device, copied_into
from tim.trainer import Trainer
from tiny_runs import config, same, weights

CPU = torch.device("cpu")


def test_the_first_calls_warm_up_and_the_rest_is_replayed() -> None:
    counter = torch.zeros(2)
    replayed = Rehearsed(lambda: counter.add_(1).clone(), CPU, "graphs")
    results = [replayed() for _ in range(WARM_UP + 4)]
    # Copies, every one: the tensor in the graph is written over.
    assert [r[0].item() for r in results] == list(range(1, WARM_UP + 5))
    assert replayed.recordings == 1 and replayed.calls == WARM_UP


def test_what_cannot_be_recorded_is_told_in_one_line(monkeypatch) -> None:
    replayed = Rehearsed(lambda: torch.zeros(1), CPU, "train.cuda_graph")
    monkeypatch.setattr(replayed, "_record", lambda: torch.zeros(1) @ torch.zeros(2))
    for _ in range(WARM_UP):
        replayed()
    with pytest.raises(
        RuntimeError, match=r"^train\.cuda_graph: no CUDA graph of this: .+"
    ) as caught:
        replayed()
    assert "\n" not in str(caught.value)


def test_only_cuda_devices_have_graphs() -> None:
    with pytest.raises(ValueError, match=r"^train\.cuda_graph needs a CUDA device, got cpu$"):
        check_device(CPU, "train.cuda_graph")
    with pytest.raises(ValueError, match="needs a CUDA device"):
        Replayed(lambda: torch.zeros(1), CPU, "anything")


def test_inputs_are_copied_to_where_the_first_ones_are() -> None:
    first = (torch.arange(3.0), None, [torch.arange(2)])
    buffers = copied_into(None, first)
    assert buffers[0] is not first[0] and buffers[0].equal(first[0])
    again = copied_into(buffers, (torch.ones(3), None, [torch.tensor([5, 6])]))
    assert (
        again is buffers and buffers[0].tolist() == [1, 1, 1] and buffers[2][0].tolist() == [5, 6]
    )
    with pytest.raises(ValueError, match=r"must keep their shapes: \[3\] became \[4\]"):
        copied_into(buffers, (torch.ones(4), None, [torch.arange(2)]))
    with pytest.raises(ValueError, match=r"\[2\] became \[3\]"):
        copied_into(buffers, (torch.zeros(3), None, [torch.arange(3)]))
    assert buffers[0].tolist() == [1, 1, 1]  # nothing was written before all shapes were seen


def test_a_run_on_a_cpu_is_refused_before_it_leaves_anything(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"train\.cuda_graph needs a CUDA device, got cpu"):
        Trainer(config(cuda_graph=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


OBJECTIVES = {
    "jvp": (ObjectiveConfig(), {}),
    "bf16 in two parts": (ObjectiveConfig(), {"precision": "bf16", "accumulate": 2}),
    "dde": (ObjectiveConfig(derivative="dde"), {"clip_norm": 0.0}),
    "guided": (ObjectiveConfig(guidance=GuidanceConfig(enabled=True)), {"schedule": "cosine"}),
}


def damaged(batch: Batch, step: int) -> Batch:
    return batch._replace(x=torch.nan * batch.x) if step == 4 else batch


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_on_static_tensors_is_the_plain_step(tmp_path, name) -> None:
    """What a graph needs, without one: the same bits, and nothing it reads moves or is replaced."""
    objective, train = OBJECTIVES[name]
    trainers = [Trainer(config(objective, **train), tmp_path / str(i)) for i in range(2)]
    plain, static = trainers
    step = static.training_step
    step.static = True
    step._run = Rehearsed(step._steps, CPU, "train.cuda_graph")
    places = []
    for number in range(WARM_UP + 4):
        batch = plain.dataset.batch(np.arange(number, number + 8), np.random.default_rng(number))
        a, b = (trainer.train_step(damaged(batch, number)) for trainer in trainers)
        assert a.equal(b) or number == 4
        assert same(weights(plain), weights(static))
        read = [x for part in step.inputs for x in part if x is not None]
        state = [v for s in step.optimizer.state.values() for v in s.values()]
        read += [*step.parameters, *step.ema.model.parameters(), step.lr, step.ema_weight, *state]
        places.append([tensor.data_ptr() for tensor in read])
    assert all(place == places[0] for place in places)
    assert step._run.recordings == 1
    static._read()
    assert static.skipped == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_captured_run_is_the_uncaptured_run(tmp_path, name) -> None:
    """Weights, averages, moments, counters and log, with a skipped step among those replayed."""
    objective, train = OBJECTIVES[name]
    images = np.random.default_rng(0).standard_normal((24, 1, 8, 8)).astype(np.float32)
    images[17] = np.nan
    runs = []
    for captured in (False, True):
        base = config(objective, steps=10, device="cuda", cuda_graph=captured, **train)
        dataset = ArrayDataset(images, np.arange(24) % 10, num_classes=10)
        runs.append(Trainer(base, tmp_path / str(captured), dataset=dataset))
        runs[-1].train()
    assert runs[0].skipped == runs[1].skipped > 0
    for a, b in zip(*map(weights, runs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert runs[1].training_step._run._replay is not None
    # A run that is resumed captures anew and goes on.
    longer = dataclasses.replace(base, train=dataclasses.replace(base.train, steps=16))
    resumed = Trainer(longer, tmp_path / "True", resume=True, dataset=dataset)
    resumed.train()
    assert all(torch.isfinite(w).all() for w in weights(resumed))
