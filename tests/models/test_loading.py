import dataclasses
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from networks import CAPTIONS, KINDS, LABELS, arguments, network
from safetensors import safe_open
from safetensors.torch import save_file

from tim.models import ARCHITECTURES, TiM, load, loading
from tim.models.loading import pipeline_index
from tim.models.released import RELEASES


def assert_same(one: TiM, two: TiM) -> None:
    assert one.config == two.config
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert b.requires_grad
        assert b.is_leaf


def save(model: TiM, path, with_config: bool = True):
    metadata = {"config": json.dumps(model.config.to_dict())} if with_config else None
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path, metadata)
    return path


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_pretrained_round_trip(config, tmp_path):
    model = network(config)
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    weights = tmp_path / "model.safetensors"
    for loaded in (load(tmp_path), TiM.from_pretrained(tmp_path), load(weights)):
        assert_same(loaded, model)
        assert not loaded.training
        assert torch.equal(loaded(*arguments(config)), model(*arguments(config)))


def test_weight_file_with_its_configuration(tmp_path):
    model = network(LABELS)
    assert_same(load(str(save(model, tmp_path / "w.safetensors"))), model)


def test_weight_file_without_configuration(tmp_path):
    model = network(LABELS)
    path = save(model, tmp_path / "w.safetensors", with_config=False)
    with pytest.raises(ValueError, match=r"carries no configuration: pass preset=.*tim-xl2-256"):
        load(path)
    assert_same(load(path, config=LABELS), model)


@pytest.mark.parametrize("suffix", [".bin", ".pt"])
def test_pickled_weights(suffix, tmp_path):
    model = network(CAPTIONS)
    path = tmp_path / f"t2i_model{suffix}"
    torch.save(model.state_dict(), path)
    assert_same(load(path, config=CAPTIONS), model)


@pytest.fixture
def tiny_release(monkeypatch):
    """Tiny networks under the names of the released ones."""
    tiny = {"tim-xl2-256": LABELS, "tim-t2i-xl1": CAPTIONS}
    tiny["tim-xl1-512"] = dataclasses.replace(LABELS, patch_size=1, in_channels=8)
    for preset, config in tiny.items():
        monkeypatch.setitem(ARCHITECTURES, preset, config)
    return {r.preset: network(r.config) for r in RELEASES}


