"""Maps of label values to tissue, and the transform that applies one and refuses values it does not know."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

__all__ = ["BACKGROUND", "CSF", "FREESURFER_TISSUE", "GM", "ISEG_TISSUE", "LABEL_MAPS", "TISSUES", "WM", "MapTissued"]

BACKGROUND, CSF, GM, WM = range(4)
TISSUES = {"CSF": CSF, "GM": GM, "WM": WM}

ISEG_TISSUE = {0: BACKGROUND, 10: CSF, 150: GM, 250: WM}

# FreeSurfer's values to tissue as manual tissue protocols draw it (compared with expert labels of adults from the
# MICCAI 2012 multi-atlas set): all deep grey nuclei are grey matter, the pallidum and the ventral diencephalon too though
# T1 shows them nearly white; the brainstem is white matter as a whole; the cerebellum is split as the cerebrum is. Choroid
# plexus and the fifth ventricle go with the ventricles they lie in, white matter lesions and the optic chiasm with white
# matter. 136/163 and 137/164 are the choroid plexus of lateral and inferior horns in SynthSeg's label maps, 5xx is what lies
# outside the brain there: arteries, nerves, soft tissue, eyes, mucosa, skin, spinal cord, dura, bone and marrow.
FREESURFER_TISSUE = {
    0: BACKGROUND,
    **dict.fromkeys((4, 5, 14, 15, 24, 31, 43, 44, 63, 72, 136, 137, 163, 164), CSF),
    **dict.fromkeys((3, 8, 10, 11, 12, 13, 17, 18, 26, 28), GM),
    **dict.fromkeys((42, 47, 49, 50, 51, 52, 53, 54, 58, 60), GM),
    **dict.fromkeys((2, 7, 16, 25, 30, 41, 46, 57, 62, 77, 78, 79, 85, 251, 252, 253, 254, 255), WM),
    **dict.fromkeys((502, 506, 507, 508, 509, 511, 512, 514, 515, 516, 530), BACKGROUND),
}

LABEL_MAPS: dict[str, dict[int, int]] = {
    "freesurfer": FREESURFER_TISSUE,
    "iseg": ISEG_TISSUE,
    "tissue": {value: value for value in range(4)},
}


class MapTissued(MapTransform):
    """Replace label values by tissue: 0 background, 1 CSF, 2 GM, 3 WM.

    Args:
        keys: the label maps.
        label_map: a map of label value to tissue, or the name of one of ``LABEL_MAPS``.

    Raises:
        ValueError: if the label map's name is unknown.
    """

    def __init__(self, keys: KeysCollection, label_map: str | Mapping[int, int] = "freesurfer") -> None:
        super().__init__(keys)
        if isinstance(label_map, str):
            if label_map not in LABEL_MAPS:
                raise ValueError(f"label_map is {label_map!r}, expected one of {', '.join(LABEL_MAPS)}")
            label_map = LABEL_MAPS[label_map]
        # A config in JSON has keys that are strings.
        self.label_map = {int(value): int(tissue) for value, tissue in label_map.items()}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Map ``(1, D, H, W)`` labels, keeping shape and dtype.

        Raises:
            ValueError: if a label map holds values that are not in the map, naming them and the file.
        """
        d = dict(data)
        for key in self.key_iterator(d):
            labels = torch.as_tensor(d[key])
            values, inverse = torch.unique(labels, return_inverse=True)
            unknown = [value for value in values.tolist() if value not in self.label_map]
            if unknown:
                source = d[key].meta.get("filename_or_obj", key) if isinstance(d[key], MetaTensor) else key
                shown = ", ".join(f"{value:g}" for value in unknown[:8]) + (", ..." if len(unknown) > 8 else "")
                known = ", ".join(str(value) for value in sorted(self.label_map))
                raise ValueError(f"{source}: holds label values that the map does not know: {shown} (known: {known})")
            tissue = torch.tensor([self.label_map[int(value)] for value in values.tolist()], device=labels.device)
            mapped = tissue.to(labels.dtype)[inverse].reshape(labels.shape)
            d[key] = MetaTensor(mapped, meta=d[key].meta) if isinstance(d[key], MetaTensor) else mapped
        return d
