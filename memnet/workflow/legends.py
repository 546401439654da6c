"""What the values of a bundle's label maps are to a person: volumes in its table, colours in its pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from memnet.transforms.labels import TISSUES

__all__ = ["LEGENDS", "Concept", "Legend"]

# code, coding scheme and meaning, as DICOM's terminology has them
Concept = tuple[str, str, str]


@dataclass(frozen=True)
class Legend:
    """What a label map's values are called and how they are shown.

    Args:
        name: what the label map is of, as its files are named.
        volumes: the values that each reported volume takes in.
        classes: the values and the colour of each class that a picture shows.
        codes: category (DICOM's CID 7150) and type (CID 7153 and 7159) of what each class is.
        nothing: what to say of a label map that has none of them.
        is_lesion: the classes are somewhere in the brain, rather than the brain itself.
    """

    name: str
    volumes: Mapping[str, tuple[int, ...]]
    classes: Mapping[str, tuple[tuple[int, ...], str]]
    codes: Mapping[str, tuple[Concept, Concept]]
    nothing: str
    is_lesion: bool = False


_TISSUE: Concept = ("85756007", "SCT", "Tissue")
_ABNORMAL: Concept = ("49755003", "SCT", "Morphologically Abnormal Structure")

# Colours apart for the colour-blind and on grey: blue, orange, pale yellow. Enhancing tumour is 4 or 3, see
# memnet.transforms.labels.LABEL_MAPS.
LEGENDS = {
    "tissue": Legend(
        "tissue",
        {name: (value,) for name, value in TISSUES.items()},
        {name: ((TISSUES[name],), c) for name, c in {"CSF": "#3b8fd4", "GM": "#e8743b", "WM": "#f6e8a6"}.items()},
        {
            "CSF": (("91720002", "SCT", "Body Substance"), ("65216001", "SCT", "Cerebrospinal Fluid")),
            "GM": (_TISSUE, ("389081007", "SCT", "Gray Matter")),
            "WM": (_TISSUE, ("389080008", "SCT", "White Matter")),
        },
        "no brain tissue was found in this scan; look at it before using the result",
    ),
    "tumor": Legend(
        "tumor",
        {"whole tumour": (1, 2, 3, 4), "core": (1, 3, 4), "enhancing": (3, 4)},
        {"oedema": ((2,), "#3b8fd4"), "necrotic core": ((1,), "#f6e8a6"), "enhancing": ((3, 4), "#e8743b")},
        {
            "oedema": (_ABNORMAL, ("79654002", "SCT", "Edema")),
            "necrotic core": (_ABNORMAL, ("6574001", "SCT", "Necrosis")),
            "enhancing": (_ABNORMAL, ("C113842", "NCIt", "Enhancing Lesion")),
        },
        "no tumour was found in these scans",
        is_lesion=True,
    ),
}