def save_released(model: TiM, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".bin":
        torch.save(model.state_dict(), path)
    else:
        save_file(model.state_dict(), path)
    return path


def test_preset_means_released_weights(tiny_release, tmp_path):
    model = tiny_release["tim-xl2-256"]
    path = save_released(model, tmp_path / "w.safetensors")
    assert model.config.rope_grid == "released"
    assert_same(load(path, preset="tim-xl2-256"), model)
    with pytest.raises(ValueError, match=r"preset must be one of .*tim-xl2-256.*, got 'huge'"):
        load(path, preset="huge")
    with pytest.raises(ValueError, match="give preset or config, not both"):
        load(path, preset="tim-xl2-256", config=model.config)
    with pytest.raises(TypeError, match="config must be a TiMConfig, got str"):
        load(path, config="tim-xl2-256")


def test_wrong_preset_names_the_right_one(tiny_release, tmp_path):
    path = save_released(tiny_release["tim-xl2-256"], tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"of another shape: .*; they are those of") as caught:
        load(path, preset="tim-xl1-512")
    assert str(caught.value).endswith("they are those of preset='tim-xl2-256'")


@pytest.mark.parametrize("release", RELEASES, ids=lambda r: r.preset)
def test_published_names_need_no_preset(tiny_release, release, tmp_path):
    model = tiny_release[release.preset]
    path = save_released(model, tmp_path / release.file)
    for loaded in (load(path), load(tmp_path), load(path, preset=release.preset)):
        assert_same(loaded, model)
    spatial = dataclasses.replace(model.config, rope_grid="spatial")
    assert load(path, config=spatial).config == spatial


def test_folder_with_several_released_files(tiny_release, tmp_path):
    for release in RELEASES[:2]:
        save_released(tiny_release[release.preset], tmp_path / release.file)
    with pytest.raises(ValueError, match=r"c2i_model_256.safetensors \(preset='tim-xl2-256'\), .*"):
        load(tmp_path)
    with pytest.raises(ValueError, match="choose one of them by preset, got 'tim-t2i-xl1'"):
        load(tmp_path, preset="tim-t2i-xl1")
    assert_same(load(tmp_path, preset="tim-xl1-512"), tiny_release["tim-xl1-512"])


def test_released_hub_repositories(tiny_release, hub):
    for release in RELEASES:
        save_released(tiny_release[release.preset], hub / release.repository / release.file)
    with pytest.raises(ValueError, match="several models: pass preset='tim-xl2-256' or 'tim-xl1-"):
        load("GoodEnough/TiM-C2I")
    with pytest.raises(ValueError, match="holds tim-t2i-xl1, got preset='tim-xl2-256'"):
        load("GoodEnough/TiM-T2I", preset="tim-xl2-256")
    assert_same(load("GoodEnough/TiM-T2I"), tiny_release["tim-t2i-xl1"])
    for release in RELEASES:
        model = tiny_release[release.preset]
        assert_same(load(release.repository, preset=release.preset), model)
        assert_same(load(f"{release.repository}/{release.file}"), model)


class Payload:
    """An object whose unpickling would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_code_in_a_weight_file_is_run(tmp_path):
    path = tmp_path / "t2i_model.bin"
    torch.save({"x_embedder.proj.bias": Payload(tmp_path / "proof")}, path)
    with pytest.raises(ValueError, match="is damaged: Weights only load failed"):
        load(path, config=CAPTIONS)
    assert not (tmp_path / "proof").exists()


MEASURE_ANONYMOUS_MEMORY = """
import json, sys, tim
def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
small, large, config = sys.argv[1], sys.argv[2:-1], tim.TiMConfig(**json.loads(sys.argv[-1]))
tim.load(small)  # imports and one-time allocations
for path in large:
    before = anonymous()
    model = tim.load(path, config=config)
    print(anonymous() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_weights_are_mapped_not_copied(tmp_path):
    small = save(network(LABELS), tmp_path / "small.safetensors")
    config = dataclasses.replace(LABELS, num_classes=200_000)
    with torch.device("meta"):
        model = TiM(config)
    model.to_empty(device="cpu")
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    large = [save_released(model, tmp_path / name) for name in ("large.safetensors", "large.bin")]
    arguments = [small, *large, json.dumps(config.to_dict())]
    command = [sys.executable, "-c", MEASURE_ANONYMOUS_MEMORY, *map(str, arguments)]
    for grown in map(int, subprocess.check_output(command).split()):
        assert grown < size / 4


def test_training_leaves_the_mapped_file_alone(tmp_path):
    for name in ("w.safetensors", "w.bin"):
        path = save_released(network(LABELS), tmp_path / name)
        before = path.read_bytes()
        model = load(path, config=LABELS)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        del model
        assert path.read_bytes() == before


def test_configuration_that_contradicts_the_file(tmp_path):
    path = save(network(LABELS), tmp_path / "w.safetensors")
    assert load(path, config=LABELS).config == LABELS
    with pytest.raises(
        ValueError, match=r"own configuration, which differs .*: new_condition is t-r"
    ):
        load(path, config=dataclasses.replace(LABELS, new_condition="r"))


def test_newest_checkpoint_of_a_run(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": LABELS.to_dict(), "train": {}}))
    with pytest.raises(FileNotFoundError, match=r"holds no complete checkpoints/<step>"):
        load(tmp_path)
    # By number, not by name; what is not a finished step does not count.
    steps = ("99999999", "100000000", "00000005", "200000000.tmp-1", "300000000")
    for seed, step in enumerate(steps):
        folder = tmp_path / "checkpoints" / step
        save(network(LABELS, seed=seed), folder / "ema.safetensors")
        (folder / "model.safetensors").touch()
        if step != "300000000":
            (folder / "state.pt").touch()
    assert_same(load(tmp_path), network(LABELS, seed=1))


def test_directories_that_are_no_source(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"must hold config.json, config.yaml or a released"
    ):
        load(tmp_path)
    (tmp_path / "config.yaml").write_text("train: {}")
    with pytest.raises(ValueError, match="must have a mapping `model`"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a file, a directory nor a hub id"):
        load(tmp_path / "nothing.safetensors")


def test_refuses_what_is_no_source():
    with pytest.raises(TypeError, match="source must be a path or a hub id, got NoneType"):
        load(None)


def test_lists_what_does_not_fit(tmp_path):
    state = network(LABELS).state_dict()
    state["spare"] = state.pop("x_embedder.proj.bias")
    state["t_embedder.mlp.0.bias"] = torch.zeros(7)
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    with pytest.raises(ValueError, match="do not fit") as caught:
        load(path, config=LABELS)
    message = str(caught.value)
    assert "1 missing: x_embedder.proj.bias;" in message
    assert "1 unexpected: spare;" in message
    assert "1 of another shape: t_embedder.mlp.0.bias [7] instead of [48]" in message
    with pytest.raises(ValueError, match=r"9 missing: blocks.0.*, \.\.\.") as caught:
        state = {k: v for k, v in network(LABELS).state_dict().items() if "blocks.0.attn" not in k}
        save_file(state, path)
        load(path, config=LABELS)
    assert "\n" not in str(caught.value)


def damaged(kind: str, folder: Path) -> Path:
    """A source of which one file is damaged, and that file."""
    if kind == "truncated":
        path = save(network(LABELS), folder / "w.safetensors")
        path.write_bytes(path.read_bytes()[:-8])
        return path
    if kind == "config.json":
        network(LABELS).save_pretrained(folder)
        (folder / kind).write_text("{")
        return folder
    path = folder / "w.pt"
    if kind == "junk":
        path.write_bytes(b"junk")
    elif kind == "empty":
        path.touch()
    else:
        torch.save([torch.zeros(1)], path)
    return path


@pytest.mark.parametrize("kind", ["truncated", "config.json", "junk", "empty", "list"])
def test_names_the_damaged_file(kind, tmp_path):
    source = damaged(kind, tmp_path)
    file = source / kind if kind == "config.json" else source
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))} is damaged: ") as caught:
        load(source, config=LABELS if source.suffix == ".pt" else None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["./run/x", "../x", "~/run", "runs/w.safetensors", "runs/w.pt"])
def test_asks_no_hub_for_what_looks_like_a_path(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    with pytest.raises(FileNotFoundError, match="neither a file, a directory nor a hub id"):
        load(name)


def test_equal_weights_are_saved_as_equal_files(tmp_path):
    model = network(LABELS)
    for name in "ab":
        model.save_pretrained(tmp_path / name)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        assert list(file.metadata()) == ["config"]  # several would be written in random order


def test_from_pretrained_is_strict(tmp_path):
    network(LABELS).save_pretrained(tmp_path)
    save_file({"spare": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="1 unexpected: spare"):
        TiM.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config.json: load its weights with tim.load"):
        TiM.from_pretrained(tmp_path)


def test_unknown_settings_of_a_saved_configuration(tmp_path):
    network(LABELS).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**LABELS.to_dict(), "breadth": 3}))
    with pytest.raises(ValueError, match="unknown model settings: breadth"):
        load(tmp_path)


