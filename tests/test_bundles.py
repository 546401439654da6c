"""Every bundle under bundles/ keeps MONAI's rules, so that its tools and hosts can verify, load and export it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai.bundle
import pytest
import torch
from bundle_cases import WARNINGS
from conftest import BUNDLES
from monai.bundle import ConfigParser, ConfigWorkflow

pytestmark = WARNINGS

SCHEMA = Path(__file__).parent / "meta_schema_20240725.json"
bundles = pytest.mark.parametrize("bundle", sorted(p for p in BUNDLES.iterdir() if p.is_dir()), ids=lambda p: p.name)


@bundles
def test_has_the_files_of_a_bundle(bundle: Path) -> None:
    for name in ["LICENSE", "docs/README.md", "configs/logging.conf"]:
        assert (bundle / name).is_file(), name
    for name in ["metadata", "train", "inference", "evaluate", "multi_gpu_train"]:
        json.loads((bundle / "configs" / f"{name}.json").read_text())


@bundles
def test_metadata_follows_the_schema(bundle: Path) -> None:
    monai.bundle.verify_metadata(meta_file=str(bundle / "configs" / "metadata.json"), filepath=str(SCHEMA))
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert metadata["version"] in metadata["changelog"]


@bundles
@pytest.mark.parametrize("config", ["train.json", "inference.json"])
def test_network_takes_and_gives_what_the_metadata_says(bundle: Path, config: str) -> None:
    folder = bundle / "configs"
    monai.bundle.verify_net_in_out(
        "network_def", meta_file=str(folder / "metadata.json"), config_file=str(folder / config), device="cpu", n=2
    )


@pytest.mark.parametrize("name", ["brain_mri_tissue_invres", "brain_mri_tumor_invres"])
def test_an_evaluation_scores_the_maps_that_inference_writes(name: str) -> None:
    """It scored what the network gave, without what inference removes and fills: other numbers than a user's own."""
    configs = BUNDLES / name / "configs"
    evaluation = ConfigParser(ConfigParser.load_config_files([configs / "train.json", configs / "evaluate.json"]))
    inference = ConfigParser(json.loads((configs / "inference.json").read_text()))
    found = []
    for parser, at in ((evaluation, "validate#"), (inference, "")):
        parser.parse()
        own = [t for t in parser[f"{at}postprocessing#transforms"] if t["_target_"].startswith("memnet.")]
        own = [t for t in own if not t["_target_"].endswith(("SaveSegmentationd", "MapLabelsd"))]
        arguments = [{k: parser[v[1:]] if str(v).startswith("@") else v for k, v in t.items()} for t in own]
        found.append((arguments, parser.get_parsed_content(f"{at}inferer").overlap, parser["roi_size"]))
    assert found[0] == found[1] and found[0][0]


WORKFLOWS = [
    ("train", "train.json"),
    ("train", "train_synthetic.json"),
    ("evaluation", "train.json evaluate.json"),
    ("inference", "inference.json"),
]


@pytest.mark.parametrize(
    ("kind", "configs"),
    [
        pytest.param(kind, files, id=f"{folder.parent.name}-{configs.replace(' ', '+')}")
        for folder in sorted(BUNDLES.glob("*/configs"))
        for kind, configs in WORKFLOWS
        for files in [[folder / config for config in configs.split()]]
        if all(file.is_file() for file in files)
    ],
)
def test_properties_are_complete(kind: str, configs: list[Path], label_maps: Path, tmp_path: Path) -> None:
    overrides: dict[str, Any] = {"output_dir": str(tmp_path)}
    if configs[0].name == "train_synthetic.json":
        overrides |= {"dataset_dir": str(label_maps), "patch_size": [16, 16, 16]}
    workflow = ConfigWorkflow([str(file) for file in configs], workflow_type=kind, logging_file=False, **overrides)  # type: ignore[arg-type]
    workflow.initialize()
    assert workflow.check_properties() == []


@bundles
def test_training_and_inference_share_network_and_preprocessing(bundle: Path) -> None:
    train, inference = (json.loads((bundle / "configs" / f"{c}.json").read_text()) for c in ("train", "inference"))
    for key in (
        "network_def",
        "network",
        "network_name",
        "n_unrolls",
        "channels",
        "shared",
        "mu",
        "memory",
        "tile",
        "device",
    ):
        assert train.get(key) == inference.get(key), key
    shared, own = train["image_transforms"], inference["preprocessing"]["transforms"]
    own = own[1:] if own[0]["_target_"].endswith("FitTensorsd") else own  # which a training's cases have had
    # the tensors of a training are of its own making, and say themselves how they are ordered
    foreign = ("@tensor_order", "@tensor_axes")
    own = [{key: value for key, value in transform.items() if value not in foreign} for transform in own]
    assert own[: len(shared)] == shared


