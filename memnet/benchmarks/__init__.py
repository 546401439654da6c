"""Measurements that the papers' claims rest on: segmentation of real labelled data, and cost against depth."""
