"""What the README shows has to work."""

import re
from pathlib import Path

import torch

import tim
from tim.cli import COMMANDS
from tim.presets import PRESETS

README = Path(__file__).parents[1] / "README.md"


def test_python_example_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) <= 15
    config = tim.TiMConfig(
        input_size=8, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=10
    )
    model = tim.TiM(config)
    with torch.no_grad():
        # A fresh network is zero and has no derivative; the example loads a trained one.
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    names: dict = {}
    exec(code.replace("runs/demo", str(tmp_path)), names)
    assert names["images"].shape == (64, 1, 8, 8)
    assert names["dF"].abs().max() > 0 and not names["dF"].requires_grad


def test_commands_and_presets_exist():
    lines = [line for line in README.read_text().splitlines() if line.startswith("    tim ")]
    assert len(lines) >= 5
    for line in lines:
        command, *rest = line.split()[1:]
        assert command in COMMANDS, line
        if command == "train":
            assert rest[0] in PRESETS, line


def test_files_and_headings_it_names_exist():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README.read_text()):
        name, _, anchor = target.partition("#")
        path = README.parent / name
        assert path.is_file(), target
        headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {h.lower().replace(" ", "-") for h in headings}, target
