"""Plots of stage 72 and of runs/picture.py."""

from common.evaluation.plots import plot_bars, whiskers


def test_a_mean_a_rounding_outside_its_bounds_is_drawn(tmp_path):
    mean = sum([0.1] * 3) / 3  # 0.10000000000000002
    assert mean > 0.1 and whiskers(mean, 0.1, 0.1) == (mean - 0.1, 0.0)
    assert plot_bars({"distinct_1": {"sft": (mean, 0.1, 0.1)}}, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").is_file()
