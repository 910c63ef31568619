"""The build step that pyproject.toml cannot state: gRPC stubs made from the .proto files."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

PROTOS = Path("headgate/proto")  # relative: setuptools runs in the directory of this file


class BuildStubs(Command):
    """Writes *_pb2.py, *_pb2.pyi and *_pb2_grpc.py beside each .proto file."""

    description = "generate the gRPC stubs"
    user_options: ClassVar[list[tuple[str, str, str]]] = []

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        from grpc_tools import protoc

        outputs = [f"--{kind}_out=." for kind in ("python", "pyi", "grpc_python")]
        sources = sorted(map(str, PROTOS.glob("*.proto")))
        if protoc.main(["protoc", "-I.", *outputs, *sources]) != 0:
            raise SystemExit("protoc failed: see its message above")


class BuildPy(build_py):
    """Generates the stubs before the package's files are collected."""

    def run(self) -> None:
        self.run_command("build_stubs")
        super().run()


class SourceDistribution(sdist):
    """Ships the stubs too."""

    def run(self) -> None:
        self.run_command("build_stubs")
        super().run()


setup(cmdclass={"build_stubs": BuildStubs, "build_py": BuildPy, "sdist": SourceDistribution})
