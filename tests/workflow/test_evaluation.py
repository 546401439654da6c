"""When a training validates, and what is scored."""

from __future__ import annotations

import pytest
import torch
from ignite.engine import Engine
from monai.data import DataLoader, MetaTensor
from monai.engines import Evaluator, SupervisedEvaluator
from torch import nn

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


@pytest.mark.parametrize("several", [False, True])
def test_an_output_that_is_not_finite_ends_an_evaluation(several: bool) -> None:
    """It passed for a class, or was left out of the mean as if it were not one of the cases."""
    data = [
        {"image": MetaTensor(torch.rand(1, 4), meta={"filename_or_obj": f"{k}.h5"}), "label": torch.ones(1)}
        for k in range(3)
    ]
    network = nn.Identity()
    bad = torch.tensor([[[1, torch.nan, 2, torch.inf]]])
    outputs = iter([torch.rand(1, 1, 4), torch.rand(1, 1, 4), bad])
    network.forward = lambda x: (next(outputs), None) if several else next(outputs)  # type: ignore[method-assign, assignment]
    evaluator = SupervisedEvaluator(
        torch.device("cpu"),
        DataLoader(data, batch_size=1),
        network,
        val_handlers=[RequireFinite()],
        decollate=not several,
    )
    with pytest.raises(ValueError, match="2.h5: 2 of 4 values of the output are NaN or infinite"):
        evaluator.run()


@pytest.mark.parametrize(
    ("options", "expected"), [({"epoch_level": False}, [1, 2, 2]), ({"exec_at_start": True}, [0, 2])]
)
def test_other_ways_to_validate_are_monais(options: dict[str, bool], expected: list[int]) -> None:
    validated: list[int] = []
    evaluator = Evaluator.__new__(Evaluator)
    evaluator.run = validated.append  # type: ignore[method-assign, assignment]
    engine = Engine(lambda engine, batch: None)
    ValidationHandler(2, evaluator, **{"epoch_level": True, **options}).attach(engine)
    engine.run([0, 0, 0], max_epochs=2)
    assert validated == expected
