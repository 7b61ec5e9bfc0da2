"""Who is behind, and what counts as progress. Real ranks that hang: tests/distributed."""

from tim.parallel.heartbeat import Beat, describe
from tim.trainer import Trainer
from tiny_runs import config


def test_the_ranks_behind_are_named() -> None:
    ahead = Beat(9, 4, "backward", "a", 10)
    behind = Beat(7, 4, "data", "b", 11)
    assert describe([ahead, behind, ahead], 2, 30.0) == (
        "rank 2: no progress for 30 s; rank 1 (process 11 on b) hangs in data of step 4, "
        "while rank 2 is in backward of step 4 and waits"
    )
    assert describe([ahead, ahead], 0, 30.0) == (
        "rank 0: no progress for 30 s; all ranks are in backward of step 4, so it is the device "
        "or the network that hangs"
    )


def test_all_that_may_take_long_is_progress(tmp_path) -> None:
    trainer = Trainer(config(steps=2, sample_every=2, checkpoint_every=1), tmp_path / "run")
    beats: list[tuple[int, str]] = []
    trainer.heartbeat.beat = lambda step, phase: beats.append((step, phase))
    trainer.train()
    step = ["data", "forward and derivative", "backward", "norm", "optimizer", "average"]
    assert [phase for at, phase in beats if at == 0] == step
    assert [phase for at, phase in beats if at == 1] == ["saving", *step]
    assert [phase for at, phase in beats if at == 2] == ["samples", "saving", "data"]
