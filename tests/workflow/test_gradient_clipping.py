import pytest
import torch
from ignite.engine import Engine
from monai.engines import SupervisedTrainer
from torch import nn

from memnet.workflow.gradient_clipping import GradientClipping


def train(max_norm: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights' change by one step of plain gradient descent, and the gradient that no one clipped."""
    network = nn.Linear(4, 3)
    nn.init.ones_(network.weight)
    batch = {"image": torch.full((2, 4), 10.0), "label": torch.zeros(2, 3)}
    before = torch.cat([p.detach().flatten().clone() for p in network.parameters()])
    loss = nn.functional.mse_loss(network(batch["image"]), batch["label"])
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])
    SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=[batch],
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
        loss_function=nn.MSELoss(),
        train_handlers=[GradientClipping(network, max_norm)],
    ).run()
    return torch.cat([p.detach().flatten() for p in network.parameters()]) - before, gradient


@pytest.mark.parametrize(("max_norm", "norm"), [(0.5, 0.5), (1e6, None), (None, None)])
def test_gradient_is_scaled_down_where_it_is_too_long(max_norm, norm):
    step, gradient = train(max_norm)
    torch.testing.assert_close(step, -gradient * (1 if norm is None else norm / gradient.norm()), rtol=1e-4, atol=1e-4)


def test_bound_is_refused():
    with pytest.raises(ValueError, match="above 0, got 0"):
        GradientClipping(nn.Identity(), 0)


def test_scaled_gradients_are_refused():
    trainer = Engine(lambda engine, batch: None)
    trainer.scaler = object()
    with pytest.raises(ValueError, match="scales gradients"):
        GradientClipping(nn.Identity(), 1.0).attach(trainer)
