"""One run in a directory at a time: a lock that goes with its process, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

NAME = "run.lock"


class RunLock:
    """A lock on run directory `run`, held from `acquire` to `release` or the end of the process.

    The file holds host and process of who has it. A process may acquire it more than once.
    """

    _held: dict[Path, IO[str]] = {}  # noqa: RUF012

    def __init__(self, run: Path):
        self.path = run.absolute() / NAME

    def acquire(self) -> None:
        """Raises BlockingIOError (an OSError) when another process has it."""
        while self.path not in self._held:
            file = self.path.open("a+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise BlockingIOError(
                    f"{self.path.parent} is being trained by {holder}: wait, or take another "
                    "directory"
                ) from None
            except OSError:
                # A file system without locks: the run is not protected, but it can be had.
                pass
            # Whoever held it may have deleted the file after we opened it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {socket.gethostname()}")
                    file.flush()
                    self._held[self.path] = file
                    continue
            file.close()

    def release(self) -> None:
        if file := self._held.pop(self.path, None):
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
            file.close()
