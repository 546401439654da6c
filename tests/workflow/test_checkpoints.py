"""Files of a training: loadable where its GPU is not."""

import torch
from torch import nn

from memnet.workflow.checkpoints import _on_cpu


def test_all_tensors_go_to_the_cpu(monkeypatch):
    """A file whose tensors lie on a GPU cannot be read without it, unless the reader thinks of that."""
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.rand(4, 2)).sum().backward()
    optimizer.step()
    state = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "scaler": None, "shapes": [(1, 2)]}
    tensors = [*state["model"].values(), *(x for s in state["optimizer"]["state"].values() for x in s.values())]
    copies = {id(x): x.clone() for x in tensors}
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: copies[id(x)])

    found = _on_cpu(state)
    assert list(found) == list(state)
    assert found["scaler"] is None and found["shapes"] == [(1, 2)]
    assert found["model"]._metadata == network.state_dict()._metadata
    assert found["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]
    moved = [*found["model"].values(), *(x for s in found["optimizer"]["state"].values() for x in s.values())]
    assert [id(x) for x in moved] == [id(copies[id(x)]) for x in tensors]
    assert all(x is not y for x, y in zip(state["model"].values(), found["model"].values(), strict=True))
