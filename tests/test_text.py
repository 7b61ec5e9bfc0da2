import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

from small_encoders import cut_in_half, gemma, saved, t5, tokenizer
from tim.text import TextEncoder, escaped

CAPTIONS = ["a photo of red cat on grass", "dog", "blue dog on grass"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("gemma"), gemma(), tokenizer())


@pytest.fixture
def encoder(folder):
    return TextEncoder.load(str(folder))


def test_loads_the_decoder_of_a_language_model(encoder):
    assert type(encoder.model).__name__ == "Gemma3TextModel"
    assert not encoder.model.training
    assert not any(p.requires_grad for p in encoder.model.parameters())
    assert encoder.features == 16
    assert TextEncoder.load(encoder.model.name_or_path, dtype=torch.bfloat16)(["cat"]).dtype == (
        torch.bfloat16
    )


def test_features_are_last_hidden_states_padded_on_the_right(encoder):
    features = encoder(CAPTIONS)
    assert features.shape == (3, 8, 16)
    for caption, row in zip(CAPTIONS, features, strict=True):
        ids = torch.tensor([encoder.tokenizer(caption)["input_ids"]])
        with torch.no_grad():
            alone = encoder.model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(row[: len(alone)], alone)


def test_length_does_not_change_the_states(encoder):
    long = encoder(CAPTIONS, tokens=20)
    assert long.shape == (3, 20, 16)
    torch.testing.assert_close(long[:, :8], encoder(CAPTIONS))
    torch.testing.assert_close(encoder(["dog"], 8)[0], encoder(CAPTIONS)[1])


def attend_without_padding(module, query, key, value, attention_mask, **options):
    """As transformers' flash attention: each caption alone, zeros in place of padding."""
    batch, heads, tokens, _ = query.shape
    out = torch.zeros(batch, tokens, heads, value.shape[-1], dtype=query.dtype)
    groups = heads // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    lengths = [tokens] * batch if attention_mask is None else attention_mask.sum(1).tolist()
    window = options.get("sliding_window") or tokens
    place = torch.arange(tokens)
    near = (place[:, None] >= place) & (place[:, None] - place < window)
    for i, n in enumerate(lengths):
        q, k, v = (x[i, :, :n] for x in (query, key, value))
        out[i, :n] = F.scaled_dot_product_attention(
            q, k, v, near[:n, :n], scale=options["scaling"]
        ).transpose(0, 1)
    return out, None


def test_padding_has_the_states_of_flash_attention(folder, encoder):
    from transformers import AttentionInterface, AttentionMaskInterface, Gemma3TextModel
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register("alone", attend_without_padding)
    AttentionMaskInterface.register("alone", flash_attention_mask)
    other = Gemma3TextModel.from_pretrained(folder, attn_implementation="alone").eval()
    ids, mask = encoder.tokenize(CAPTIONS)
    with torch.no_grad():
        expected = other(input_ids=ids, attention_mask=mask).last_hidden_state
        plain = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(encoder(CAPTIONS), expected)
    padding = mask == 0
    assert (plain - expected)[padding].abs().max() > 0.01
    # The hooks are gone after the call.
    with torch.no_grad():
        again = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(again, plain)


def test_null_condition_is_the_empty_caption(encoder):
    null = encoder.null(3, 8)
    assert null.shape == (3, 8, 16)
    torch.testing.assert_close(null[1], encoder([""], 8)[0])
    assert not torch.equal(null[0], encoder(["dog"], 8)[0])


def test_long_captions_are_cut_with_a_warning(folder):
    encoder = TextEncoder.load(str(folder), max_tokens=4)
    with pytest.warns(UserWarning, match=r"2 of 3 captions have more than 4 tokens .*'a photo of"):
        features = encoder(CAPTIONS)
    assert features.shape == (3, 4, 16)
    torch.testing.assert_close(features[0], encoder(["a photo of"])[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(["a photo of"])


def test_captions_are_escaped_as_the_released_ones(folder):
    assert escaped("a café\n“x”") == r"a caf\xe9\n\u201cx\u201d"
    seen = []
    encoder = TextEncoder.load(str(folder))
    original = encoder.tokenizer
    encoder.tokenizer = lambda texts, **options: seen.append(texts) or original(texts, **options)
    encoder(["é"])
    encoder.escape = False
    encoder(["é"])
    assert seen == [["\\xe9"]] * 2 + [["é"]] * 2


def test_encoder_of_t5(tmp_path):
    encoder = TextEncoder.load(str(saved(tmp_path, t5(), tokenizer())))
    assert type(encoder.model).__name__ == "T5EncoderModel"
    features = encoder(CAPTIONS)
    assert features.shape == (3, 8, 16)
    torch.testing.assert_close(features[1, :2], encoder(["dog"])[0])


def test_empty_caption_without_a_mark_of_its_beginning(encoder):
    from tokenizers import processors

    plain = tokenizer()
    plain.backend_tokenizer.post_processor = processors.Sequence([])
    features = TextEncoder(encoder.model, plain)([""])
    assert features.shape == (1, 1, 16)
    assert features.isfinite().all()


def test_refuses_what_are_no_captions(encoder):
    with pytest.raises(TypeError, match="captions must be a sequence of strings, got 'a cat'"):
        encoder("a cat")
    with pytest.raises(TypeError, match="captions must be a sequence of strings"):
        encoder([1, 2])
    with pytest.raises(ValueError, match="captions must not be empty"):
        encoder([])
    with pytest.raises(ValueError, match=r"tokens must be from 8 \(the longest .*\) to 256, got 5"):
        encoder(CAPTIONS, tokens=5)
    with pytest.raises(ValueError, match="to 256, got 300"):
        encoder(CAPTIONS, tokens=300)
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        TextEncoder(encoder.model, encoder.tokenizer, max_tokens=0)


def test_no_such_encoder(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^text_encoder must be a folder or hub id") as caught:
        TextEncoder.load(str(tmp_path))
    assert "\n" not in str(caught.value)
    folder = saved(tmp_path / "cut", gemma(), tokenizer())
    cut_in_half(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"^text_encoder must be .* deserializing header"):
        TextEncoder.load(str(folder))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'transition-models\[t2i\]'"):
        TextEncoder.load(str(tmp_path))
