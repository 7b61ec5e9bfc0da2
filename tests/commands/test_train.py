"""`tim train`: what a run that cannot go on says."""

from collections.abc import Iterator

from tim.checkpoint import checkpoints
from tim.cli import run
from tim.data import Batch, DataWorkerDied, batches


def test_data_workers_that_go_on_dying_end_a_run_in_one_line(tmp_path, monkeypatch, capsys) -> None:
    def dying(*arguments: object) -> Iterator[Batch]:
        stream = batches(*arguments)
        yield next(stream)
        raise DataWorkerDied("data worker 0 (process 7) died of SIGSEGV while it read 07.png")

    monkeypatch.setattr("tim.trainer.batches", dying)
    folder = tmp_path / "run"
    flags = ["--train.batch-size", "8", "--train.checkpoint-every", "1", "--train.log-every", "9"]
    code = run(["train", "digits", "--run", str(folder), *flags, "--train.device", "cpu"])
    told = "data worker 0 (process 7) died of SIGSEGV while it read 07.png; --resume goes on"
    assert code == 1 and capsys.readouterr().err == f"tim train: {told}\n"
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["00000001"]
