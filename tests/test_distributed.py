"""Data-parallel training with two processes, parameters copied or sharded, gives the mean of the gradients of one."""

import pytest
import torch
from checks import MEMORIES, Net, couplings, weigh
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

WAYS = {"plain": {}, "find_unused": {"find_unused_parameters": True}, "static": {"static_graph": True}}


def make_net(memory, unused: bool) -> nn.Module:
    torch.manual_seed(0)
    net = Net(couplings(2))
    net.memory = memory
    if unused:
        net.spare = nn.Linear(2, 2)
    return net


def gradients_of(net: nn.Module, module: nn.Module, batches) -> list[dict[str, torch.Tensor]]:
    """Gradients of consecutive steps without an update in between."""
    steps = []
    for x in batches:
        net.zero_grad()
        weigh([module(x)]).backward()
        gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        steps.append({name: g.full_tensor() if isinstance(g, DTensor) else g.clone() for name, g in gradients.items()})
    return steps


def train(rank: int, file: str, batches) -> None:
    """The body of one process; writes the gradients of every strategy and way."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    found = {}
    for memory in MEMORIES:
        for way, options in WAYS.items():
            net = make_net(memory, way == "find_unused")
            module = nn.parallel.DistributedDataParallel(net, **options)
            found[memory, way] = gradients_of(net, module, batches[rank])
        net = make_net(memory, unused=False)
        for module in (net.chain, net):  # a chain is the smallest unit: it needs its blocks' parameters at once
            fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
        found[memory, "sharded"] = gradients_of(net, net, batches[rank])
    net = make_net("store", unused=False)
    for block in net.chain:
        fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
    for net.memory in MEMORIES:
        with pytest.raises(ValueError, match="fully_shard to the chain"):
            net(batches[rank][0])
    torch.save(found, f"{file}.{rank}")
    distributed.destroy_process_group()


def test_two_processes_equal_the_mean_of_one(tmp_path):
    """Of every strategy and way of wrapping; one test, since starting processes takes longer than all of them."""
    file = str(tmp_path / "store")
    batches = [[torch.randn(2, 1, 6) for _ in range(3)] for _ in range(2)]
    multiprocessing.spawn(train, (file, batches), nprocs=2)
    for way in (*WAYS, "sharded"):
        net = make_net("store", way == "find_unused")
        alone = [gradients_of(net, net, batches[rank]) for rank in range(2)]
        for rank in range(2):
            found = torch.load(f"{file}.{rank}")
            for memory in MEMORIES:
                for there, first, second in zip(found[memory, way], *alone, strict=True):
                    mean = {name: (first[name] + second[name]) / 2 for name in first}
                    there = {name: gradient for name, gradient in there.items() if "spare" not in name}
                    assert there.keys() == mean.keys(), (memory, way)
                    assert all(torch.allclose(there[k], mean[k], rtol=1e-6, atol=1e-6) for k in mean), (memory, way)
