"""What training asks of a chain besides its gradient, each asked of every implementation: yes, no, or the error."""

from __future__ import annotations

import copy
import multiprocessing
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from monai.data import MetaTensor
from torch import distributed, nn

from memnet.benchmarks.peers.implementations import IMPLEMENTATIONS, Branches
from memnet.benchmarks.tables import markdown_table

__all__ = ["PROBES", "ask", "pitfall_table", "probe_all"]

_CHANNELS, _SIZE = 4, 5

Build = Callable[[Branches], nn.Module]


def probe_all(names: Sequence[str] = tuple(IMPLEMENTATIONS), patience: float = 60.0) -> dict[str, dict[str, str]]:
    """Run every probe on every implementation that is installed, each in a process of its own.

    Args:
        names: words of :data:`IMPLEMENTATIONS`.
        patience: seconds to wait for an answer.

    Returns:
        For each word and probe ``yes``, ``no`` (a wrong result, in silence), the name of the exception raised, ``crash`` (a
        library that resizes storages can take the process down with it) or ``hang``.
    """
    # forked of a process that has imported and no more: imports take longer than the probes, and a GPU's runtime is not inherited
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    answers: dict[str, dict[str, str]] = {}
    for name in names:
        if IMPLEMENTATIONS[name].missing is None:
            answers[name] = {}
            for what, probe in PROBES.items():
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_send_answer, args=(name, probe, sender))
                process.start()
                sender.close()
                try:
                    answers[name][what] = receiver.recv() if receiver.poll(patience) else "hang"
                except EOFError:
                    answers[name][what] = "crash"
                process.kill()
                process.join()
    return answers


def pitfall_table(answers: dict[str, dict[str, str]], names: Sequence[str] = tuple(IMPLEMENTATIONS)) -> str:
    """Return a markdown table with a row for each probe and a column for each implementation."""
    rows = [[what, *(answers[name][what] if name in answers else "-" for name in names)] for what in PROBES]
    if missing := [name for name in names if name not in answers]:
        rows.append(["", *(str(IMPLEMENTATIONS[name].missing) if name in missing else "" for name in names)])
    return markdown_table(["", *(IMPLEMENTATIONS[name].title for name in names)], rows)


def _send_answer(name: str, probe: Callable[[Build], bool], sender: Connection) -> None:
    warnings.simplefilter("ignore")  # other libraries use what PyTorch has deprecated
    torch.set_num_threads(1)
    sender.send(ask(probe, IMPLEMENTATIONS[name].build))


def ask(probe: Callable[[Build], bool], build: Build) -> str:
    """Run one probe, a value of :data:`PROBES`, in this process; see :func:`probe_all` for the answer."""
    try:
        return "yes" if probe(build) else "no"
    except Exception as error:  # whatever another library raises is its answer
        return type(error).__name__


class _Net(nn.Module):
    """A stem, what may come between, a chain of two couplings, a head; the same weights in each implementation.

    Args:
        build: makes the chain of its branches.
        more: layers that end each branch.
        between: a layer before the chain.
    """

    def __init__(self, build: Build, *more: nn.Module, between: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv3d(1, _CHANNELS, 1), nn.Conv3d(_CHANNELS, 1, 1)
        self.between = nn.Identity() if between is None else between
        n = _CHANNELS // 2

        def branch() -> nn.Module:
            layers = [nn.GroupNorm(1, n), nn.LeakyReLU(), nn.Conv3d(n, n, 3, padding=1), *copy.deepcopy(more)]
            return nn.Sequential(*layers)

        branches = [(branch(), branch()) for _ in range(2)]
        self.chain = build(branches)
        # in an order that does not depend on how the implementation registers them; a list, so that it registers nothing
        self.ordered = [self.stem, *(module for pair in branches for module in pair), self.head]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.chain(self.between(self.stem(x))))

    def ordered_parameters(self) -> list[nn.Parameter]:
        return [p for module in self.ordered for p in module.parameters()]


