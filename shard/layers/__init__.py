"""Layers that models are wired from. Each reads its own slice of the weights; none knows a model."""
