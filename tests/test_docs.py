"""What the pages under docs show has to work."""

import re
from pathlib import Path

import pytest
import torch

from tim import ops

DOCS = Path(__file__).parents[1] / "docs"


def test_the_example_of_attention_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "attention.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    q, k, v, t_q, t_k, t_v = (names[name] for name in ("q", "k", "v", "t_q", "t_k", "t_v"))
    with torch.no_grad():
        moving = (q, k, v), (t_q, t_k, t_v)
        expected = torch.func.jvp(ops.attention_reference, *moving)
        torch.testing.assert_close((names["out"], names["t_out"]), expected, rtol=1e-4, atol=1e-5)
        rows = names["rows_q"], names["rows_k"]
        packed = torch.func.jvp(
            lambda q, k, v: ops.attention_reference(q, k, v, None, *rows),
            *(tuple(x[:1] for x in some) for some in moving),
        )
    actual = names["packed"], names["t_packed"]
    torch.testing.assert_close(actual, packed, rtol=1e-4, atol=1e-5)
    assert q.grad.abs().max() > 0 and not names["t_out"].requires_grad
    assert packed[1].abs().max() > 0


def test_the_example_of_packed_batches_runs():
    page = (DOCS / "native_resolution.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {}
    exec(code, names)
    shapes = [image.shape for image in names["x"]]
    assert len(set(shapes)) == 3
    for result in ("F", "dF", "pictures"):
        assert [image.shape for image in names[result]] == shapes, result
    assert names["out"].loss.isfinite()


def test_the_example_of_the_service_runs():
    section = (DOCS / "sampling.md").read_text().partition("## As a service")[2]
    names: dict = {}
    exec(re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0], names)
    assert [image.shape for image in names["latents"]] == [(4, 8, 8), (4, 8, 8), (4, 8, 12)]
    assert names["sampler"].model.x_embedder.proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_files_and_headings_that_a_page_names_exist(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {h.lower().replace(" ", "-") for h in headings}, target


def test_every_fault_of_the_table_is_a_test():
    table = (DOCS / "distributed.md").read_text().partition("## Faults")[2].partition("## From")[0]
    files = ("test_faults.py", "test_data_workers.py", "test_torchrun.py")
    faults = "".join((DOCS.parent / "tests/distributed" / name).read_text() for name in files)
    rows = [row for row in table.splitlines() if row.startswith("| ") and "---" not in row][1:]
    assert len(rows) >= 9
    for row in rows:
        (first, *_) = re.findall(r"`(test_\w+)`", row)
        assert f"def {first}(" in faults, row
