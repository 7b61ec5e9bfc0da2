"""Sampling at 4096 x 4096 needs memory in proportion to the tokens, and what it needs is known."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, resource, torch, tim
from tim.models import TiMConfig
torch.set_num_threads(1)
config = TiMConfig(input_size=16, patch_size=1, in_channels=32, hidden_size={width}, depth=1,
    num_heads=1, encoder_depth=1, lora_hidden_size=8, rope_scaling="yarn", {kind})
model = tim.TiM(config).eval()
transport = tim.transports.get("ot_fm")
y = torch.ones(1, dtype=torch.long) if config.num_classes else torch.randn(1, 256, 8)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def grown(side):
    noise = torch.randn(1, 32, side, side)
    before = peak()
    out = tim.sample(model, y, noise, steps=1, transport=transport)
    assert out.shape == noise.shape and out.isfinite().all()
    return peak() - before

grown(8)
print(json.dumps([grown(side) for side in {sides}]))
"""
KINDS = {"labels": "num_classes=10", "captions": "num_classes=None, cap_feat_dim=8"}
SIDES = (64, 128)  #: 2048 x 2048 and 4096 x 4096 pixels at 32 to a latent position
WIDTH = 64
#: Numbers of WIDTH, in float32, that sampling holds for each token at a time; docs.
MOST_PER_TOKEN = 32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts other things elsewhere")
def test_memory_at_4096_pixels_is_that_of_its_tokens(kind):
    """One matrix of 16384 x 16384 scores of one head would be a gigabyte."""
    script = SCRIPT.format(width=WIDTH, kind=KINDS[kind], sides=SIDES)
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    growths = json.loads(output.stdout)
    largest = sum(growths)  # the second size finds the first one's memory free
    tokens = SIDES[-1] ** 2
    assert largest < MOST_PER_TOKEN * tokens * WIDTH * 4
