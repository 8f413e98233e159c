"""Layers: pairs of forward and backward; no layer asks whether a weight is sparse."""
