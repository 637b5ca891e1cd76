"""The health of attention levels."""

import numpy as np
import pytest
import torch

from training.attention_health import LevelHealth, attention_health, health_warnings


def test_health_against_a_few_lines_of_numpy():
    generator = torch.Generator().manual_seed(0)
    scores = {level: torch.randn(3, 8, 6, generator=generator) * 2 for level in ("conv7", "conv10")}
    health = attention_health(scores, {"conv7": 0.5}, sigmoid_levels=("conv10",))
    for level, score in scores.items():
        flat = score.numpy().astype(np.float64).reshape(3, -1)
        weights = np.exp(flat) if level == "conv7" else 1 / (1 + np.exp(-flat))
        p = weights / weights.sum(axis=1, keepdims=True)
        assert health[level].score_sd == pytest.approx(flat.std(axis=1).mean(), rel=1e-12)
        assert health[level].score_sd_max == pytest.approx(flat.std(axis=1).max(), rel=1e-12)
        assert health[level].entropy == pytest.approx(
            (-p * np.log(p)).sum(axis=1).mean() / np.log(48), rel=1e-12
        )
    assert health["conv7"].gate_gradient == 0.5 and health["conv10"].gate_gradient is None


def test_health_at_the_extremes():
    flat, spike = torch.full((2, 4, 4), -3.0), torch.zeros(2, 4, 4)
    spike[:, 1, 2] = 1000.0
    health = attention_health({"flat": flat, "spike": spike, "bf16": spike.bfloat16()}, {})
    assert health["flat"].score_sd_max == 0 and health["flat"].entropy == pytest.approx(1)
    assert health["spike"].entropy == 0 == health["bf16"].entropy


def test_warnings_name_the_level_and_say_what_is_wrong():
    well = LevelHealth(0.5, 0.7, 0.9, 0.1)
    assert health_warnings({"conv7": well, "conv10": LevelHealth(0.5, 0.7, 0.9, None)}) == []
    dead, uniform, one, still, broken = (
        health_warnings({"conv7": well, "conv10": each})
        for each in (
            LevelHealth(8e-9, 9e-9, 1.0, 0.1),
            LevelHealth(1e-9, 1e-3, 0.9999, 0.1),
            LevelHealth(9.0, 9.0, 0.001, 0.1),
            LevelHealth(0.5, 0.5, 0.5, 0.0),
            LevelHealth(float("nan"), float("nan"), float("nan"), 0.1),
        )
    )
    for found, words in (
        (dead, "is dead"),
        (uniform, "nearly uniform"),
        (one, "one position only"),
        (still, "zero gate gradient"),
        (broken, "non-finite"),
    ):
        ((key, text),) = found
        assert (
            key.startswith("conv10/")
            and text.startswith("attention level conv10")
            and words in text
        )
    assert "9.0e-09 < 1e-06" in dead[0][1]
