"""Trained networks from run directories, weight files and the Hugging Face hub."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tim._checksums import problem_with, read_sums
from tim.models.config import TiMConfig
from tim.models.released import RELEASES, Release, release_of, released_config
from tim.models.sizes import ARCHITECTURES
from tim.models.tim import TiM

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
AVERAGE_FILE = "ema.safetensors"
#: A pipeline of diffusers, and what it calls the weights of its `transformer`.
PIPELINE_FILE = "model_index.json"
WEIGHTS_FILES = (WEIGHTS_FILE, "diffusion_pytorch_model.safetensors")
CHECKPOINT_FILES = (WEIGHTS_FILE, AVERAGE_FILE, "state.pt")
#: Folder of a checkpoint that several ranks have written, instead of those files.
SHARDS = "shards"
PICKLED = (".bin", ".pt", ".pth")
LISTED_KEYS = 8
_STEP = re.compile(r"\d{8,}")


def load(
    source: str | Path,
    *,
    preset: str | None = None,
    config: TiMConfig | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> TiM:
    """A trained network, in evaluation mode.

    Args:
        source: one of
            - a run directory: config.yaml, and ema.safetensors of its newest complete
              checkpoint;
            - a directory written by `save_pretrained`: config.json and model.safetensors, or of a
              whole `TiMPipeline`;
            - a weight file, .safetensors or PyTorch's .bin, .pt, .pth (read with weights_only: no
              code in it is run);
            - a hub repository "owner/name" written by `push_to_hub`, or one weight file of it,
              "owner/name/file";
            - the paper's files, as published: "GoodEnough/TiM-C2I" (with `preset`),
              "GoodEnough/TiM-T2I", a file of theirs, or a folder that holds one.
        preset: name of the architecture of a weight file that does not carry its own (metadata
            entry `config`), e.g. "tim-xl2-256". The file is taken to be a released one, so token
            positions are the released ones. Files that bear a published name need none.
        config: the same for an architecture of your own, instead of `preset`.
        device, dtype: of the returned network; dtype None keeps that of the file. On the CPU, and
            in the file's dtype, weights are mapped from the file and read when they are used.

    Raises:
        TypeError: source is neither a string nor a path, or config is no `TiMConfig`.
        FileNotFoundError: nothing is there, on disk or (as far as can be reached) on the hub.
        ValueError: no configuration is known for the weights, one is given where the source brings
            another, names or shapes of the weights differ from the network's, or a file is damaged.
    """
    if not isinstance(source, (str, Path)):
        raise TypeError(f"source must be a path or a hub id, got {type(source).__name__}")
    given = _given_config(preset, config)
    path = Path(source)
    if path.is_dir():
        own, weights = _from_directory(path, preset)
    elif path.is_file():
        own, weights = _metadata_config(path), path
    else:
        own, weights = _from_hub(str(source), preset)
    return load_weights(_choose_config(own, given, weights), weights, device=device, dtype=dtype)


def load_weights(
    config: TiMConfig,
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> TiM:
    """The network of `config` with the weights of one file.

    Raises:
        ValueError: names or shapes differ from the network's (lists the differences), or the file
            is damaged.
    """
    state = _read(path)
    model = _on_meta(config)
    _check_state(state, model.state_dict(), path)
    model.load_state_dict(state, assign=True)
    return model.to(device=device, dtype=dtype).eval()


def _on_meta(config: TiMConfig) -> TiM:
    with torch.device("meta"):
        return TiM(config)


def fetch(repository: str, file: str, **options: Any) -> Path:
    """Local path of a file of a hub repository, downloaded if need be.

    Raises:
        FileNotFoundError: the repository or file does not exist, or cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(repository, file, **options))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"{repository} is no path here, and {file} cannot be had from the hub: {reason}"
        ) from error


def _from_directory(path: Path, preset: str | None) -> tuple[TiMConfig | None, Path]:
    import yaml

    if (path / PIPELINE_FILE).is_file():
        path = path / "transformer"
    if (path / CONFIG_FILE).is_file():
        weights = next((n for n in WEIGHTS_FILES if (path / n).is_file()), WEIGHTS_FILE)
        return _json_config(path / CONFIG_FILE), path / weights
    if not (path / "config.yaml").is_file():
        return None, path / _release_in(path, preset).file
    with _damage(path / "config.yaml"):
        run = yaml.safe_load((path / "config.yaml").read_text())
    if not isinstance(run, Mapping) or not isinstance(run.get("model"), Mapping):
        raise ValueError(f"{path / 'config.yaml'} must have a mapping `model`")
    complete = checkpoints(path / "checkpoints")
    if not complete:
        raise FileNotFoundError(f"{path} holds no complete checkpoints/<step>")
    newest = complete[-1]
    sharded = (newest / SHARDS).is_dir()
    _check_sums(newest, SHARDS if sharded else AVERAGE_FILE)
    weights = newest / (SHARDS if sharded else AVERAGE_FILE)
    return TiMConfig.from_dict(run["model"]), weights


