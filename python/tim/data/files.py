"""Images in files, each read and decoded when it is used, by threads or in a worker process."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from tim.data.dataset import Dataset


class FileDataset(Dataset):
    """Images that are decoded one at a time; subclasses implement `_load` and `name_of`.

    What cannot be decoded is noted in `skipped` when it is met, and the next readable image takes
    its place, so the order of all others stays as it is.

    Pickled for a worker process it decodes there one image after the other, without threads.
    """

    prefetch = 2
    path: Path

    def __init__(self, workers: int) -> None:
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(workers, "tim-decode")
        self._begin()
        self._skipped: dict[int, str] = {}

    def _begin(self) -> None:
        # Imported here: the training step needs batches, and runs where there is no PIL.
        from PIL import Image

        # It refuses very large pictures as a guard against hostile uploads; these are the user's.
        Image.MAX_IMAGE_PIXELS = None
        self._lock = threading.Lock()
        #: Where a worker process writes which image it is at, for whoever finds it dead.
        self._place: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {**self.__dict__, "_pool": None, "_lock": None, "_skipped": {**self._skipped}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def name_of(self, index: int) -> str:
        """The file, relative to `path`."""
        raise NotImplementedError

    def _load(self, index: int) -> Any:
        """Whatever a batch needs of an image; may raise anything."""
        raise NotImplementedError

    @property
    def skipped(self) -> dict[str, str]:
        return {self.name_of(i): reason for i, reason in sorted(self.unreadable().items())}

    def unreadable(self) -> dict[int, str]:
        """`skipped`, by number."""
        with self._lock:
            return dict(self._skipped)

    def skip(self, reasons: Mapping[int, str]) -> None:
        """Take these for unreadable from now on."""
        with self._lock:
            self._skipped.update(reasons)

    def tell_place(self, place: Tensor) -> None:
        """Write the number of each image to be decoded to `place` [1], and -1 after it."""
        self._place = place

    def _load_all(self, indices: Iterable[int]) -> list[tuple[int, Any]]:
        """Of each index the first readable image from it on: its number and what was loaded."""
        return list((self._pool.map if self._pool else map)(self._readable, indices))

    def _readable(self, index: int) -> tuple[int, Any]:
        count = len(self)
        for candidate in [*range(index, count), *range(index)]:
            if candidate not in self._skipped and (found := self._try(candidate)) is not None:
                return candidate, found
        first, reason = next(iter(self.skipped.items()))
        raise ValueError(
            f"none of the {count} images in {self.path} can be read; {first}: {reason}"
        )

    def _try(self, index: int) -> Any | None:
        if self._place is not None:
            self._place.fill_(index)
        try:
            found = self._load(index)
        # Decoders raise whatever they stumble over in a damaged file; no kind of it may end the
        # run.
        except Exception as error:
            self.skip({index: f"{type(error).__name__}: {' '.join(str(error).split())}"})
            found = None
        if self._place is not None:
            self._place.fill_(-1)
        return found
