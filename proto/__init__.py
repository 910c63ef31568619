"""Wire formats: the .proto files, their generated stubs, and the step messages as dataclasses."""
