"""Models: wiring of layers, one file a family, registered by architecture name."""
