"""Architectures of the paper (arXiv 2509.04394) as in the released configurations."""

from dataclasses import replace

from tim.models.config import TiMConfig

_B4 = TiMConfig(
    patch_size=4, hidden_size=768, depth=12, num_heads=12, encoder_depth=4, z_dim=768,
    lora_hidden_size=256,
)  # fmt: skip
_XL2 = TiMConfig(
    patch_size=2, hidden_size=1152, depth=28, num_heads=16, encoder_depth=8, z_dim=768,
    lora_hidden_size=384,
)  # fmt: skip
_XL1 = replace(_XL2, input_size=16, patch_size=1, in_channels=32)

#: Name to architecture. Latents of 256 pixels: 4 channels, an eighth of the side; of 512 pixels:
#: 32 channels, a 32nd of the side. Captions: 1152 features per token (Gemma 3, 1B).
ARCHITECTURES: dict[str, TiMConfig] = {
    "tim-b4-256": _B4,
    "tim-xl2-256": _XL2,
    "tim-xl1-512": _XL1,
    "tim-t2i-xl1": replace(_XL1, num_classes=None, cap_feat_dim=1152),
}
