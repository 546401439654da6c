"""Exporters and compilers see plain modules, and their results are the eager ones, also where memnet is missing."""

import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import onnxruntime
import pytest
import torch
from bundle_cases import SMALL, BundleCase, cases, run
from checks import MEMORIES, Net, couplings, streams, weigh
from conftest import phantom
from monai.bundle import ConfigParser
from torch import nn

from memnet import FullyInvResUNet

# TorchScript is deprecated, and the exporters and the compiler warn of what they do themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL_NETWORK = {key: SMALL[key] for key in ("network_def#channels", "network_def#n_levels")}


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


@pytest.fixture
def sources(case: BundleCase, random_weights: Callable[..., Path]) -> dict[str, str]:
    """What MONAI's exporters need of a bundle, with weights of a small network."""
    configs = case.folder / "configs"
    return {
        "config_file": str(configs / "inference.json"),
        "meta_file": str(configs / "metadata.json"),
        "ckpt_file": str(random_weights(case.folder, **SMALL_NETWORK)),
    }


def _network(sources: dict[str, str]) -> nn.Module:
    parser = ConfigParser()
    parser.read_config(sources["config_file"])
    parser.update(SMALL_NETWORK)
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(sources["ckpt_file"], weights_only=True))
    return network


# runs the exported files of a folder on its image.npy; an import of memnet would fail
ALONE = """
import sys
from pathlib import Path
import numpy, onnxruntime, torch
sys.modules["memnet"] = None
folder = Path(sys.argv[1])
array = numpy.load(folder / "image.npy")
image = torch.from_numpy(array)
with torch.no_grad():
    outputs = {name: torch.jit.load(folder / name)(image) for name in ("script.ts", "trace.ts")}
    outputs["export.pt2"] = torch.export.load(folder / "export.pt2").module()(image)
session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
outputs["model.onnx"] = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: array})[0])
torch.save(outputs, folder / "outputs.pt")
"""


@cases
def test_exported_file_segments_without_memnet(case: BundleCase, sources: dict[str, str], tmp_path: Path) -> None:
    network = _network(sources)
    image = torch.rand(1, network.in_channels, 16, 24, 16)
    options = {**sources, **SMALL_NETWORK, "input_shape": list(image.shape)}
    monai.bundle.ckpt_export("network_def", filepath=str(tmp_path / "script.ts"), **options)
    monai.bundle.ckpt_export("network_def", filepath=str(tmp_path / "trace.ts"), use_trace=True, **options)
    monai.bundle.onnx_export("network_def", filepath=str(tmp_path / "model.onnx"), **options)
    torch.export.save(torch.export.export(network, (image,)), tmp_path / "export.pt2")
    np.save(tmp_path / "image.npy", image.numpy())
    subprocess.run([sys.executable, "-c", ALONE, str(tmp_path)], check=True, capture_output=True)
    expected = network(image).detach()
    for name, found in torch.load(tmp_path / "outputs.pt", weights_only=True).items():
        tolerance = {"rtol": 1e-3, "atol": 1e-3} if name == "model.onnx" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(found, expected, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        # where two classes are not within rounding of each other, the labels are the same
        first, second = expected.topk(2, dim=1).values.unbind(1)
        clear = first - second > 1e-2
        assert clear.float().mean() > 0.9 and torch.equal(found.argmax(1)[clear], expected.argmax(1)[clear]), name


@cases
def test_torchscript_holds_all_that_monai_deploy_reads(
    case: BundleCase, sources: dict[str, str], write_nifti: Callable[..., Path], tmp_path: Path
) -> None:
    """The operator of its SDK reads the configs from the file, and gets the image from another reader."""
    scan = write_nifti(f"sub-01_{case.flag.replace('image', 't1')}.nii.gz", phantom()[0], np.diag([-1.0, 1, 1.2, 1]))
    # TorchScript rounds elsewhere in bfloat16
    overrides = {**SMALL, case.flag: str(scan), "amp": False}
    overrides |= {"ckpt_path": sources["ckpt_file"], "output_dir": str(tmp_path)}
    run(case.folder, "run", "inference.json", **overrides)
    written = nib.load(next(tmp_path.glob(f"*_{case.postfix}.nii.gz")))

    monai.bundle.ckpt_export("network_def", filepath=str(tmp_path / "model.ts"), **sources, **SMALL_NETWORK)
    parser = ConfigParser()
    with zipfile.ZipFile(tmp_path / "model.ts") as archive:
        metadata, config = (json.loads(archive.read(f"model/extra/{name}.json")) for name in ("metadata", "inference"))
    parser.read_meta(metadata)
    parser.read_config({**config, "roi_size": SMALL["roi_size"], "modality": "T1", "amp": False, "device": "cpu"})
    inputs, outputs = (metadata["network_data_format"][side] for side in ("inputs", "outputs"))
    assert (list(inputs), list(outputs)) == (["image"], ["pred"])

    before, after = (parser.get_parsed_content(key) for key in ("preprocessing", "postprocessing"))
    after.transforms = tuple(t for t in after.transforms if "SaveImage" not in type(t).__name__)
    image = nib.load(scan)
    in_memory = monai.data.MetaTensor(torch.from_numpy(image.get_fdata()), affine=torch.from_numpy(image.affine))
    data = before({"image": in_memory})
    with torch.no_grad():
        logits = parser.get_parsed_content("inferer")(data["image"][None], torch.jit.load(tmp_path / "model.ts").eval())
    labels = after({"pred": logits[0], **data})["pred"]
    np.testing.assert_array_equal(labels[0], np.asarray(written.dataobj))