def test_dtype_and_device(tmp_path):
    path = save(network(LABELS), tmp_path / "w.safetensors")
    assert {p.dtype for p in load(path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load(path, device=torch.device("cpu")).parameters()} == {torch.float32}


def test_loaded_network_trains(tmp_path):
    model = load(save(network(LABELS), tmp_path / "w.safetensors"))
    model(*arguments(LABELS)).square().mean().backward()
    assert model.x_embedder.proj.weight.grad.abs().max() > 0


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the hub: repositories are folders."""

    class NotThere(huggingface_hub.errors.EntryNotFoundError, OSError):
        pass

    def download(repository, filename, **_):
        path = tmp_path / repository / filename
        if (tmp_path / repository).is_dir() and not path.is_file():
            raise NotThere(f"404: {filename}")
        if not path.is_file():
            raise huggingface_hub.errors.LocalEntryNotFoundError(f"{filename} is not cached\nTry")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return tmp_path


def test_hub_repository(hub):
    model = network(LABELS)
    model.save_pretrained(hub / "someone" / "digits")
    assert_same(load("someone/digits"), model)


def test_hub_weight_file(hub):
    model = network(CAPTIONS)
    (hub / "someone" / "weights").mkdir(parents=True)
    torch.save(model.state_dict(), hub / "someone" / "weights" / "t2i_model.bin")
    assert_same(load("someone/weights/t2i_model.bin", config=CAPTIONS), model)


@pytest.mark.parametrize("weights", ["model.safetensors", "diffusion_pytorch_model.safetensors"])
def test_network_of_a_pipeline_on_the_hub(hub, weights):
    model, folder = network(LABELS), hub / "someone" / "fox" / "transformer"
    model.save_pretrained(folder)
    (folder / "model.safetensors").rename(folder / weights)
    assert_same(load("someone/fox"), model)
    assert pipeline_index("someone/fox") is None
    (folder.parent / "model_index.json").write_text("{}")
    index = folder.parent / "model_index.json"
    assert pipeline_index("someone/fox") == pipeline_index(folder.parent) == index


def test_repository_without_a_network(hub):
    (hub / "someone" / "else").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"someone/else .* config.json cannot be had"):
        load("someone/else")
    assert pipeline_index("someone/else") is pipeline_index("GoodEnough/TiM-C2I") is None
    with pytest.raises(FileNotFoundError, match=r"nobody/fox .*model_index.json cannot be had"):
        pipeline_index("nobody/fox")


def test_hub_out_of_reach(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"someone/digits is no path here, and config.json"):
        load("someone/digits")
    with pytest.raises(FileNotFoundError) as caught:
        load("someone/digits/w.safetensors")
    assert "\n" not in str(caught.value)


def test_push_to_hub_uploads_what_load_reads(monkeypatch, tmp_path):
    model = network(LABELS)
    loaded = []

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return types.SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, folder_path, **_):
            loaded.append(load(folder_path))
            return "url"

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    assert model.push_to_hub("someone/digits") == "url"
    assert_same(loaded[0], model)


def test_fetch_names_the_first_line_of_the_reason(hub):
    with pytest.raises(FileNotFoundError, match=r"from the hub: w.bin is not cached$"):
        loading.fetch("someone/digits", "w.bin")