def _image(channels: int = 1) -> torch.Tensor:
    return torch.randn(2, channels, _SIZE, _SIZE, _SIZE, generator=torch.Generator().manual_seed(1))


def _loss(y: torch.Tensor) -> torch.Tensor:
    weights = torch.arange(y.numel(), device=y.device).remainder(7).cos().view(y.shape)
    return (y * weights).sum() + y.square().mean()


def _gradients(net: _Net, run: Callable[[_Net], torch.Tensor] = lambda net: net(_image())) -> list[torch.Tensor | None]:
    """Gradients of all parameters after one step from a fixed seed, on a copy or not."""
    net.zero_grad()
    torch.manual_seed(7)
    _loss(run(net)).backward()
    return [p.grad for p in net.ordered_parameters()]


def _agree(
    found: Sequence[torch.Tensor | None], expected: Sequence[torch.Tensor | None], tolerance: float = 1e-3
) -> bool:
    if [x is None for x in found] != [x is None for x in expected]:
        return False
    a, b = (torch.cat([x.detach().flatten() for x in tensors if x is not None]) for tensors in (found, expected))
    return bool((a - b).norm() <= tolerance * b.norm())


def _plain(*more: nn.Module, between: nn.Module | None = None) -> _Net:
    return _Net(IMPLEMENTATIONS["plain"].build, *more, between=between)


def _same_step(build: Build, run: Callable[[_Net], torch.Tensor], *more: nn.Module) -> bool:
    return _agree(_gradients(_Net(build, *more), run), _gradients(_plain(*more), run))


def _gradient(build: Build) -> bool:
    return _same_step(build, lambda net: net(_image()))


def _input_without_gradient(build: Build) -> bool:
    return _same_step(build, lambda net: net.head(net.chain(_image(_CHANNELS))))


def _input_used_again(build: Build) -> bool:
    def run(net: _Net) -> torch.Tensor:
        features = net.stem(_image())
        return net.head(net.chain(features) * features.sigmoid())

    return _same_step(build, run)


def _used_twice(build: Build) -> bool:
    return _same_step(build, lambda net: net.head(net.chain(net.chain(net.stem(_image())))))


def _relu_before(build: Build) -> bool:
    relu = nn.ReLU(inplace=True)
    return _agree(_gradients(_Net(build, between=relu)), _gradients(_plain(between=relu)))


def _metatensor(build: Build) -> bool:
    net, twin = _Net(build), _plain()
    image = MetaTensor(_image(), affine=2 * torch.eye(4), meta={"filename_or_obj": "scan.nii"})
    y = net.chain(net.stem(image))
    kept = isinstance(y, MetaTensor) and y.meta.get("filename_or_obj") == "scan.nii"
    _loss(torch.as_tensor(net.head(y))).backward()
    return kept and _agree([p.grad for p in net.ordered_parameters()], _gradients(twin))


def _frozen(build: Build) -> bool:
    nets = _Net(build), _plain()
    for net in nets:
        net.ordered[1].requires_grad_(False)
    found, expected = map(_gradients, nets)
    return _agree(found, expected)


def _hooks(build: Build) -> bool:
    net = _Net(build)
    seen: list[list[torch.Tensor]] = [[] for _ in net.ordered_parameters()]
    for calls, parameter in zip(seen, net.ordered_parameters(), strict=True):
        parameter.register_hook(lambda gradient, calls=calls: calls.append(gradient.clone()))
    expected = _gradients(_plain())
    _gradients(net)
    return all(len(calls) == 1 for calls in seen) and _agree([calls[0] for calls in seen], expected)


def _autograd_grad(build: Build) -> bool:
    net = _Net(build)
    expected = _gradients(_plain())
    found = torch.autograd.grad(_loss(net(_image())), net.ordered_parameters())
    return _agree(found, expected) and all(p.grad is None for p in net.parameters())


