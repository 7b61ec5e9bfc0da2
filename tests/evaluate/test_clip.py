import pytest
import torch
import torch.nn.functional as torch_f

pytest.importorskip("transformers")

from small_encoders import saved, tokenizer
from tim.evaluate.clip import ClipScore

SIDE = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={
            "vocab_size": 64, "max_position_embeddings": 6, "num_hidden_layers": 1,
            "eos_token_id": 2, "bos_token_id": 2, "pad_token_id": 0, **sizes,
        },
        vision_config={"image_size": SIDE, "patch_size": 4, "num_hidden_layers": 1, **sizes},
        projection_dim=8,
    )  # fmt: skip
    model = transformers.CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return saved(tmp_path_factory.mktemp("clip"), model, tokenizer())


def test_score_is_the_cosine_of_the_models_embeddings(folder):
    clip = ClipScore.load(str(folder))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    prompts = ["a red cat", "dog", "a photo of three blue cat on grass"]
    score = clip(images, prompts)
    text = clip.tokenizer(prompts, padding=True, truncation=True, max_length=6, return_tensors="pt")
    with torch.no_grad():
        output = clip.model(
            input_ids=text["input_ids"],
            attention_mask=text["attention_mask"],
            pixel_values=clip.prepare(images),
        )
    expected = (output.text_embeds * output.image_embeds).sum(1).clamp(min=0) * 100
    torch.testing.assert_close(score, expected)
    assert score.unique().numel() > 1


def test_pictures_are_resized_and_cut_in_the_middle(folder):
    clip = ClipScore.load(str(folder))
    image = torch.zeros(1, 3, 32, 64, dtype=torch.uint8)
    image[..., 16:48] = 255
    prepared = clip.prepare(image)
    expected = (1 - clip.mean) / clip.std
    assert prepared.shape == (1, 3, SIDE, SIDE)
    torch.testing.assert_close(prepared[..., 2:-2], expected.expand(1, 3, SIDE, SIDE - 4))
    exact = torch.randint(0, 256, (1, 1, SIDE, SIDE), dtype=torch.uint8)
    torch.testing.assert_close(
        clip.prepare(exact), (exact.float() / 255 - clip.mean) / clip.std, rtol=1e-5, atol=1e-5
    )


def test_means_of_the_models_own(folder, tmp_path):
    (tmp_path / "own").mkdir()
    for file in folder.iterdir():
        (tmp_path / "own" / file.name).write_bytes(file.read_bytes())
    text = '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    (tmp_path / "own" / "preprocessor_config.json").write_text(text)
    clip = ClipScore.load(str(tmp_path / "own"))
    black = clip.prepare(torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8))
    assert black.equal(torch.full_like(black, -1))
    assert torch_f.mse_loss(clip.mean, torch.full((1, 3, 1, 1), 0.5)) == 0


def test_bad_models(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="clip must be a folder or hub id of transformers"):
        ClipScore.load(str(tmp_path / "absent"))
    from small_encoders import cut_in_half, gemma

    saved(tmp_path / "gemma", gemma().get_decoder(), tokenizer())
    with pytest.raises(ValueError, match="clip must be a CLIP model, got a Gemma3TextModel"):
        ClipScore.load(str(tmp_path / "gemma"))
    cut_in_half(tmp_path / "gemma" / "model.safetensors")
    with pytest.raises(ValueError, match=r"^clip must be .* deserializing header"):
        ClipScore.load(str(tmp_path / "gemma"))
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match=r"CLIP score needs transformers: .*\[t2i\]"):
        ClipScore.load(str(folder))
