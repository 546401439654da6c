"""Exporters and compilers see plain modules, and their results are the eager ones."""

import io

import onnxruntime
import pytest
import torch
from checks import MEMORIES, Net, couplings, streams, weigh
from torch import nn

from memnet import FullyInvResUNet

# TorchScript is deprecated, and the exporters and the compiler warn of what they do themselves.
pytestmark = pytest.mark.filterwarnings("ignore")


class Scriptable(nn.Module):
    """A chain as a network that TorchScript must read uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = couplings(2)
        self.chain.memory = "invert"

    def forward(self, x1: torch.Tensor, x2: torch.Tensor) -> list[torch.Tensor]:
        if torch.jit.is_scripting():
            return self.chain.plain([x1, x2])
        return list(self.chain(x1, x2))


@pytest.fixture(params=["store", *MEMORIES])
def net(request) -> Net:
    net = Net(couplings(2))
    net.memory = request.param
    return net


@pytest.fixture
def unet() -> FullyInvResUNet:
    return FullyInvResUNet(2, 1, 3, channels=8, n_levels=2, n_couplings=1, memory="invert").eval()


def test_script():
    net, inputs = Scriptable(), streams()
    for a, b in zip(torch.jit.script(net)(*inputs), net(*inputs), strict=True):
        assert torch.equal(a, b)


def test_trace(net):
    (x,) = streams(2, 1, 6, n=1)
    traced = torch.jit.trace(net, x)
    assert "PythonOp" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), net(x))


def test_export(net):
    (x,) = streams(2, 1, 6, n=1)
    exported = torch.export.export(net, (x,))
    targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert targets and all(isinstance(target, torch._ops.OpOverload) for target in targets), targets
    assert torch.equal(exported.module()(x), net(x))


def _onnx(module, x):
    file = io.BytesIO()
    torch.onnx.export(module.eval(), (x,), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def test_onnx_of_a_chain():
    net, (x,) = Net(couplings(2)), streams(2, 1, 6, n=1)
    net.memory = "invert"
    torch.testing.assert_close(_onnx(net, x), net(x).detach(), rtol=1e-3, atol=1e-3)


def test_onnx_of_a_network(unet):
    (x,) = streams(1, 1, 6, 7, n=1)
    torch.testing.assert_close(_onnx(unet, x), unet(x).detach(), rtol=1e-3, atol=1e-3)


def test_compile(net):
    (x,) = streams(2, 1, 6, n=1)
    eager = net(x)
    gradients = torch.autograd.grad(weigh([eager]), list(net.parameters()))
    compiled = torch.compile(net, backend="aot_eager")(x)
    assert torch.equal(compiled, eager)
    for a, b in zip(torch.autograd.grad(weigh([compiled]), list(net.parameters())), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