@bundles
@pytest.mark.parametrize("config", ["train.json", "inference.json"])
def test_config_ends_in_the_ids_that_hosts_run(bundle: Path, config: str) -> None:
    content = json.loads((bundle / "configs" / config).read_text())
    assert "run" in content and ("training" if config == "train.json" else "evaluating") in content
    if config == "inference.json":
        assert "@_meta_" not in (bundle / "configs" / config).read_text()
        assert content["preprocessing"]["_target_"] == content["postprocessing"]["_target_"] == "Compose"


@bundles
@pytest.mark.parametrize("kind", ["train", "inference"])
def test_loads_from_another_folder(
    bundle: Path, kind: str, shipped: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy = shipped(bundle)
    monkeypatch.chdir(tmp_path)
    network = monai.bundle.load(bundle.name, bundle_dir=str(copy.parent), workflow_type=kind, device="cpu")
    expected = torch.load(copy / "models" / "model.pt", weights_only=True)
    loaded = network.state_dict()
    assert expected.keys() <= loaded.keys()
    assert all(torch.equal(loaded[key].cpu(), value) for key, value in expected.items())


def network_input(bundle: Path) -> dict[str, Any]:
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    return metadata["network_data_format"]["inputs"]["image"]


# MoDL's encoding is an object, which TorchScript does not know
@pytest.mark.parametrize(
    "bundle",
    [p.parents[1] for p in sorted(BUNDLES.glob("*/configs/metadata.json")) if '"complex64"' not in p.read_text()],
    ids=lambda p: p.name,
)
def test_exports_to_torchscript(bundle: Path, shipped: Callable[[Path], Path], tmp_path: Path) -> None:
    copy = shipped(bundle)
    monai.bundle.ckpt_export(
        "network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(copy / "models" / "model.pt"),
        meta_file=str(copy / "configs" / "metadata.json"),
        config_file=str(copy / "configs" / "inference.json"),
    )
    scripted = torch.jit.load(tmp_path / "model.ts").eval()
    parser = ConfigParser()
    parser.read_config(str(copy / "configs" / "inference.json"))
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(copy / "models" / "model.pt", weights_only=True), strict=False)
    image = torch.rand(1, network_input(copy)["num_channels"], 16, 24, 16)
    with torch.no_grad():
        torch.testing.assert_close(scripted(image), network(image), atol=1e-4, rtol=1e-4)


@bundles
def test_shipped_weights_are_small_plain_tensors(bundle: Path) -> None:
    model = bundle / "models" / "model.pt"
    if not model.exists():
        pytest.skip(f"{bundle.name} ships no weights yet")
    assert model.stat().st_size <= 20e6
    assert all(isinstance(v, torch.Tensor) for v in torch.load(model, weights_only=True).values())


@bundles
def test_bundle_root_does_not_depend_on_the_working_directory(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for directory in (tmp_path, bundle):
        monkeypatch.chdir(directory)
        config = os.path.relpath(bundle / "configs" / "inference.json", directory)
        workflow = ConfigWorkflow(config_file=config, workflow_type="inference", logging_file=False)
        workflow.initialize()
        assert Path(workflow.bundle_root) == bundle.resolve()


@bundles
def test_one_process_of_several_reports_whatever_handlers_a_host_adds(bundle: Path) -> None:
    """Hosts put handlers of their own before the bundle's, MONAI Label one that loads weights: numbers would name others."""
    configs = [json.loads((bundle / "configs" / f"{name}.json").read_text()) for name in ("train", "multi_gpu_train")]
    reporting = {"StatsHandler", "TensorBoardStatsHandler", "TensorBoardImageHandler", "TrainingProgress"}
    for part in ("train", "validate"):
        handlers = configs[0][part]["handlers"]
        quiet = [h["_target_"] for h in handlers if h.get("_disabled_") == "$memnet.bundle.rank() > 0"]
        assert quiet == [h["_target_"] for h in handlers if h["_target_"].rsplit(".")[-1] in reporting] != []
    assert not [key for key in configs[1] if re.search(r"#\d", key)]