def _check_sums(checkpoint: Path, start: str) -> None:
    """ValueError for a damaged file of a checkpoint, of those whose names begin with `start`."""
    sums = read_sums(checkpoint) or {}
    problem = problem_with(checkpoint, sums, [name for name in sums if name.startswith(start)])
    if problem is not None:
        older = [
            path.name for path in checkpoints(checkpoint.parent) if path.name < checkpoint.name
        ]
        remedy = f"; delete {checkpoint} to go on from {older[-1]}" if older else ""
        raise ValueError(f"{problem}{remedy}")


def _release_in(path: Path, preset: str | None) -> Release:
    """The release, of `preset` if one is given, whose weight file lies in the folder `path`."""
    found = [r for r in RELEASES if (path / r.file).is_file()]
    if not found:
        raise FileNotFoundError(
            f"{path} must hold config.json, config.yaml or a released file "
            f"({', '.join(r.file for r in RELEASES)}), got none of them"
        )
    chosen = [r for r in found if preset in (None, r.preset)]
    if len(chosen) == 1:
        return chosen[0]
    names = ", ".join(f"{r.file} (preset={r.preset!r})" for r in found)
    raise ValueError(f"{path} holds {names}: choose one of them by preset, got {preset!r}")


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a training run below `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)]
    complete = [
        path
        for path in found
        if all((path / name).is_file() for name in CHECKPOINT_FILES)
        or (path / SHARDS / ".metadata").is_file()
    ]
    return sorted(complete, key=lambda path: int(path.name))


def hub_name(name: str) -> tuple[str, str]:
    """Repository "owner/name" and file ("" for none) of a hub id.

    Raises FileNotFoundError for what can only be meant as a path: the hub's client retries for half
    a minute when out of reach.
    """
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    looks_like_path = (
        name.startswith((".", "/", "~"))
        or (not file and repository.endswith((*PICKLED, ".safetensors")))
        or Path(owner).is_dir()
    )
    if not repository or looks_like_path or Path(name).is_absolute():
        raise FileNotFoundError(f"{name} is neither a file, a directory nor a hub id owner/name")
    return f"{owner}/{repository}", file


def _from_hub(name: str, preset: str | None) -> tuple[TiMConfig | None, Path]:
    repository, file = hub_name(name)
    if file:
        path = fetch(repository, file)
        return _metadata_config(path), path
    published = [r.preset for r in RELEASES if r.repository == repository]
    if published:
        if preset not in (None, *published):
            raise ValueError(f"{repository} holds {', '.join(published)}, got preset={preset!r}")
        return None, fetch(repository, release_of(repository=repository, preset=preset).file)
    config = _fetch_if_there(repository, CONFIG_FILE)
    if config is not None:
        return _json_config(config), fetch(repository, WEIGHTS_FILE)
    if (config := _fetch_if_there(repository, f"transformer/{CONFIG_FILE}")) is None:
        raise FileNotFoundError(
            f"{repository} is no path here, and {CONFIG_FILE} cannot be had from the hub, nor a "
            f"pipeline's transformer/{CONFIG_FILE}"
        )
    files = (_fetch_if_there(repository, f"transformer/{name}") for name in WEIGHTS_FILES)
    found = next((path for path in files if path is not None), None)
    return _json_config(config), found or fetch(repository, f"transformer/{WEIGHTS_FILE}")


def pipeline_index(source: str | Path) -> Path | None:
    """model_index.json of a whole pipeline, in a folder or a hub repository that is no published
    one; None for what is no pipeline.

    Raises FileNotFoundError as `fetch`, and as `hub_name`.
    """
    if Path(source).exists():
        index = Path(source) / PIPELINE_FILE
        return index if index.is_file() else None
    repository, file = hub_name(str(source))
    if file or any(r.repository == repository for r in RELEASES):
        return None
    return _fetch_if_there(repository, PIPELINE_FILE)


def release_at(source: str | Path, preset: str | None) -> Release | None:
    """The release that `load` would take the weights in `source` for, if any."""
    if preset is not None:
        return release_of(preset=preset)
    path = Path(source)
    if path.is_dir():
        own = any((path / name).is_file() for name in (CONFIG_FILE, "config.yaml"))
        return None if own else _release_in(path, preset)
    return release_of(file=path.name) or release_of(repository=str(source))


def _fetch_if_there(repository: str, file: str) -> Path | None:
    """`fetch`, or None where the repository is known not to hold the file."""
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return fetch(repository, file)
    except FileNotFoundError as error:
        cause = error.__cause__
        out_of_reach = isinstance(cause, LocalEntryNotFoundError) and not constants.HF_HUB_OFFLINE
        if isinstance(cause, EntryNotFoundError) and not out_of_reach:
            return None
        raise


def _metadata_config(path: Path) -> TiMConfig | None:
    if path.suffix != ".safetensors":
        return None
    from safetensors import safe_open

    with _damage(path):
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("config")
        values = None if text is None else json.loads(text)
    return None if text is None else _config(values, path)


def _json_config(path: Path) -> TiMConfig:
    with _damage(path):
        values = json.loads(path.read_text())
    return _config(values, path)


def _config(values: object, origin: Path) -> TiMConfig:
    if not isinstance(values, Mapping):
        raise ValueError(f"{origin} is damaged: its configuration is no mapping")
    # A component of a pipeline keeps its architecture beside entries of diffusers.
    return TiMConfig.from_dict(values.get("architecture", values))


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Whatever a parser says of a file that is there, as one ValueError that names the file."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # an unpickler given junk may raise anything
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is damaged: {reason or type(error).__name__}") from error


def _given_config(preset: str | None, config: TiMConfig | None) -> TiMConfig | None:
    if config is not None and not isinstance(config, TiMConfig):
        raise TypeError(f"config must be a TiMConfig, got {type(config).__name__}")
    if preset is None:
        return config
    if config is not None:
        raise ValueError(f"give preset or config, not both, got preset={preset!r} and a config")
    return released_config(preset)


def _choose_config(own: TiMConfig | None, given: TiMConfig | None, weights: Path) -> TiMConfig:
    """What the source carries, else what the caller gave, else what the file's name says."""
    if given is not None and own is not None and own != given:
        raise ValueError(
            f"{weights} carries its own configuration, which differs from the one given: "
            f"{', '.join(_differences(own, given))}"
        )
    chosen = own or given
    if chosen is None and (release := release_of(file=weights.name)) is not None:
        chosen = release.config
    if chosen is None:
        raise ValueError(
            f"{weights} carries no configuration: pass preset=, one of "
            f"{', '.join(ARCHITECTURES)}, or config=, a TiMConfig"
        )
    return chosen


def _differences(one: TiMConfig, other: TiMConfig) -> list[str]:
    a, b = one.to_dict(), other.to_dict()
    return [f"{name} is {a[name]}, not {b[name]}" for name in a if a[name] != b[name]]


def _read(path: Path) -> dict[str, Tensor]:
    with _damage(path):
        if path.name == SHARDS and path.is_dir():
            from tim.checkpoint.sharded import AVERAGE, read_weights

            state = read_weights(path, AVERAGE)
        elif path.suffix in PICKLED:
            # Only archives can be mapped; files of PyTorch before 1.6 are none.
            mapped = zipfile.is_zipfile(path)
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        else:
            from safetensors import safe_open

            # Tensors on the CPU are views of the mapped file.
            with safe_open(path, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors = isinstance(state, Mapping) and all(isinstance(v, Tensor) for v in state.values())
    if not tensors:
        raise ValueError(f"{path} is damaged: it holds no mapping of names to tensors")
    return state


def _check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    problems = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "of another shape": [
            f"{name} {list(state[name].shape)} instead of {list(expected[name].shape)}"
            for name in sorted(expected.keys() & state.keys())
            if state[name].shape != expected[name].shape
        ],
    }
    found = [
        f"{len(names)} {kind}: {', '.join(names[:LISTED_KEYS])}"
        + ", ..." * (len(names) > LISTED_KEYS)
        for kind, names in problems.items()
        if names
    ]
    if found:
        raise ValueError(
            f"weights of {path} do not fit the configuration: {'; '.join(found)}{_hint(state)}"
        )


def _hint(state: Mapping[str, Tensor]) -> str:
    """The preset that the weights would have fitted, for the end of a message."""
    shapes = {name: tensor.shape for name, tensor in state.items()}
    for preset in ARCHITECTURES:
        expected = _on_meta(released_config(preset)).state_dict()
        if shapes == {name: tensor.shape for name, tensor in expected.items()}:
            return f"; they are those of preset={preset!r}"
    return ""
