"""Layers that models are wired from. Each reads its slice of the weights; none knows a model."""
