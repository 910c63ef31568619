"""The build step that pyproject.toml cannot state: gRPC stubs made from the .proto files."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent


def generate_stubs() -> None:
    """Writes *_pb2.py, *_pb2.pyi and *_pb2_grpc.py beside each .proto file in headgate/proto/."""
    from grpc_tools import protoc

    sources = sorted(path.relative_to(ROOT) for path in (ROOT / "headgate/proto").glob("*.proto"))
    outputs = [f"--{kind}_out={ROOT}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", f"-I{ROOT}", *outputs, *map(str, sources)]) != 0:
        raise SystemExit("protoc failed: see its message above")


class BuildPy(build_py):
    """Generates the stubs before the package's files are collected."""

    def run(self) -> None:
        generate_stubs()
        super().run()


class SourceDistribution(sdist):
    """Ships the stubs too."""

    def run(self) -> None:
        generate_stubs()
        super().run()


setup(cmdclass={"build_py": BuildPy, "sdist": SourceDistribution})
