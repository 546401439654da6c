"""When a training validates, and what is scored."""

from __future__ import annotations

import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.engines import Evaluator

from memnet.workflow.evaluation import RequireFinite, ValidationHandler


@pytest.mark.parametrize(
    ("interval", "epochs", "expected"), [(8, 5, [5]), (2, 5, [2, 4, 5]), (2, 4, [2, 4]), (1, 2, [1, 2])]
)
def test_the_last_epoch_is_validated(interval: int, epochs: int, expected: list[int]) -> None:
    """A fine-tuning of fewer epochs than the interval had no best weights."""
    validated: list[int] = []
    evaluator = Evaluator.__new__(Evaluator)
    evaluator.run = validated.append  # type: ignore[method-assign, assignment]
    engine = Engine(lambda engine, batch: None)
    ValidationHandler(interval, evaluator, epoch_level=True).attach(engine)
    engine.run([0], max_epochs=epochs)
    assert validated == expected


def test_an_output_that_is_not_finite_ends_an_evaluation() -> None:
    """It was left out of the mean, as if it were not one of the cases."""
    image = MetaTensor(torch.rand(1, 4), meta={"filename_or_obj": "b.h5"})
    outputs = [
        {"image": image, "pred": torch.rand(1, 4)},
        {"image": image, "pred": torch.tensor([[1, torch.nan, 2, torch.inf]])},
    ]
    engine = Engine(lambda engine, batch: [batch])
    RequireFinite().attach(engine)
    engine.run(outputs[:1])
    with pytest.raises(ValueError, match="b.h5: 2 of 4 values of the output are NaN or infinite"):
        engine.run(outputs)
