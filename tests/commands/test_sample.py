import re

import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from safetensors.torch import save_file

import tim
from small_encoders import autoencoder_dc, autoencoder_kl, gemma, saved, tokenizer
from tim.cli import run
from tim.commands.sampling_flags import parse_size
from tim.models import ARCHITECTURES, TiMConfig
from tim.pipeline import TiMPipeline
from tim.trainer import Trainer
from tiny_runs import config as run_config

SIZES = {"hidden_size": 32, "depth": 1, "num_heads": 2, "encoder_depth": 1, "lora_hidden_size": 8}
LABELS = TiMConfig(
    input_size=8, patch_size=2, in_channels=4, num_classes=10, rope_grid="released", **SIZES
)
TEXT = TiMConfig(
    input_size=4, patch_size=1, in_channels=8, num_classes=None, cap_feat_dim=16, **SIZES
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved text pipeline, and a bare file of weights with an autoencoder beside it."""
    path = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    networks = [tim.TiM(LABELS), tim.TiM(TEXT)]
    for parameter in (p for model in networks for p in model.parameters()):
        torch.nn.init.normal_(parameter, std=0.2)
    save_file(networks[0].state_dict(), path / "weights.safetensors")
    saved(path / "vae", autoencoder_kl())
    parts = {"text_encoder": gemma().get_decoder(), "tokenizer": tokenizer()}
    TiMPipeline(networks[1], vae=autoencoder_dc(), **parts).save_pretrained(path / "text")
    return path


def told(capsys, *arguments) -> str:
    assert run(["sample", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("tim sample: ")]
    assert len(lines) == 1
    return lines[0]


def test_prompts_to_a_grid(folder, tmp_path, capsys):
    out = tmp_path / "out" / "grid.png"
    flags = ["--prompt", "a red cat", "dog", "--size", "24x16", "--steps", "1,4,16"]
    command = ["sample", str(folder / "text"), *flags, "--out", str(out)]
    assert run(command) == 0
    assert capsys.readouterr().out.strip() == str(out)
    with Image.open(out) as grid:
        first = grid.copy()
    # 16 pixels high, so three times enlarged: three rows of two pictures of 72 x 48.
    assert first.height == 2 + 3 * 50 and 2 * 74 < first.width < 2 * 74 + 40
    assert run(command) == 0
    with Image.open(out) as grid:
        assert grid.tobytes() == first.tobytes()


def test_one_picture_is_saved_as_it_is(folder, tmp_path):
    out = tmp_path / "cat.png"
    flags = ["--prompt", "a red cat", "--steps", "2", "--seed", "3", "--size", "24x16"]
    assert run(["sample", str(folder / "text"), *flags, "--out", str(out)]) == 0
    pipe = TiMPipeline.from_pretrained(folder / "text")
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        "a red cat", height=16, width=24, num_inference_steps=2, guidance_scale=2.5,
        generator=torch.Generator().manual_seed(3),
    ).images[0]  # fmt: skip
    with Image.open(out) as picture:
        assert picture.size == (24, 16)
        assert picture.tobytes() == expected.tobytes()


def test_labels_of_a_weight_file(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "tim-xl2-256", LABELS)
    monkeypatch.chdir(tmp_path)
    weights = ["sample", str(folder / "weights.safetensors"), "--preset", "tim-xl2-256"]
    vae = ["--vae", str(folder / "vae")]
    assert run([*weights, *vae, "--classes", "1,2,3", "--steps", "1,2", "--tile", "16"]) == 0
    with Image.open(tmp_path / "steps-1-2.png") as grid:
        assert grid.height == 2 + 2 * 50


def test_graphs_need_a_gpu_and_dtype_is_that_of_the_weights(folder, tmp_path, capsys, monkeypatch):
    config = run_config(steps=1, checkpoint_every=1)
    Trainer(config, tmp_path / "run").train()
    out = tmp_path / "a.png"
    pixels = ["--classes", "1,2", "--steps", "1,2", "--device", "cpu", "--out", out]
    prompt = ["--prompt", "cat", "--device", "cpu", "--out", out]
    for source, flags in ((tmp_path / "run", pixels), (folder / "text", prompt)):
        error = told(capsys, source, *flags, "--cuda-graph")
        assert error == "tim sample: cuda_graph needs a CUDA device, got cpu"
    assert not out.exists()
    dtypes, compiled = [], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: compiled.append(how))
    forward = tim.TiM.forward

    def seen(model, *arguments):
        dtypes.append(model.x_embedder.proj.weight.dtype)
        return forward(model, *arguments)

    monkeypatch.setattr(tim.TiM, "forward", seen)
    for dtype in ("bfloat16", "float32"):
        for source, flags in ((tmp_path / "run", pixels), (folder / "text", prompt)):
            dtypes.clear()
            command = ["sample", str(source), *map(str, flags), "--dtype", dtype, "--compile"]
            assert run(command) == 0
            assert set(dtypes) == {getattr(torch, dtype)}
    assert compiled == 4 * [{"dynamic": False}]


def test_cut_captions_are_told_in_one_line(folder, tmp_path, capsys):
    pipe = TiMPipeline.from_pretrained(folder / "text")
    pipe.register_to_config(max_tokens=3)
    pipe.save_pretrained(tmp_path / "short")
    capsys.readouterr()
    flags = ["--prompt", "a photo of cat", "--steps", "1", "--out", str(tmp_path / "a.png")]
    assert run(["sample", str(tmp_path / "short"), *flags]) == 0
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "captions have" in x]
    assert re.match(r"tim sample: 1 of 2 captions have more than 3 tokens and are cut", line)


def test_sizes():
    assert parse_size(None) is None
    assert parse_size("1024x768") == parse_size("1024X768") == (1024, 768)
    for text in ("1024", "x", "0x8", "8x8x8", "8 by 8"):
        with pytest.raises(ValueError, match=rf"size must be WIDTHxHEIGHT .*, got '{text}'"):
            parse_size(text)


def test_mistakes_are_told_in_one_line(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "tim-xl2-256", LABELS)
    text, out = folder / "text", tmp_path / "a.png"
    weights = folder / "weights.safetensors"
    labels = [weights, "--out", out, "--preset", "tim-xl2-256", "--vae", folder / "vae"]
    assert "give --prompt and no --classes" in told(capsys, text, "--out", out)
    assert "give --classes and no prompts" in told(capsys, *labels, "--prompt", "cat")
    assert "height must be a multiple of 4" in told(capsys, *labels, "--size", "16x18")
    own = told(capsys, text, "--prompt", "cat", "--vae", folder / "vae")
    assert "is a whole pipeline, which has its own vae" in own
    assert "carries no configuration: pass preset=" in told(capsys, weights)
    (tmp_path / "empty").mkdir()
    assert "must hold config.json, config.yaml or a released" in told(capsys, tmp_path / "empty")
    assert not out.exists()


def test_no_flag_is_passed_over(tmp_path, capsys):
    """A run on pixels takes few of them; the others are mistakes, and told."""
    Trainer(run_config(steps=1, checkpoint_every=1), tmp_path / "run").train()
    sample = [tmp_path / "run", "--steps", 1]
    assert "differs from the one given" in told(capsys, *sample, "--preset", "tim-xl2-256")
    assert "give --classes and no prompts" in told(capsys, *sample, "--negative-prompt", "cat")
    assert "there is no vae to tile" in told(capsys, *sample, "--tile", 64)
    assert "shift must be positive, got 0" in told(capsys, *sample, "--shift", 0)
    assert "rope-train-size needs --rope" in told(capsys, *sample, "--rope-train-size", 3)
    assert not (tmp_path / "run" / "samples").exists()
