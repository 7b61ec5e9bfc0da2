"""What an evaluation found: evaluation.json and evaluation.png."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tim.evaluate.store import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Metrics in the order in which they are shown: heading, format, and whether less is better.
SHOWN = {
    "fid": ("FID", "{:.2f}", True),
    "kid": ("KID x 1000", "{:.3f}", True),
    "precision": ("precision", "{:.3f}", False),
    "recall": ("recall", "{:.3f}", False),
    "inception_score": ("Inception Score", "{:.2f}", False),
    "clip_score": ("CLIP score", "{:.2f}", False),
}
_SCALE = {"kid": 1000.0}


@dataclass
class ImageQuality:
    """Scores of samples at each number of steps, and what was measured."""

    source: str
    features: str
    reference: str | None
    reference_images: int | None
    """None where the reference is known by its moments only."""
    samples: int
    seed: int
    cfg_scale: float
    settings: str
    """Changes when anything does that the scores depend on."""
    rows: dict[int, dict[str, float]] = field(default_factory=dict)
    """Scores by name, for each number of steps."""
    npz: list[int] = field(default_factory=list)
    """Numbers of steps whose samples are in an .npz file."""

    @property
    def steps(self) -> list[int]:
        return sorted(self.rows)

    @property
    def metrics(self) -> list[str]:
        return [name for name in SHOWN if any(name in row for row in self.rows.values())]

    def not_better(self) -> dict[str, list[tuple[int, int]]]:
        """For each metric, neighbouring step counts of which the larger did not improve it."""
        return {
            name: not_better(self.steps, [self.rows[s][name] for s in self.steps], SHOWN[name][2])
            for name in self.metrics
        }

    def cells(self) -> list[list[str]]:
        """Rows of a table: steps, then each of `metrics`."""
        return [
            [str(s), *(shown(name, self.rows[s][name]) for name in self.metrics)]
            for s in self.steps
        ]

    def write(self, folder: Path) -> None:
        """evaluation.json and evaluation.png in `folder`, each whole or not at all."""
        values: dict[str, Any] = {
            **asdict(self),
            "rows": [{"steps": s, **self.rows[s]} for s in self.steps],
            "not_better": self.not_better(),
        }
        text = json.dumps(values, indent=1) + "\n"
        write_whole(folder / "evaluation.json", lambda path: path.write_text(text))
        if self.metrics:
            picture = plot(self)
            write_whole(
                folder / "evaluation.png", lambda path: picture.savefig(path, dpi=120, format="png")
            )

    @classmethod
    def read(cls, folder: Path) -> ImageQuality | None:
        """What was written to `folder`, or None."""
        try:
            values = json.loads((folder / "evaluation.json").read_text())
            values.pop("not_better")
            rows = values.pop("rows")
            return cls(**values, rows={row.pop("steps"): row for row in rows})
        except (OSError, ValueError, KeyError, TypeError):
            return None


def not_better(
    steps: Sequence[int], values: Sequence[float], less_is_better: bool = True
) -> list[tuple[int, int]]:
    """Pairs of neighbouring step counts at which more steps did not improve the value."""
    pairs = itertools.pairwise(zip(steps, values, strict=True))
    return [(a, b) for (a, x), (b, y) in pairs if (y >= x if less_is_better else y <= x)]


def shown(metric: str, value: float) -> str:
    return SHOWN[metric][1].format(value * _SCALE.get(metric, 1.0))


def plot(quality: ImageQuality) -> Figure:
    """A panel for each metric against the number of steps, on a logarithmic axis."""
    from matplotlib.figure import Figure

    count = len(quality.metrics)
    columns = min(count, 2)
    rows = -(-count // columns)
    figure = Figure(figsize=(5.2 * columns, 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for name, axes in zip(quality.metrics, panels, strict=False):
        heading, _, less = SHOWN[name]
        values = [quality.rows[s][name] * _SCALE.get(name, 1.0) for s in quality.steps]
        axes.plot(quality.steps, values, "o-", color="#1f6feb")
        if name == "kid":
            spread = [quality.rows[s]["kid_std"] * _SCALE["kid"] for s in quality.steps]
            axes.errorbar(quality.steps, values, spread, fmt="none", ecolor="#8cb4f5", capsize=3)
        axes.set_xscale("log", base=2)
        axes.set_xticks(quality.steps, [str(steps) for steps in quality.steps])
        axes.minorticks_off()
        axes.set_xlabel("sampling steps (network calls)")
        axes.set_ylabel(f"{heading} ({'less' if less else 'more'} is better)")
        axes.grid(alpha=0.3)
    for axes in list(figure.axes)[count:]:
        axes.remove()
    figure.suptitle(f"{quality.samples} samples, features: {quality.features}")
    return figure
