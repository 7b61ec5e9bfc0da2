import json

import pytest

from tim.evaluate.report import ImageQuality, not_better, plot

ROWS = {
    4: {"fid": 2.5, "kid": 0.002, "kid_std": 0.0001, "precision": 0.5, "recall": 0.6},
    1: {"fid": 3.0, "kid": 0.003, "kid_std": 0.0001, "precision": 0.4, "recall": 0.5},
    2: {"fid": 2.0, "kid": 0.002, "kid_std": 0.0001, "precision": 0.6, "recall": 0.55},
}


@pytest.fixture
def quality():
    return ImageQuality(
        source="run", features="inception", reference="r.npz", reference_images=9, samples=5,
        seed=0, cfg_scale=1.0, settings="abc", rows=dict(ROWS),
    )  # fmt: skip


def test_steps_that_did_not_help_are_named_by_metric(quality):
    assert quality.not_better() == {
        "fid": [(2, 4)],  # worse
        "kid": [(2, 4)],  # level
        "precision": [(2, 4)],  # more is better
        "recall": [],
    }
    assert not_better([1, 2, 4], [3, 2, 1]) == []
    assert not_better([1, 2, 4], [3, 2, 1], less_is_better=False) == [(1, 2), (2, 4)]


def test_table_is_in_order_of_steps(quality):
    assert quality.metrics == ["fid", "kid", "precision", "recall"]
    assert quality.cells()[0] == ["1", "3.00", "3.000", "0.400", "0.500"]
    assert [row[0] for row in quality.cells()] == ["1", "2", "4"]


def test_files_are_whole_and_read_back(quality, tmp_path):
    assert ImageQuality.read(tmp_path) is None
    quality.write(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evaluation.json", "evaluation.png"]
    assert (tmp_path / "evaluation.png").stat().st_size > 10_000
    values = json.loads((tmp_path / "evaluation.json").read_text())
    assert values["not_better"]["fid"] == [[2, 4]]
    assert [row["steps"] for row in values["rows"]] == [1, 2, 4]
    assert ImageQuality.read(tmp_path) == quality
    (tmp_path / "evaluation.json").write_text("{")
    assert ImageQuality.read(tmp_path) is None


def test_plot_has_a_panel_for_each_metric(quality):
    figure = plot(quality)
    assert len(figure.axes) == 4
    assert list(figure.axes[0].lines[0].get_ydata()) == [3.0, 2.0, 2.5]
    assert list(figure.axes[1].lines[0].get_ydata()) == [3.0, 2.0, 2.0]
    quality.rows = {s: {"fid": row["fid"]} for s, row in ROWS.items()}
    assert len(plot(quality).axes) == 1
