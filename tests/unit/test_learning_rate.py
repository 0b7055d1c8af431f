"""The learning rate over the steps."""

from __future__ import annotations

import pytest

from rollmesh.job import LearningRateSpec
from services.coordinator.learning_rate import learning_rate


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        pytest.param({}, [8, 8, 8, 8, 8], id="constant"),
        pytest.param({"warmup_steps": 3}, [2, 4, 6, 8, 8], id="warm-up"),
        pytest.param({"schedule": "linear"}, [8, 6, 4, 2, 0], id="linear"),
        pytest.param({"schedule": "linear", "final": 4}, [8, 7, 6, 5, 4], id="linear to final"),
        pytest.param(
            {"schedule": "linear", "warmup_steps": 1, "final": 2}, [4, 8, 6, 4, 2], id="both"
        ),
        pytest.param({"schedule": "cosine"}, [8, 4 + 8**0.5, 4, 4 - 8**0.5, 0], id="cosine"),
        pytest.param(
            {"schedule": "cosine", "warmup_steps": 4}, [1.6, 3.2, 4.8, 6.4, 8], id="peak is last"
        ),
        pytest.param(
            {"schedule": "linear", "warmup_steps": 9}, [0.8, 1.6, 2.4, 3.2, 4], id="never at peak"
        ),
    ],
)
def test_schedule(spec, expected):
    rate = LearningRateSpec.model_validate({"peak": 8, **spec})
    found = [learning_rate(rate, step, max_steps=5) for step in range(5)]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_job_of_one_step_has_the_peak(schedule):
    rate = LearningRateSpec(peak=8, schedule=schedule)
    assert learning_rate(rate, 0, max_steps=1) == 8
