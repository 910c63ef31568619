"""What is installed and how: the wheel, pinned packages, import rules between folders, set-up."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import headgate

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "launcher", "proto", "router", "shard")
# Who may import whom, besides the folder itself and headgate's own small modules.
MAY_IMPORT = {
    "proto": set(),
    "kernels": {"proto"},
    "shard": {"proto", "kernels"},
    "router": {"proto"},
    "launcher": set(),
}


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


# ------------------------------------------------------------------ wheel and source archive


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the source archive of a clean copy of this tree."""
    tmp = tmp_path_factory.mktemp("wheel")
    tracked = run("git", "ls-files", "--cached", "--others", "--exclude-standard").stdout
    for name in tracked.splitlines():
        source, target = ROOT / name, tmp / "tree" / name
        if source.is_file() or source.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    archive = run(sys.executable, "setup.py", "--quiet", "sdist", cwd=tmp / "tree")
    assert archive.returncode == 0, archive.stderr
    with tarfile.open(next((tmp / "tree/dist").glob("*.tar.gz"))) as tar:
        tar.extractall(tmp / "unpacked")
    source = next((tmp / "unpacked").iterdir())
    built = run(sys.executable, "setup.py", "--quiet", "bdist_wheel", cwd=source)
    assert built.returncode == 0, built.stderr
    return next((source / "dist").glob("*.whl"))


def test_wheel_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {
        "headgate",
        f"headgate-{headgate.__version__}.dist-info",
    }
    wanted = {"headgate/py.typed"}
    for name in ("router", "shard"):
        wanted |= {f"headgate/proto/{name}{end}" for end in (".proto", "_pb2.py", "_pb2_grpc.py")}
    for folder in FOLDERS:
        for kind in ("*.py", "*.cpp", "*.h"):
            wanted |= {f"headgate/{p.relative_to(ROOT)}" for p in (ROOT / folder).rglob(kind)}
    assert wanted <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
    licences = {name.rsplit("/", 1)[1] for name in names if ".dist-info/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of an environment with the wheel, beside packages named `kernels` and `proto`."""
    venv = tmp_path_factory.mktemp("installed") / "venv"
    assert run(sys.executable, "-m", "venv", "--without-pip", venv).returncode == 0
    site = next(venv.glob("lib/python*/site-packages"))
    # Dependencies come from here; an editable headgate does not (.pth files are not followed).
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for other in ("kernels", "proto"):
        (site / other).mkdir()
        (site / other / "__init__.py").write_text(f"whose = 'the other {other}'\n")
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin/python"]
    result = run(*pip, "install", "--quiet", "--no-deps", wheel)
    assert result.returncode == 0, result.stderr
    return venv / "bin"


def test_installed_wheel_lives_beside_its_namesakes(installed: Path, tmp_path: Path) -> None:
    code = (
        "import kernels, proto, headgate, headgate.kernels, headgate.proto.router_pb2_grpc;"
        "from headgate.proto.messages import StepPlan; import headgate.router.scheduler;"
        "print(kernels.whose, '/', proto.whose, '/', headgate.__file__)"
    )
    result = run(installed / "python", "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(
        "the other kernels / the other proto / " + str(installed.parent)
    )


@pytest.mark.parametrize("command", ["headgate", "text-generation-launcher"])
def test_installed_commands(installed: Path, tmp_path: Path, command: str) -> None:
    result = run(installed / command, "--version", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert headgate.__version__ in result.stdout


# ------------------------------------------------------------------ imports


def imported_folders(path: Path) -> Iterator[str]:
    """Folders of this project that a module imports, type-checking imports left out."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names if id(node) not in skipped else ():
            parts = name.split(".")
            if parts[0] == "headgate" and len(parts) > 1 and parts[1] in FOLDERS:
                yield parts[1]


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_one_way(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        if path.name.endswith(("_pb2.py", "_pb2_grpc.py")):
            continue
        wrong = set(imported_folders(path)) - MAY_IMPORT[folder] - {folder}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_router_and_gateway_need_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import headgate.router.__main__, headgate.router.gateway.__main__, headgate.launcher.cli"
    )
    result = run(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr


def test_kernels_is_harmless_to_those_who_look_for_another_package_of_that_name() -> None:
    tree = ast.parse((ROOT / "kernels/__init__.py").read_text())
    assert all(isinstance(node, ast.Expr) for node in tree.body)  # a docstring at most
    code = "import kernels; assert not hasattr(kernels, '__version__')"
    assert run(sys.executable, "-c", code).returncode == 0


# ------------------------------------------------------------------ pinned packages


def pins(*files: str) -> dict[str, set[str]]:
    """Package -> pinned versions (one a Python version)."""
    found: dict[str, set[str]] = {}
    for file in files:
        for line in (ROOT / "deploy" / file).read_text().splitlines():
            if line and not line.startswith("#"):
                match = re.fullmatch(
                    r"([a-z0-9_-]+)==([\w.]+)"
                    r'( ; (python_version [<>]=? "3.11"|sys_platform == "linux"))?',
                    line,
                )
                assert match, f"{file}: {line!r} is no exact pin"
                found.setdefault(match[1].replace("_", "-"), set()).add(match[2])
    return found


def test_every_dependency_is_pinned_within_its_range() -> None:
    runtime = pins("requirements.txt", "requirements-torch.txt")
    everything = pins("requirements.txt", "requirements-torch.txt", "requirements-dev.txt")
    declared = project()
    for requirements, where in (
        (declared["dependencies"], runtime),
        (declared["optional-dependencies"]["dev"], everything),  # type: ignore[index]
    ):
        for text in requirements:  # type: ignore[attr-defined]
            requirement = Requirement(text)
            versions = where[requirement.name.lower().replace("_", "-")]
            assert all(requirement.specifier.contains(version) for version in versions), text


# ------------------------------------------------------------------ make and set-up


def test_make_serve_passes_its_settings_on() -> None:
    plain = run("make", "--dry-run", "serve", MODEL_ID="", NUM_SHARD="", PORT="", MAKEFLAGS="")
    assert re.search(r"exec \.venv/bin/headgate serve\s*$", plain.stdout.replace("\\\n", ""), re.M)
    settings = ["MODEL_ID=a model", "NUM_SHARD=2", "PORT=81", "ARGS=--json-output --strict"]
    full = run("make", "--dry-run", "serve", *settings, MAKEFLAGS="").stdout.replace("\\\n", "")
    assert re.search(
        r"headgate serve --model-id 'a model'\s+--num-shard 2 --port 81 --json-output --strict",
        full,
    )


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("exit 1", "Python 3.10 or newer is needed"),
        ('case "$2" in *ensurepip*) exit 1;; esac', "has no venv module"),
    ],
)
def test_setup_says_what_is_wrong_with_python(tmp_path: Path, script: str, says: str) -> None:
    python = tmp_path / "python3"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    result = run("deploy/setup.sh", PYTHON=str(python), VENV=str(tmp_path / "venv"))
    assert result.returncode == 1
    assert says in result.stderr
    assert not (tmp_path / "venv").exists()


def test_shell_scripts_parse() -> None:
    for script in [*(ROOT / "deploy").glob("*.sh"), ROOT / ".ci/run"]:
        assert run("sh", "-n", script).returncode == 0, script
        assert os.access(script, os.X_OK), script
