"""The precisions of a GPU's autocast on a CPU: those that PyTorch's reference names."""

import copy

import pytest
import torch
from checks import MEMORIES
from torch import nn
from torch.nn import functional

from memnet import AdditiveCoupling, Chain, ChannelMerge, ChannelSplit
from memnet.accounting.autocast_of_cuda import AutocastOfCuda
from memnet.accounting.dry_run import dry_run
from memnet.accounting.planner import TrainingStep

FUNCTIONS = {
    "group norm": (nn.GroupNorm(2, 4), torch.float32, torch.bfloat16),
    "softmax": (nn.Softmax(1), torch.float32, torch.bfloat16),
    "sum": (lambda x: x.sum(1), torch.float32, torch.bfloat16),
    "power": (lambda x: x**2, torch.float32, torch.bfloat16),
    "interpolation": (nn.Upsample(scale_factor=2, mode="trilinear"), torch.float32, torch.bfloat16),
    "max pooling": (nn.MaxPool3d(2), torch.bfloat16, torch.float32),
    "padding": (lambda x: functional.pad(x, [1] * 6, "replicate"), torch.bfloat16, torch.float32),
    "convolution": (nn.Conv3d(4, 4, 1), torch.bfloat16, torch.bfloat16),
    "instance norm": (nn.InstanceNorm3d(4), torch.bfloat16, torch.bfloat16),
    "activation": (nn.LeakyReLU(), torch.bfloat16, torch.bfloat16),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_precision_is_that_of_cuda_and_not_of_a_cpu(name):
    function, of_cuda, of_cpu = FUNCTIONS[name]
    x = torch.randn(1, 4, 4, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert function(x).dtype == of_cpu
        with AutocastOfCuda():
            y = function(x)
    assert y.dtype == of_cuda
    y.float().square().sum().backward()
    assert x.grad.dtype == torch.bfloat16 and x.grad.any()


def test_without_autocast_nothing_changes():
    with AutocastOfCuda():
        assert nn.Softmax(1)(torch.randn(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("memory", MEMORIES)
def test_what_runs_again_runs_under_it(memory):
    """PyTorch turns such modes off in a backward pass, and recomputed norms were foretold in bfloat16."""
    peaks = {}
    for norm in (nn.GroupNorm(4, 8), nn.Identity()):
        branches = [nn.Sequential(nn.Conv3d(8, 8, 1), norm, nn.SiLU(), nn.Conv3d(8, 8, 1)) for _ in range(4)]
        blocks = [AdditiveCoupling(f, g) for f, g in zip(branches[::2], branches[1::2], strict=True)]

        def make(blocks=blocks):
            network = copy.deepcopy(Chain([ChannelSplit(), *blocks, ChannelMerge()], memory))
            image = torch.rand(1, 16, 32, 32, 32, requires_grad=True)

            def run():
                with AutocastOfCuda(), torch.autocast("cpu", torch.bfloat16):
                    y = network(image)
                y.float().sum().backward()

            return run, list(network.parameters())

        peaks[type(norm)] = dry_run(make, "cuda").peak
    # the output of a norm alone, 8 channels in float32
    assert peaks[nn.GroupNorm] - peaks[nn.Identity] >= 4 * 8 * 32**3


def test_a_plan_for_a_gpu_counts_norms_in_float32():
    """They were foretold in bfloat16, half of what a network of group norms keeps."""
    network = {"_target_": "SegResNet", "in_channels": 1, "out_channels": 3, "init_filters": 8}
    peaks = {}
    for norm in (("GROUP", {"num_groups": 8}), ("INSTANCE", {"affine": True})):
        content = {"network_def": {**network, "norm": norm}, "patch_size": [32, 32, 32]}
        peaks[norm[0]] = TrainingStep(content, device="cuda").plan(None, "bfloat16").peak
    assert peaks["GROUP"] > 1.5 * peaks["INSTANCE"]
