"""The checkpoints of one run: written beside the training, checked before they are trusted."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tim._checksums import digest, problem_with, read_sums, write_sums
from tim.checkpoint import whole
from tim.checkpoint.directory import begin, commit, set_aside
from tim.checkpoint.training import DamagedCheckpoint, Training, system_error
from tim.models.loading import SHARDS, checkpoints
from tim.parallel import World, known_to_all


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; those before it are as they were."""


class Restored(NamedTuple):
    path: Path
    state: dict[str, Any]
    #: Newer checkpoints that were damaged and have been set aside: what was wrong with each.
    damaged: list[str]


class CheckpointStore:
    """Writes and reads checkpoints below `folder`; all ranks of `world` call every method.

    Written whole by rank 0, or `sharded`: by every rank what it holds. Either kind is read, by any
    number of ranks.
    """

    def __init__(self, folder: Path, keep: int, world: World, sharded: bool = False):
        self.folder, self.keep, self.world, self.sharded = folder, keep, world, sharded
        self._writer = ThreadPoolExecutor(1, "tim-save")
        self._pending: Future[None] | None = None
        self._step = 0

    def save(self, step: int, training: Training, state: Mapping[str, Any]) -> None:
        """Begin to write checkpoint `step`; the training may go on as soon as this returns.

        Raises SaveFailed on all ranks when the checkpoint before could not be written, or this one
        not be begun.
        """
        self.wait()
        try:
            temporary = self.world.from_main(lambda: begin(self.folder, step))
        except OSError as error:
            raise SaveFailed(f"checkpoint {step} could not be written: {_reason(error)}") from None
        if self.sharded:
            import torch.distributed.checkpoint as dcp

            from tim.checkpoint import sharded

            # Its copies are taken before it returns.
            written = dcp.async_save(
                sharded.tensors_of(training),
                storage_writer=sharded.Writer(temporary / SHARDS),
                process_group=self.world.saving,
            )
            self._pending = self._writer.submit(self._finish_shards, temporary, written, state)
        elif self.world.is_main:
            staged = whole.stage(training, state)
            self._pending = self._writer.submit(self._write_whole, temporary, staged)
        self._step = step

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk; raises SaveFailed when it could not be."""
        pending, self._pending = self._pending, None

        def reason() -> str | None:
            error = pending.exception() if pending is not None else None
            return None if error is None else _reason(error)

        # Only rank 0 knows of a checkpoint that it alone has written.
        if found := reason() if self.sharded else self.world.from_main(reason):
            raise SaveFailed(f"checkpoint {self._step} could not be written: {found}")

    def restore(self, training: Training) -> Restored | None:
        """Load the newest checkpoint that is whole; None when there is none at all.

        Raises ValueError when all of them are damaged, or the newest one is of another model.
        """
        damaged: list[tuple[Path, str]] = []
        for path in reversed(self.world.from_main(lambda: checkpoints(self.folder))):
            problem, state = self._first(lambda path=path: (_check(path, self.world), None))
            if problem is None:
                problem, state = self._first(lambda path=path: _read(path, training))
            if problem is None:
                break
            damaged.append((path, problem))
        else:
            if damaged:
                raise known_to_all(
                    ValueError(f"{damaged[0][1]}; no older checkpoint of the run is whole")
                )
            return None
        for bad, _ in damaged:
            self.world.from_main(lambda bad=bad: set_aside(bad))
        return Restored(path, state, [text for _, text in damaged])

    def _first(self, call: Callable[[], tuple[str | None, Any]]) -> tuple[str | None, Any]:
        """Outcome of a check on all ranks: the problem of the lowest rank that met one."""
        problem, result = self.world.together(call)
        problems = [found for found in self.world.exchange(problem) if found is not None]
        return (problems[0] if problems else None), result

    def _write_whole(self, temporary: Path, staged: whole.Staged) -> None:
        try:
            whole.write(temporary, staged)
            commit(temporary, self.keep)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _finish_shards(self, temporary: Path, written: Future, state: Mapping[str, Any]) -> None:
        """Wait for the shards of all ranks, then let rank 0 make a checkpoint of them."""
        from tim.checkpoint import sharded

        world = self.world

        def digests() -> dict[str, str]:
            written.result()
            mine = [*(temporary / SHARDS).glob(f"__{world.rank}_*")]
            if world.is_main:
                mine.append(temporary / SHARDS / ".metadata")
            return {f"{SHARDS}/{path.name}": digest(path) for path in mine}

        def publish(parts: list[dict[str, str]]) -> None:
            sharded.write_state(temporary, state)
            sums = {name: value for part in parts for name, value in part.items()}
            write_sums(temporary, {**sums, sharded.STATE: digest(temporary / sharded.STATE)})
            commit(temporary, self.keep)

        parts = self._everywhere(digests, temporary)
        self._everywhere(lambda: publish(parts) if world.is_main else None, temporary)

    def _everywhere(self, call: Callable[[], Any], temporary: Path) -> list[Any]:
        """Results of all ranks; when one fails, all do, and the half-written checkpoint goes."""
        try:
            outcome = (call(), None)
        except BaseException as error:  # DCP's own is no Exception
            known = getattr(error, "failures", None)
            outcome = (None, ("" if known else f"rank {self.world.rank}: ") + _reason(error))
        outcomes = self.world.exchange(outcome, self.world.saving)
        if failures := [text for _, text in outcomes if text is not None]:
            if self.world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(failures[0])
        return [result for result, _ in outcomes]


def _read(path: Path, training: Training) -> tuple[str | None, dict[str, Any] | None]:
    try:
        if (path / SHARDS).is_dir():
            from tim.checkpoint import sharded

            return None, sharded.read(path, training)
        return None, whole.read(path, training)
    except DamagedCheckpoint as error:
        return str(error), None


def _check(path: Path, world: World) -> str | None:
    """Compare checksums, each rank those of its share of the files."""
    try:
        sums = read_sums(path)
    except ValueError as error:
        return str(error)
    # Runs of earlier versions have none.
    return problem_with(path, sums, sorted(sums)[world.rank :: world.size]) if sums else None


def _reason(error: BaseException) -> str:
    # DCP's own exception names the ranks that failed, and why.
    if failures := getattr(error, "failures", None):
        rank, (cause, _) = min(failures.items())
        return f"rank {rank}: {_reason(cause)}"
    error = system_error(error)
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
