"""Label maps: what each value becomes, and what is refused."""

import pytest
import torch
from monai.data import MetaTensor

from memnet.transforms.labels import FREESURFER_TISSUE, GM, ISEG_TISSUE, WM, MapLabelsd, brats_values


def test_maps_iseg_values_and_keeps_shape_and_dtype():
    labels = torch.tensor([[0, 10], [150, 250]], dtype=torch.float32)[None]
    out = MapLabelsd("label", "iseg")({"label": labels})["label"]
    assert out.dtype == labels.dtype
    assert torch.equal(out, torch.tensor([[[0.0, 1.0], [2.0, 3.0]]]))


def test_rounding_of_scaled_files_is_no_other_value():
    labels = torch.tensor([[[3.9999998, 1.0000001, 0.0]]])
    assert torch.equal(MapLabelsd("label", "brats")({"label": labels})["label"], torch.tensor([[[3.0, 1.0, 0.0]]]))
    with pytest.raises(ValueError, match=r"1\.5"):
        MapLabelsd("label", "brats")({"label": labels + 0.5})


@pytest.mark.parametrize(
    ("value", "tissue"), [(3, GM), (13, GM), (28, GM), (49, GM), (16, WM), (41, WM), (515, 0), (24, 1)]
)
def test_freesurfer_values_follow_the_manual_protocol(value, tissue):
    assert FREESURFER_TISSUE[value] == tissue


def test_left_and_right_have_the_same_tissue():
    pairs = [(2, 41), (3, 42), (4, 43), (5, 44), (7, 46), (8, 47), *zip(range(10, 14), range(49, 53), strict=True)]
    assert all(FREESURFER_TISSUE[left] == FREESURFER_TISSUE[right] for left, right in pairs)


def test_unknown_values_are_refused_by_value_and_file():
    labels = MetaTensor(torch.tensor([[[0, 10, 77]]]), meta={"filename_or_obj": "case-label.nii.gz"})
    with pytest.raises(ValueError, match=r"case-label\.nii\.gz.*77"):
        MapLabelsd("label", "iseg")({"label": labels})


def test_takes_a_map_with_the_string_keys_of_a_config():
    out = MapLabelsd("label", {str(k): v for k, v in ISEG_TISSUE.items()})({"label": torch.full((1, 2, 2, 2), 150)})
    assert (out["label"] == GM).all()


def test_unknown_map_is_refused():
    with pytest.raises(ValueError, match="'isegg'"):
        MapLabelsd("label", "isegg")


def test_brats_editions_map_to_the_same_classes_and_back():
    label = torch.tensor([0, 1, 2, 4])[None]
    assert MapLabelsd("label", "brats")({"label": label})["label"].tolist() == [[0, 1, 2, 3]]
    assert MapLabelsd("label", "brats")({"label": label.clamp(max=3)})["label"].tolist() == [[0, 1, 2, 3]]
    assert MapLabelsd("label", "brats2015")({"label": torch.arange(5)[None]})["label"].tolist() == [[0, 1, 2, 1, 3]]
    assert MapLabelsd("label", brats_values(4))({"label": torch.arange(4)[None]})["label"].tolist() == [[0, 1, 2, 4]]
    with pytest.raises(ValueError, match="enhancing_label is 5"):
        brats_values(5)


def test_values_of_two_editions_in_one_file_are_refused():
    labels = MetaTensor(torch.arange(5)[None], meta={"filename_or_obj": "case_seg.nii.gz"})
    with pytest.raises(ValueError, match=r"case_seg\.nii\.gz.* 3 and 4 together.*brats2015"):
        MapLabelsd("label", "brats")({"label": labels})


@pytest.mark.parametrize(
    ("value", "tissue"), [(80, GM), (1035, GM), (2000, GM), (12175, GM), (3001, WM), (4035, WM), (5002, WM), (29, 0)]
)
def test_freesurfer_s_parcellations_are_known(value, tissue):
    labels = torch.tensor([[[[0, value]]]], dtype=torch.int32)
    assert MapLabelsd("label", "freesurfer")({"label": labels})["label"].tolist() == [[[[0, tissue]]]]