def _backward_twice(build: Build) -> bool:
    net = _Net(build)
    loss = _loss(net(_image()))
    loss.backward(retain_graph=True)
    loss.backward()
    return _agree([p.grad for p in net.ordered_parameters()], [2 * g for g in _gradients(_plain()) if g is not None])


def _second_derivative(build: Build) -> bool:
    def second(net: _Net) -> list[torch.Tensor | None]:
        first = torch.autograd.grad(_loss(net(_image())), net.stem.weight, create_graph=True)[0]
        first.square().sum().backward()
        return [p.grad for p in net.ordered_parameters()]

    return _agree(second(_Net(build)), second(_plain()))


def _dropout(build: Build) -> bool:
    return _same_step(build, lambda net: net(_image()), nn.Dropout(0.5))


def _random_state(build: Build) -> bool:
    _gradients(_plain(nn.Dropout(0.5)))
    expected = torch.get_rng_state()
    _gradients(_Net(build, nn.Dropout(0.5)))
    return torch.equal(torch.get_rng_state(), expected)


def _batch_statistics(build: Build) -> bool:
    nets = _Net(build, nn.BatchNorm3d(_CHANNELS // 2)), _plain(nn.BatchNorm3d(_CHANNELS // 2))
    gradients, right = (_gradients(net) for net in nets)
    found, expected = ([b for module in net.ordered for b in module.buffers()] for net in nets)
    moved = all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(found, expected, strict=True))
    return moved and _agree(gradients, right)


def _autocast(build: Build) -> bool:
    def run(net: _Net) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net(_image()).float()

    return _agree(_gradients(_Net(build), run), _gradients(_plain()), tolerance=0.05)


def _copied(build: Build) -> bool:
    net = _Net(build)
    expected = _gradients(net)
    twin = copy.deepcopy(net)
    return _agree(_gradients(twin), [None if g is None else g.clone() for g in expected])


def _data_parallel(build: Build, find_unused: bool = False) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group("gloo", init_method=f"file://{Path(folder) / 'store'}", rank=0, world_size=1)
        try:
            net = _Net(build)
            wrapped = nn.parallel.DistributedDataParallel(net, find_unused_parameters=find_unused)
            reduced: list[int] = []
            wrapped.register_comm_hook(reduced, _count_and_keep)
            for _ in range(2):
                found = _gradients(net, lambda net: wrapped(_image()))
            size = sum(p.numel() for p in net.parameters())
            return sum(reduced) == 2 * size and _agree(found, _gradients(_plain()))
        finally:
            distributed.destroy_process_group()


def _count_and_keep(reduced, bucket):  # DDP compares annotations with types, and refuses their names
    """Stand in for the sum over processes, which one process cannot show: every gradient must have come here."""
    reduced.append(bucket.buffer().numel())
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


PROBES: dict[str, Callable[[Build], bool]] = {
    "gradient of every parameter": _gradient,
    "an input that needs no gradient": _input_without_gradient,
    "the input is used again, after the chain": _input_used_again,
    "in-place ReLU before the chain": _relu_before,
    "the chain is used twice in one pass": _used_twice,
    "MetaTensor in, MetaTensor out": _metatensor,
    "frozen branch": _frozen,
    "hooks see each gradient once and whole": _hooks,
    "`torch.autograd.grad`, nothing written to `.grad`": _autograd_grad,
    "backward twice (`retain_graph`)": _backward_twice,
    "second derivative": _second_derivative,
    "dropout: gradient of the same masks": _dropout,
    "dropout: random state afterwards": _random_state,
    "batch norm: statistics move once": _batch_statistics,
    "autocast to bfloat16": _autocast,
    "`copy.deepcopy` after a step": _copied,
    "`DistributedDataParallel`": _data_parallel,
    "`DistributedDataParallel(find_unused_parameters=True)`": partial(_data_parallel, find_unused=True),
}
"""What is asked, in words; each probe gets a way to build a chain."""
