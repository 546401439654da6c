"""What the values of a bundle's label maps are to a person: volumes in its table, colours in its pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from memnet.transforms.labels import TISSUES

__all__ = ["LEGENDS", "Legend"]


@dataclass(frozen=True)
class Legend:
    """What a label map's values are called and how they are shown.

    Args:
        name: what the label map is of, as its files are named.
        volumes: the values that each reported volume takes in.
        classes: the values and the colour of each class that a picture shows.
        nothing: what to say of a label map that has none of them.
        is_lesion: the classes are somewhere in the brain, rather than the brain itself.
    """

    name: str
    volumes: Mapping[str, tuple[int, ...]]
    classes: Mapping[str, tuple[tuple[int, ...], str]]
    nothing: str
    is_lesion: bool = False


# Colours apart for the colour-blind and on grey: blue, orange, pale yellow. Enhancing tumour is 4 or 3, see
# memnet.transforms.labels.LABEL_MAPS.
LEGENDS = {
    "tissue": Legend(
        "tissue",
        {name: (value,) for name, value in TISSUES.items()},
        {name: ((TISSUES[name],), c) for name, c in {"CSF": "#3b8fd4", "GM": "#e8743b", "WM": "#f6e8a6"}.items()},
        "no brain tissue was found in this scan; look at it before using the result",
    ),
    "tumor": Legend(
        "tumor",
        {"whole tumour": (1, 2, 3, 4), "core": (1, 3, 4), "enhancing": (3, 4)},
        {"oedema": ((2,), "#3b8fd4"), "necrotic core": ((1,), "#f6e8a6"), "enhancing": ((3, 4), "#e8743b")},
        "no tumour was found in these scans",
        is_lesion=True,
    ),
}
