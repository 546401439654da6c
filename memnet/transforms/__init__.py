"""MONAI dictionary transforms: labels to tissue, synthetic images, modalities, writing."""
