"""Autoencoders and text encoders of the real classes, small, with random weights, saved to disk."""

from pathlib import Path

import pytest
import torch


def autoencoder_kl(**changes):
    """AutoencoderKL with 4 channels at half the side; the factor is 2 per block after the first."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = changes.pop("blocks", 2)
    settings = {
        "block_out_channels": (8,) * blocks,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
    }
    return diffusers.AutoencoderKL(**{**settings, **changes}).eval()


def autoencoder_dc(stages: int = 3, latent_channels: int = 8, **changes):
    """AutoencoderDC with 8 channels at 1 / 2^(stages - 1) of the side."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    settings = {
        "latent_channels": latent_channels,
        "attention_head_dim": 8,
        "encoder_block_types": "ResBlock",
        "decoder_block_types": "ResBlock",
        "encoder_block_out_channels": (8,) * stages,
        "decoder_block_out_channels": (8,) * stages,
        "encoder_layers_per_block": (1,) * stages,
        "decoder_layers_per_block": (1,) * stages,
        "encoder_qkv_multiscales": ((),) * stages,
        "decoder_qkv_multiscales": ((),) * stages,
        "scaling_factor": 0.41407,
    }
    return diffusers.AutoencoderDC(**{**settings, **changes}).eval()


def tokenizer(words: str = "a photo of red green blue cat dog handwritten seven three on grass"):
    """A word tokenizer with the special tokens of Gemma: <bos> in front, <pad> behind."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *words.split()])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        # Gemma's pads on the left.
        padding_side="left",
    )


def gemma(hidden: int = 16, layers: int = 2):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, sliding_window=8,
        pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    model = transformers.Gemma3ForCausalLM(config).eval()
    with torch.no_grad():  # no state of a token may vanish
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def t5(hidden: int = 16):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=hidden, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def saved(folder: Path, *parts) -> Path:
    """`folder` with each part saved into it."""
    for part in parts:
        part.save_pretrained(folder)
    return folder


def cut_in_half(file: Path) -> None:
    """What an interrupted copy leaves of a file."""
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
