"""A process that decodes images for one of several ranks dies: docs/data.md."""

import dataclasses

from ranks import Ranks, records
from workers import train, train_killing_a_data_worker

from latent_data import tar_file
from tim.config import DataConfig, ParallelConfig
from tiny_runs import config


def test_a_data_worker_that_is_killed_costs_nothing(tmp_path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number, count in enumerate((7, 2, 9, 4)):
        tar_file(data / f"{number}.tar", 10 * number, count)
    base = dataclasses.replace(
        config(steps=6),
        data=DataConfig(kind="folder", path=str(data), image_size=8, channels=1, window=1),
        parallel=ParallelConfig(timeout=120.0),
    )
    processes = dataclasses.replace(base, data=dataclasses.replace(base.data, processes=1))
    run = tmp_path / "run"
    with Ranks(2, tmp_path / "logs", train_killing_a_data_worker, processes, run) as ranks:
        results = ranks.results()
    assert [len(result["killed"]) for result in results] == [0, 1]
    (pid,) = results[1]["killed"]
    told = f"data worker 0 (process {pid}) died of SIGKILL"
    assert told in ranks.output(1) and told not in ranks.output(0)
    assert [r["step"] for r in records(run) if "denoising" in r] == list(range(1, 7))
    alone = train(base, tmp_path / "alone")
    for result in results:
        for name, value in alone["weights"].items():
            error = (result["weights"][name] - value).norm() / value.norm().clamp(min=1e-12)
            assert error < 1e-4, f"{name}: {error}"
