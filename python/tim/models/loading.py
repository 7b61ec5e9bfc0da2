"""Trained networks from run directories, weight files and the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tim.models.config import TiMConfig
from tim.models.sizes import ARCHITECTURES
from tim.models.tim import TiM

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
AVERAGE_FILE = "ema.safetensors"
CHECKPOINT_FILES = (WEIGHTS_FILE, AVERAGE_FILE, "state.pt")
PICKLED = (".bin", ".pt", ".pth")
LISTED_KEYS = 8
_STEP = re.compile(r"\d{8,}")


def load(
    source: str | Path,
    *,
    config: TiMConfig | str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> TiM:
    """A trained network, in evaluation mode.

    Args:
        source: one of
            - a run directory: config.yaml, and ema.safetensors of its newest complete
              checkpoint;
            - a directory written by `save_pretrained`: config.json and model.safetensors;
            - a weight file, .safetensors or PyTorch's .bin, .pt, .pth;
            - a hub repository "owner/name" written by `push_to_hub`, or one weight file of it,
              "owner/name/file".
        config: architecture of a weight file that does not carry its own (metadata entry `config`):
            a `TiMConfig`, or the name of one of the paper's architectures. Under a name the file is
            taken to be a released one, so token positions are the released ones.
        device, dtype: of the returned network; dtype None keeps that of the file.

    Raises:
        TypeError: source is neither a string nor a path.
        FileNotFoundError: nothing is there, on disk or (as far as can be reached) on the hub.
        ValueError: no configuration is known for the weights, one is given where the source brings
            its own, names or shapes of the weights differ from the network's, or a file is damaged.
    """
    if not isinstance(source, (str, Path)):
        raise TypeError(f"source must be a path or a hub id, got {type(source).__name__}")
    path = Path(source)
    if path.is_dir():
        own, weights = _from_directory(path)
    elif path.is_file():
        own, weights = _metadata_config(path), path
    else:
        own, weights = _from_hub(str(source))
    return load_weights(_choose_config(own, config, weights), weights, device=device, dtype=dtype)


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
    with torch.device("meta"):
        model = TiM(config)
    _check_state(state, model.state_dict(), path)
    model.load_state_dict(state, assign=True)
    return model.to(device=device, dtype=dtype).eval()


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


def _from_directory(path: Path) -> tuple[TiMConfig, Path]:
    import yaml

    if (path / CONFIG_FILE).is_file():
        return _json_config(path / CONFIG_FILE), path / WEIGHTS_FILE
    if not (path / "config.yaml").is_file():
        raise FileNotFoundError(f"{path} must hold config.json or config.yaml, got neither")
    with _damage(path / "config.yaml"):
        run = yaml.safe_load((path / "config.yaml").read_text())
    if not isinstance(run, Mapping) or not isinstance(run.get("model"), Mapping):
        raise ValueError(f"{path / 'config.yaml'} must have a mapping `model`")
    complete = checkpoints(path / "checkpoints")
    if not complete:
        raise FileNotFoundError(f"{path} holds no complete checkpoints/<step>")
    return TiMConfig.from_dict(run["model"]), complete[-1] / AVERAGE_FILE


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a training run below `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)]
    whole = [p for p in found if all((p / name).is_file() for name in CHECKPOINT_FILES)]
    return sorted(whole, key=lambda path: int(path.name))


def _from_hub(name: str) -> tuple[TiMConfig | None, Path]:
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    # The hub's client retries for half a minute when out of reach: no need to ask for a path.
    looks_like_path = name.startswith((".", "/", "~")) or (
        not file and repository.endswith((*PICKLED, ".safetensors"))
    )
    if not repository or looks_like_path or Path(name).is_absolute():
        raise FileNotFoundError(f"{name} is neither a file, a directory nor a hub id owner/name")
    repository = f"{owner}/{repository}"
    if file:
        path = fetch(repository, file)
        return _metadata_config(path), path
    config = fetch(repository, CONFIG_FILE)
    return _json_config(config), fetch(repository, WEIGHTS_FILE)


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
    return TiMConfig.from_dict(values)


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


def _choose_config(
    own: TiMConfig | None, given: TiMConfig | str | None, weights: Path
) -> TiMConfig:
    if given is None:
        if own is None:
            raise ValueError(
                f"{weights} carries no configuration: pass config= as a TiMConfig or one of "
                f"{', '.join(ARCHITECTURES)}"
            )
        return own
    if isinstance(given, str):
        if given not in ARCHITECTURES:
            raise ValueError(f"config must be one of {', '.join(ARCHITECTURES)}, got {given!r}")
        given = replace(ARCHITECTURES[given], rope_grid="released")
    if own is not None and own != given:
        raise ValueError(f"{weights} carries its own configuration, which differs from config=")
    return given


def _read(path: Path) -> dict[str, Tensor]:
    with _damage(path):
        if path.suffix in PICKLED:
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            from safetensors import safe_open

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
        raise ValueError(f"weights of {path} do not fit the configuration: {'; '.join(found)}")
