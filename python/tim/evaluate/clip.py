"""CLIP score: how well pictures fit their prompts (Hessel et al., arXiv 2104.08718)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as torch_f
from torch import Tensor, nn

from tim.evaluate.networks import rgb

EXTRA = "transition-models[t2i]"
#: Of OpenAI's models, for those that come without the file that says so.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class ClipScore:
    """100 max(cosine, 0) of the embeddings of a picture and its prompt.

    Args:
        model: of transformers, with `get_image_features` and `get_text_features`: CLIP and its
            relatives.
        tokenizer: its tokenizer; prompts longer than the model reads are cut.
        mean, std: of its input, for images in [0, 1].
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.side = int(model.config.vision_config.image_size)
        self.tokens = int(model.config.text_config.max_position_embeddings)
        self.mean = torch.tensor(mean).reshape(1, -1, 1, 1)
        self.std = torch.tensor(std).reshape(1, -1, 1, 1)

    @classmethod
    def load(cls, name: str, *, device: torch.device | str = "cpu") -> ClipScore:
        """The model in a folder saved by transformers, or of a hub id such as
        openai/clip-vit-large-patch14.

        Raises:
            ImportError: transformers is missing (names the extra).
            ValueError: there is no such model.
        """
        try:
            import transformers
            from transformers.image_processing_base import ImageProcessingMixin
        except ImportError:
            raise ImportError(f"the CLIP score needs transformers: pip install '{EXTRA}'") from None
        from safetensors import SafetensorError

        try:
            model = transformers.AutoModel.from_pretrained(name)
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"clip must be a folder or hub id of transformers, got {name}: {reason}"
            ) from None
        if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
            raise ValueError(f"clip must be a CLIP model, got a {type(model).__name__} in {name}")
        try:
            # The dictionary alone: image processors themselves may ask for further packages.
            settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
        except OSError:
            settings = {}
        return cls(
            model.to(device),
            tokenizer,
            mean=settings.get("image_mean") or MEAN,
            std=settings.get("image_std") or STD,
        )

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores float32 [B] of images uint8 [B, C, H, W] and their prompts."""
        device = next(self.model.parameters()).device
        text = self.tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self.tokens,
            return_tensors="pt",
        )
        read = {n: text[n].to(device) for n in ("input_ids", "attention_mask")}
        words = _embedding(self.model.get_text_features(**read))
        seen = _embedding(self.model.get_image_features(self.prepare(images.to(device))))
        cosine = torch_f.cosine_similarity(seen.float(), words.float())
        return 100 * cosine.clamp(min=0)

    def prepare(self, images: Tensor) -> Tensor:
        """Model input: the shorter side resized (bicubic), the middle cut out, normalized."""
        x = rgb(images).float() / 255
        scale = self.side / min(x.shape[2:])
        size = [max(self.side, round(side * scale)) for side in x.shape[2:]]
        x = torch_f.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((side - self.side) // 2 for side in size)
        x = x[:, :, top : top + self.side, left : left + self.side]
        return (x - self.mean.to(x.device)) / self.std.to(x.device)


def _embedding(output: Any) -> Tensor:
    """Recent versions of transformers wrap the embedding."""
    return output if isinstance(output, Tensor) else output.pooler_output
