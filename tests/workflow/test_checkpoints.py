"""Files of a training: whole trainings go on from them, loadable where its GPU is not, and never of one that has diverged."""

import logging
import os
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from memnet.workflow.checkpoints import TrainingCheckpoint, _on_cpu, load_weights


def train(folder, n_steps, epochs=4, resume=False, rate=0.1, stop=None, spoil=None, cases=()):
    """Train a little network and return its file and the epochs that were run."""
    network = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    data = [{"image": name} for name in cases]
    loader = SimpleNamespace(dataset=SimpleNamespace(data=data))
    evaluator = SimpleNamespace(data_loader=loader, state=SimpleNamespace(best_metric=0.0, best_metric_epoch=0))
    seen = []

    def step(engine, batch):
        optimizer.zero_grad()
        network(torch.ones(1, 2)).square().sum().backward()
        optimizer.step()
        if engine.state.epoch == spoil:
            nn.init.constant_(network.bias, float("nan"))

    def note(engine):
        scheduler.step()
        seen.append(engine.state.epoch)

    engine = Engine(step)
    engine.add_event_handler(Events.EPOCH_COMPLETED, note)
    checkpoint = TrainingCheckpoint(folder, network, optimizer, scheduler, evaluator, resume=resume)
    checkpoint.attach(engine)
    if stop:
        engine.add_event_handler(
            Events.EPOCH_COMPLETED, lambda engine: engine.state.epoch == stop and engine.terminate()
        )
    engine.run(range(n_steps), max_epochs=epochs)
    return torch.load(folder / "model_last.pt", weights_only=True), seen


@pytest.mark.parametrize("n_steps", [3, 2, 1, 7])
def test_a_resumed_training_has_all_epochs_whatever_their_steps(n_steps, tmp_path, caplog):
    """With fewer in an epoch, as more processes make it, ignite ended it after so many steps, and nothing was said."""
    train(tmp_path, 3, stop=2)
    with caplog.at_level(logging.WARNING):
        state, seen = train(tmp_path, n_steps, resume=True)
    assert seen == [3, 4] and state["epoch"] == 4 and state["iteration"] == 4 * n_steps
    assert state["lr_scheduler"]["_last_lr"] == [0]
    assert ("an epoch had 3 steps and has" in caplog.text) == (n_steps != 3)


def test_curves_of_an_earlier_training_are_put_aside(tmp_path):
    """They were drawn over each other."""
    (tmp_path / "tensorboard").mkdir()
    for name, age in (("earlier", 3600), ("own", 0)):
        file = tmp_path / "tensorboard" / f"events.out.tfevents.{name}"
        file.touch()
        os.utime(file, (time.time() - age,) * 2)
    train(tmp_path, 1, epochs=1, resume=False)
    assert [f.name for f in (tmp_path / "tensorboard").iterdir()] == ["events.out.tfevents.own"]
    assert [f.name for f in (tmp_path / "tensorboard.previous").iterdir()] == ["events.out.tfevents.earlier"]


def test_weights_of_a_diverged_training_are_not_saved(tmp_path):
    """MONAI counts a metric that is not a number as 0, which is the best error there is."""
    with pytest.raises(
        ValueError, match="epoch 3: the training has diverged, its weights are NaN or infinite \\(bias\\)"
    ):
        train(tmp_path, 1, spoil=3)
    state = torch.load(tmp_path / "model_last.pt", weights_only=True)
    assert state["epoch"] == 2 and bool(state["model"]["bias"].isfinite().all())


def test_weights_that_are_not_finite_are_refused(tmp_path):
    weights = nn.Linear(2, 2).state_dict()
    weights["weight"][0, 1] = float("inf")
    torch.save(weights, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="model.pt: holds weights that are NaN or infinite"):
        load_weights(nn.Linear(2, 2), tmp_path / "model.pt")


def test_a_training_does_not_go_on_with_another_learning_rate_or_fold(tmp_path):
    """They were taken, and not used."""
    train(tmp_path, 2, stop=2, cases=["a/x.nii", "a/y.nii"])
    with pytest.raises(ValueError, match="learning rate began at 0.1, that of the training to go on with at 0.01"):
        train(tmp_path, 2, resume=True, rate=0.01, cases=["a/x.nii", "a/y.nii"])
    with pytest.raises(ValueError, match="validated with other cases \\(of 2, y.nii is in one of both alone\\)"):
        train(tmp_path, 2, resume=True, cases=["a/x.nii", "a/z.nii"])
    assert train(tmp_path, 2, resume=True, cases=["/moved/y.nii", "/moved/x.nii"])[1] == [3, 4]


def test_data_may_move_between(tmp_path, monkeypatch):
    """Their folder's name is not theirs, and may be a dot."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    cases = [[f"{folder}/s{k}/t1.nii" for k in (1, 2)] for folder in (".", "/elsewhere", "../there")]
    train(tmp_path, 2, stop=1, cases=cases[0])
    for stop, moved in zip((2, None), cases[1:], strict=True):
        assert train(tmp_path, 2, resume=True, cases=moved, stop=stop)[0]["epoch"] == (stop or 4)
    train(tmp_path / "one", 2, stop=1, cases=["a/s4.h5"])
    assert train(tmp_path / "one", 2, resume=True, cases=["s4.h5"])[0]["epoch"] == 4


def test_a_rate_that_was_changed_on_the_way_goes_on(tmp_path):
    """Without a schedule that notes it, nothing says where the rate began."""
    network = nn.Linear(2, 2)
    for resume in (False, True):
        optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
        engine = Engine(lambda engine, batch, optimizer=optimizer: optimizer.param_groups[0].update(lr=0.05))
        TrainingCheckpoint(tmp_path, network, optimizer, resume=resume).attach(engine)
        engine.run([0], max_epochs=1 + resume)
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_what_belongs_to_weights_goes_aside_with_them(tmp_path):
    """A training that had no weights yet put the split of another aside, in the place of the weights' own."""
    for name in "ABC":
        network = nn.Linear(2, 2)
        engine = Engine(lambda engine, batch: None)
        TrainingCheckpoint(tmp_path, network, torch.optim.Adam(network.parameters()), beside=["split.json"]).attach(
            engine
        )

        @engine.on(Events.STARTED)
        def _(engine, name=name):
            (tmp_path / "split.json").write_text(name)
            if name in "BC":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt) if name in "BC" else nullcontext():
            engine.run([0], max_epochs=1)
    assert (tmp_path / "model_last.previous.pt").exists() and not (tmp_path / "model_last.pt").exists()
    assert (tmp_path / "split.previous.json").read_text() == "A" and (tmp_path / "split.json").read_text() == "C"


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
