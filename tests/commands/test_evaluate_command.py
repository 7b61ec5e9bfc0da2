import json

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("torchmetrics")

import tim
from small_encoders import autoencoder_dc, gemma, saved, tokenizer
from tim.cli import parse
from tim.cli import run as command
from tim.commands.evaluate import Evaluate, _by_classifier
from tim.data.digits import digits
from tim.evaluate.networks import PACKAGE, Inception
from tim.evaluate.scores import kid
from tim.models import TiMConfig
from tim.pipeline import TiMPipeline
from tim.trainer import Trainer
from tiny_runs import config

FEATURES = "scoring_networks:Features"
TEXT = TiMConfig(
    input_size=4, patch_size=1, in_channels=8, num_classes=None, cap_feat_dim=16, hidden_size=32,
    depth=1, num_heads=2, encoder_depth=1, lora_hidden_size=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command") / "run"
    Trainer(config(), folder).train()
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text model and a CLIP model, of random weights."""
    import transformers

    path = tmp_path_factory.mktemp("text")
    torch.manual_seed(0)
    network = tim.TiM(TEXT)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    parts = {"text_encoder": gemma().get_decoder(), "tokenizer": tokenizer()}
    TiMPipeline(network, vae=autoencoder_dc(), **parts).save_pretrained(path / "model")
    sizes = {
        "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }  # fmt: skip
    clip = transformers.CLIPConfig(
        text_config={"vocab_size": 64, "max_position_embeddings": 8, "eos_token_id": 2, **sizes},
        vision_config={"image_size": 8, "patch_size": 4, **sizes},
        projection_dim=8,
    )
    saved(path / "clip", transformers.CLIPModel(clip), tokenizer())
    (path / "prompts.txt").write_text("a red cat\na dog on grass\nthree cat\n")
    return path


def told(capsys, *arguments) -> str:
    assert command(["evaluate", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("tim evaluate: ")]
    return line


def test_digits_are_measured_by_their_classifier_unless_asked(run):
    def by_classifier(*flags):
        return _by_classifier(parse(Evaluate, "tim evaluate", [str(run), *flags]))

    assert by_classifier("--steps", "1", "--samples", "9")
    assert by_classifier("--features", "classifier")
    assert not by_classifier("--features", "inception")
    assert not by_classifier("--metrics", "fid")
    assert not by_classifier("--npz")


def test_run_against_its_own_images(run, capsys):
    flags = ["--features", FEATURES, "--samples", "50", "--steps", "1,2"]
    assert command(["evaluate", str(run), *flags]) == 0
    out = capsys.readouterr().out
    assert "FID" in out and "50 samples against 297 of test images of the run" in out
    written = json.loads((run / "evaluation" / "evaluation.json").read_text())
    named = [name for name, pairs in written["not_better"].items() if pairs]
    assert out.count("2 steps were no better than 1") == len(named)
    assert (run / "evaluation" / "evaluation.png").is_file()


def test_inception_measures_a_run_from_end_to_end(run, tmp_path, capsys):
    """With the real network; so few pictures say something to KID alone."""
    pytest.importorskip(PACKAGE)
    flags = ["--features", "inception", "--metrics", "kid", "--steps", "1", "--samples", "4"]
    flags += ["--reference-images", "4", "--out", str(tmp_path), "--npz", "--device", "cpu"]
    assert command(["evaluate", str(run), *flags]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "4 samples against 4 of test images of the run" in shown
    (row,) = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    network = Inception()
    with np.load(tmp_path / "samples-steps-1.npz") as archive:
        samples = network(torch.from_numpy(archive["arr_0"]).permute(0, 3, 1, 2))
    held_out = digits("test")
    chosen = held_out.images[np.arange(4) * len(held_out.images) // 4]
    real = network((chosen * 127.5 + 127.5).round().to(torch.uint8))
    assert row["kid"] == pytest.approx(kid(real, samples)[0], rel=1e-3)


def test_text_model_against_a_folder_with_clip_score(text, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=pixels)
    flags = [
        "--features", FEATURES, "--samples", "8", "--steps", "1,2", "--npz", "--batch-size", "4",
        "--prompts", str(text / "prompts.txt"), "--clip", str(text / "clip"),
        "--reference", str(tmp_path / "reference.npz"), "--out", str(tmp_path / "out"),
        "--metrics", "fid,kid", "--cfg-scale", "2",
    ]  # fmt: skip
    assert command(["evaluate", str(text / "model"), *flags]) == 0
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [sorted(row) for row in written["rows"]] == [
        ["clip_score", "fid", "kid", "kid_std", "steps"]
    ] * 2
    assert written["cfg_scale"] == 2
    assert "CLIP score" in capsys.readouterr().out
    with np.load(tmp_path / "out" / "samples-steps-2.npz") as archive:
        assert archive["arr_0"].shape == (8, 16, 16, 3)


def test_prompts_of_a_benchmark(text, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"tag": "x", "prompt": "a red cat"}\n')
    flags = ["--benchmark", "geneval", "--prompts", str(tmp_path / "p.jsonl"), "--images", "1"]
    flags += ["--out", str(tmp_path / "out"), "--steps", "1,2"]
    assert command(["prompts", str(text / "model"), *flags]) == 0
    folders = [tmp_path / "out" / f"steps-{n}" for n in (1, 2)]
    assert capsys.readouterr().out.split() == [str(folder) for folder in folders]
    assert all((folder / "00000" / "samples" / "0000.png").is_file() for folder in folders)
    about = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert about["model"]["cfg"][0] == 2.5  # as tim sample has it for prompts


def test_mistakes_are_told_in_one_line(run, text, tmp_path, capsys):
    assert "no --npz" in told(capsys, run, "--features", "classifier", "--npz")
    line = told(capsys, run, "--features", FEATURES, "--samples", "6")
    assert "samples must be at least 7 for fid" in line
    line = told(capsys, run, "--reference", tmp_path, "--features", FEATURES)
    assert "holds no images" in line
    line = told(capsys, text / "model", "--features", FEATURES, "--reference", tmp_path)
    assert "holds no images" in line
    line = told(capsys, run, "--clip", text / "clip", "--metrics", "")
    assert "CLIP score needs prompts" in line
    (tmp_path / "p.txt").write_text("\n")
    line = told(capsys, text / "model", "--prompts", tmp_path / "p.txt")
    assert "holds no prompts" in line
    np.savez(tmp_path / "r.npz", arr_0=np.zeros((9, 16, 16, 3), np.uint8))
    flags = ["--features", FEATURES, "--samples", "8", "--reference", tmp_path / "r.npz"]
    assert "prompts is missing" in told(capsys, text / "model", *flags)
    assert not (tmp_path / "evaluation").exists()
