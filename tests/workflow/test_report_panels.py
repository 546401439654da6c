"""The pictures of a report: what is shown of a case, in which colours."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image, ImageColor

from memnet.workflow.legends import LEGENDS
from memnet.workflow.report_panels import ComparisonPanel


@pytest.mark.parametrize("legend", list(LEGENDS))
def test_classes_of_an_evaluation_have_the_colours_of_the_overlay(legend: str) -> None:
    labels = torch.arange(4).repeat_interleave(2).expand(1, 8, 8)[..., None]  # a stripe for each class
    if legend == "tissue":
        masks = torch.cat([labels == value for value in range(4)])
    else:  # TC, WT and ET, one within the other: what is WT alone is oedema, TC without ET the necrotic core
        masks = torch.cat([labels >= value for value in (2, 1, 3)])
    image = MetaTensor(torch.rand(1, 8, 8, 1), meta={"filename_or_obj": "a.nii.gz"})
    panel = ComparisonPanel({"image": "image", "reference": "label"}, legend)
    found = panel({"image": image, "label": masks.float()}).picture
    assert found is not None
    picture = np.asarray(Image.open(BytesIO(found)).convert("RGB")).astype(int)
    # from the lower stripe up, in the right half
    column = picture[::-1, picture.shape[1] * 3 // 4]
    seen = []
    for name, (_, colour) in LEGENDS[legend].classes.items():
        rows = np.flatnonzero((column == ImageColor.getrgb(colour)).all(-1))
        assert len(rows) > len(column) / 8, name
        seen.append(np.median(rows))
    assert seen == sorted(seen)
