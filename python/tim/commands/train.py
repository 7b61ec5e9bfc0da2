"""`tim train PRESET --run DIR`"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tim import presets
from tim.cli import UsageError, parse, tell
from tim.config import RunConfig

USAGE = "usage: tim train PRESET --run DIR [--resume] [--profile] [--SECTION.FIELD VALUE ...]"

#: Exit code after Ctrl-C, as shells have it.
INTERRUPTED = 130


@dataclass(frozen=True)
class Train:
    run: Path
    """Run directory; new, unless --resume is given."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on from the newest checkpoint of --run; starts anew when there is none."""
    profile: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write a trace of a few steps to --run/profile, and a table of their phases to the log."""


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    preset, *flags = arguments
    if preset.startswith("-"):
        raise UsageError(f"the preset comes first: {USAGE}")
    command = parse(
        Train,
        f"tim train {preset}",
        flags,
        description=(presets.describe().get(preset)),
        default=Train(run=tyro.MISSING, config=_starting_point(preset, flags)),
    )
    from tim.data import DataWorkerDied
    from tim.parallel import leave

    try:
        code = _train(command)
    except (ValueError, OSError) as error:
        if getattr(error, "on_all_ranks", False):
            leave()
        raise
    except DataWorkerDied as stop:
        # Other ranks may be in a step still, and do not know.
        tell(f"tim train: {stop}; --resume goes on", stop)
        return 1
    if code != INTERRUPTED:  # as above
        leave()
    return code


def _train(command: Train) -> int:
    from tim.checkpoint import SaveFailed
    from tim.trainer import Trainer, TrainingStopped

    trainer = Trainer(command.config, command.run, resume=command.resume)
    if command.resume:
        where = f"resuming at step {trainer.step}" if trainer.step else "nothing to resume"
        tell(f"{where} in {command.run}")
    try:
        trainer.train(profile=command.profile)
    except (TrainingStopped, SaveFailed) as stop:
        tell(f"tim train: {stop}")
        return 1
    except KeyboardInterrupt:
        tell(f"interrupted at step {trainer.step}; --resume goes on")
        return INTERRUPTED
    if trainer.step < trainer.config.train.steps:
        # SIGTERM: what the scheduler wants is a clean end.
        return 0
    # Latents have more channels than a picture and no decoder here.
    pictures = trainer.config.model.in_channels in (1, 3)
    hint = f"; to look at it: tim sample {command.run}" if pictures else ""
    tell(f"trained {trainer.step} steps{hint}")
    return 0


def _starting_point(preset: str, flags: list[str]) -> RunConfig:
    """What the flags change: the preset, or the saved configuration of the run to resume."""
    config = presets.get(preset)
    saved = _run_directory(flags) / "config.yaml"
    if "--resume" in flags and saved.exists():
        config = RunConfig.load(saved)
        if config.preset != preset:
            raise UsageError(f"{saved.parent} is a run of preset {config.preset}, not {preset}")
    return config


def _run_directory(flags: list[str]) -> Path:
    """The value of --run, needed before the flags can be parsed as a whole."""
    for flag, value in itertools.pairwise([*flags, ""]):
        if flag == "--run":
            return Path(value)
        if flag.startswith("--run="):
            return Path(flag.removeprefix("--run="))
    return Path()


def _help() -> str:
    texts = presets.describe()
    width = max(map(len, texts))
    rows = [f"  {name:{width}}  {text}" for name, text in texts.items()]
    tail = "`tim train PRESET --help` tells all flags and the values they have in a preset."
    return "\n".join([USAGE, "", "presets:", *rows, "", tail])
