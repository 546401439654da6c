"""Maps of label values to classes, and the transform that applies one and refuses values it does not know."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

__all__ = [
    "BACKGROUND",
    "CSF",
    "ENHANCING",
    "FREESURFER_TISSUE",
    "GM",
    "ISEG_TISSUE",
    "LABEL_MAPS",
    "NECROTIC",
    "OEDEMA",
    "ROUNDING",
    "TISSUES",
    "WM",
    "MapLabelsd",
    "brats_values",
]

BACKGROUND, CSF, GM, WM = range(4)
TISSUES = {"CSF": CSF, "GM": GM, "WM": WM}

# what BraTS calls the necrotic and non-enhancing core, the peritumoral oedema, the enhancing tumour
NECROTIC, OEDEMA, ENHANCING = range(1, 4)

ISEG_TISSUE = {0: BACKGROUND, 10: CSF, 150: GM, 250: WM}

# FreeSurfer's values to tissue as manual tissue protocols draw it (compared with expert labels of adults from the
# MICCAI 2012 multi-atlas set): all deep grey nuclei are grey matter, the pallidum and the ventral diencephalon too though
# T1 shows them nearly white; the brainstem is white matter as a whole; the cerebellum is split as the cerebrum is. Choroid
# plexus and the fifth ventricle go with the ventricles they lie in, white matter lesions and the optic chiasm with white
# matter. 136/163 and 137/164 are the choroid plexus of lateral and inferior horns in SynthSeg's label maps, 5xx is what lies
# outside the brain there: arteries, nerves, soft tissue, eyes, mucosa, skin, spinal cord, dura, bone and marrow.
# 80 to 82 are hypointensities of grey matter, 29 and 61 voxels that FreeSurfer left undetermined.
FREESURFER_TISSUE = {
    0: BACKGROUND,
    **dict.fromkeys((4, 5, 14, 15, 24, 31, 43, 44, 63, 72, 136, 137, 163, 164), CSF),
    **dict.fromkeys((3, 8, 10, 11, 12, 13, 17, 18, 26, 28), GM),
    **dict.fromkeys((42, 47, 49, 50, 51, 52, 53, 54, 58, 60), GM),
    **dict.fromkeys((80, 81, 82), GM),
    **dict.fromkeys((2, 7, 16, 25, 30, 41, 46, 57, 62, 77, 78, 79, 85, 251, 252, 253, 254, 255), WM),
    **dict.fromkeys((29, 61), BACKGROUND),
    **dict.fromkeys((502, 506, 507, 508, 509, 511, 512, 514, 515, 516, 530), BACKGROUND),
}

# cortex by region in aparc+aseg and aparc.a2009s+aseg, white matter by region in wmparc
_PARCELS = {
    **{first + n: GM for first in (1000, 2000) for n in range(36)},
    **{first + n: WM for first in (3000, 4000) for n in range(36)},
    **{first + n: GM for first in (11100, 12100) for n in range(76)},
    **{first + n: WM for first in (13100, 14100) for n in range(76)},
    **dict.fromkeys((5001, 5002), WM),
}

LABEL_MAPS: dict[str, dict[int, int]] = {
    "freesurfer": {**FREESURFER_TISSUE, **_PARCELS},
    "iseg": ISEG_TISSUE,
    "tissue": {value: value for value in range(4)},
    # enhancing tumour is 4 from 2017 to 2022, 3 from 2023 on
    "brats": {0: BACKGROUND, 1: NECROTIC, 2: OEDEMA, 3: ENHANCING, 4: ENHANCING},
    # until 2016: 1 necrosis, 3 core that does not enhance
    "brats2015": {0: BACKGROUND, 1: NECROTIC, 2: OEDEMA, 3: NECROTIC, 4: ENHANCING},
    # after treatment: 4 is the resection cavity
    "brats2024": {0: BACKGROUND, 1: NECROTIC, 2: OEDEMA, 3: ENHANCING, 4: BACKGROUND},
}

# values that one file of a map cannot hold together, and what it is if it does
_CONTRADICTIONS = {
    "brats": ((3, 4), "label map of BraTS 2015 (--label_map brats2015) or of treated tumours (--label_map brats2024)?")
}


ROUNDING = 1e-3
"""What files with a scaling of their own may leave in labels."""


class MapLabelsd(MapTransform):
    """Replace label values by a network's classes.

    Args:
        keys: the label maps.
        label_map: a map of label value to class, or the name of one of ``LABEL_MAPS``.

    Raises:
        ValueError: if the label map's name is unknown.
    """

    def __init__(self, keys: KeysCollection, label_map: str | Mapping[int, int]) -> None:
        super().__init__(keys)
        self.never_together: tuple[int, ...] = ()
        self.instead = ""
        if isinstance(label_map, str):
            if label_map not in LABEL_MAPS:
                raise ValueError(f"label_map is {label_map!r}, expected one of {', '.join(LABEL_MAPS)}")
            self.never_together, self.instead = _CONTRADICTIONS.get(label_map, ((), ""))
            label_map = LABEL_MAPS[label_map]
        # A config in JSON has keys that are strings.
        self.label_map = {int(value): int(target) for value, target in label_map.items()}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Map ``(1, D, H, W)`` labels, keeping shape and dtype.

        Raises:
            ValueError: if a label map holds values that are not in the map, or contradict each other, naming them and
                the file.
        """
        d = dict(data)
        for key in self.key_iterator(d):
            labels = torch.as_tensor(d[key])
            whole = labels.round() if labels.is_floating_point() else labels
            labels = torch.where((labels - whole).abs() < ROUNDING, whole, labels)
            source = d[key].meta.get("filename_or_obj", key) if isinstance(d[key], MetaTensor) else key
            values = torch.unique(labels)
            found = values.tolist()
            unknown = [value for value in found if value not in self.label_map]
            if unknown:
                shown = ", ".join(f"{value:g}" for value in unknown[:8]) + (", ..." if len(unknown) > 8 else "")
                known = ", ".join(str(value) for value in sorted(self.label_map)[:64])
                known += ", ..." if len(self.label_map) > 64 else ""
                raise ValueError(f"{source}: holds label values that the map does not know: {shown} (known: {known})")
            if self.never_together and set(self.never_together) <= set(found):
                values_found = " and ".join(str(value) for value in self.never_together)
                raise ValueError(f"{source}: holds label values {values_found} together; is it a {self.instead}")
            target = torch.tensor([self.label_map[int(value)] for value in found], device=labels.device)
            mapped = target.to(labels.dtype)[torch.bucketize(labels.contiguous(), values, out_int32=True)]
            d[key] = MetaTensor(mapped, meta=d[key].meta) if isinstance(d[key], MetaTensor) else mapped
        return d


def brats_values(enhancing: int = 4) -> dict[int, int]:
    """Return the map of classes to the values that BraTS writes.

    Args:
        enhancing: value of the enhancing tumour: 4 until BraTS 2022, 3 from 2023 on.

    Raises:
        ValueError: if it is neither.
    """
    if enhancing not in (3, 4):
        raise ValueError(f"enhancing_label is {enhancing!r}, expected 4 (BraTS until 2022) or 3 (from 2023 on)")
    return {BACKGROUND: 0, NECROTIC: 1, OEDEMA: 2, ENHANCING: enhancing}
