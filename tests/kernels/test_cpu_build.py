"""Building and loading the C++ kernels: without a compiler, by several at once, for another set."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from headgate.kernels import cpu
from headgate.kernels.cpu import build, library


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A directory for libraries in place of the real ones, with nothing built."""
    monkeypatch.setattr(build, "SOURCES", tmp_path / "sources")
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "kernel.cpp").write_text("int one() { return 1; }")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.load.cache_clear()
    yield tmp_path / "sources"
    library.load.cache_clear()


def test_without_a_compiler_there_is_one_warning_and_no_kernels(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert not cpu.available()
        assert not cpu.available()
        cpu.set_num_threads(2)
    assert len(caplog.records) == 1
    assert "no C++ compiler found" in caplog.text
    assert build.main() == 0


def test_what_the_compiler_says_is_passed_on(elsewhere: Path) -> None:
    for name in ("interface", "thread_pool", "shared_sum", "replay", "kernels"):
        (elsewhere / f"{name}.cpp").write_text("int broken() { return nonsense; }")
    if build._compiler() is None:
        pytest.skip("no compiler")
    with pytest.raises(build.BuildError, match="nonsense"):
        build.ensure_built()
    assert not list(elsewhere.glob("*.so*"))


def test_of_several_at_once_one_compiles(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Path] = []

    def compile_slowly(compiler: str, target: Path, variants: build.Variants) -> None:
        compiled.append(target)
        time.sleep(0.1)
        target.write_bytes(b"library")

    monkeypatch.setattr(build, "compile_library", compile_slowly)
    monkeypatch.setattr(build, "_compiler", lambda: "compiler")
    builders = [threading.Thread(target=build.ensure_built) for _ in range(4)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert len(compiled) == 1
    assert list(elsewhere.glob("*.so")) == compiled
    (elsewhere / "kernel.cpp").write_text("int two() { return 2; }")
    assert build.ensure_built() != compiled[0]
    assert len(list(elsewhere.glob("*.so"))) == 1, "the library of the old sources is removed"


def test_a_directory_that_cannot_be_written_gives_way_to_the_cache(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "compile_library", lambda *given: given[1].write_bytes(b"library"))
    monkeypatch.setattr(build, "_compiler", lambda: "compiler")
    monkeypatch.setattr(build, "SOURCES", Path("/proc/self"))
    assert build.ensure_built().parent == tmp_path / "cache" / "headgate" / "kernels"


@pytest.mark.parametrize("wanted", ["generic", "quantum"])
def test_the_instruction_set_can_be_asked_for(
    wanted: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not cpu.available():
        pytest.skip("not built")
    monkeypatch.setenv("HEADGATE_CPU_ISA", wanted)
    library.load.cache_clear()
    try:
        with caplog.at_level(logging.INFO):
            assert cpu.available() == (wanted == "generic")
    finally:
        monkeypatch.delenv("HEADGATE_CPU_ISA")
        library.load.cache_clear()
        library.load()
    said = "CPU kernels for generic" if wanted == "generic" else "HEADGATE_CPU_ISA=quantum"
    assert said in caplog.text
