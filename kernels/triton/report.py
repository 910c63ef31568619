"""`python -m headgate.kernels.triton.report`: compiles every kernel for GPUs that need not be here.

Writes the table of docs/kernels.md and the page docs/roofline.md, or with --check compares them
with what is found. Fails when a kernel does not compile, spills registers, wants more shared memory
than the chip has, leaves a processor too few warps, multiplies without tensor cores, loads less
than 16 bytes at once, or has other machine code in other batches.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from headgate.kernels.triton.cases import (
    CHIPS,
    GENERATORS,
    MODELS,
    Case,
    Maker,
    StepShape,
    all_cases,
)
from headgate.kernels.triton.compiled import Compiled, compile_for
from headgate.kernels.triton.launch import INTERPRETED, Launch, recording

_DOCS = Path(__file__).resolve().parents[2] / "docs"
_BEGIN, _END = "<!-- made by `make kernels-report`: begin -->", "<!-- end -->"
_WIDE = 16  # bytes that a load on a hot path moves
_BATCHES = ((1, 600), (7, 4096), (64, 1100))  # rows and context of decode steps
# Whose tile follows the number of rows, since any gives the same bits.
_ANY_TILE = ("linear_int8_kernel", "linear_weight_only_kernel")
_SMALL = ("count_kernel", "mask_kernel", "pick_kernel")  # which read a few numbers a row, or bits


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU's published peaks (SXM versions, dense bfloat16)."""

    name: str
    bytes_per_second: float
    operations_per_second: float

    def floor(self, case: Case) -> float:
        """Seconds that the case takes at least."""
        return max(
            case.nbytes / self.bytes_per_second, case.operations / self.operations_per_second
        )


GPUS = (
    Gpu("A100", 2.039e12, 312e12),
    Gpu("H100", 3.35e12, 989e12),
    Gpu("H200", 4.8e12, 989e12),
)


@dataclass(slots=True)
class Row:
    """One compiled form of a kernel: where it is used, and what it takes by chip."""

    op: str
    kernel: str
    shapes: list[str]
    found: dict[str, Compiled] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"| {self.op} | {self.kernel} | {'; '.join(self.shapes)} |"

    def cells(self) -> dict[str, str]:
        return {chip: _cell(found) for chip, found in self.found.items()}


def _cell(found: Compiled) -> str:
    parts = [
        f"{found.registers} r",
        f"{found.shared / 1024:.3g} KB",
        f"{found.warps_at_once} w",
    ]
    return ", ".join([*parts, *([found.products] if found.products else [])])


def rows_of(cases: Iterable[Case], chips: Iterable[str]) -> list[Row]:
    """Compiles what the cases launch. Equal launches share a row."""
    rows: dict[tuple[str, ...], Row] = {}
    identities: dict[str, dict[str, list[Launch]]] = {}
    cases = list(cases)
    for case in cases:
        wanted = [chip for chip in chips if chip in case.chips]
        identities[case.name] = {chip: _launches(case, chip) for chip in wanted}
    compiled: dict[str, Compiled] = {}
    for case in cases:
        by_chip = identities[case.name]
        if not by_chip:
            continue
        for index in range(len(next(iter(by_chip.values())))):
            found = {}
            for chip in by_chip:
                launch = by_chip[chip][index]
                identity = _identity(launch, chip)
                if identity not in compiled:
                    compiled[identity] = compile_for(launch, chip)
                found[chip] = compiled[identity]
            key = tuple(_identity(by_chip[chip][index], chip) for chip in by_chip)
            kernel = by_chip[next(iter(by_chip))][index].kernel.__name__
            row = rows.setdefault((case.op, *key), Row(case.op, kernel, [], found))
            row.shapes.append(f"{case.model}, {case.step}")
    return list(rows.values())


def _launches(case: Case, chip: str) -> list[Launch]:
    with recording(chip) as launches:
        case.make(Maker("meta"))()
    return launches


def _identity(launch: Launch, chip: str) -> str:
    """What tells two launches' machine code apart."""
    arguments = [
        str(value.dtype) if hasattr(value, "dtype") else _kind(value, parameter)
        for value, parameter in zip(launch.arguments, launch.kernel.params, strict=False)
    ]
    return repr(
        (chip, launch.kernel.__name__, arguments, launch.constants, launch.warps, launch.stages)
    )


def _kind(value: float, parameter: object) -> str:
    if isinstance(value, float) or getattr(parameter, "do_not_specialize", False):
        return "number"
    return "one" if value == 1 else "divisible" if value % 16 == 0 else "other"


def batch_dependent(chips: Iterable[str]) -> Iterator[str]:
    """Operations whose machine code differs with the rows of a decode step, or with the longest
    context: their bits could too, and a server would compile while it serves."""
    steps = [StepShape("", rows, 1, context) for rows, context in _BATCHES]
    for chip, model, generate in product(chips, MODELS, GENERATORS):
        for alike in zip(*(generate(model, step) for step in steps), strict=True):
            forms = {
                tuple(
                    _identity(launch, chip)
                    for launch in _launches(case, chip)
                    if launch.kernel.__name__ not in _ANY_TILE
                )
                for case in alike
            }
            if len(forms) > 1:
                yield f"{alike[0].op} on {chip} ({model.name}): other machine code in other batches"


def problems_of(rows: Iterable[Row]) -> Iterator[str]:
    for row in rows:
        for chip, found in row.found.items():
            problems = found.problems
            if found.widest_load < _WIDE and row.kernel not in _SMALL:
                problems.append(f"loads of {found.widest_load} bytes")
            for problem in problems:
                yield f"{row.kernel} on {chip} ({row.op}, {row.shapes[0]}): {problem}"


def table(rows: Iterable[Row]) -> str:
    lines = [
        f"| operation | kernel | shapes | {' | '.join(CHIPS)} |",
        f"|---|---|---|{'---|' * len(CHIPS)}",
    ]
    for row in rows:
        cells = row.cells()
        lines.append(f"{row.key} {' | '.join(cells.get(chip, '-') for chip in CHIPS)} |")
    return "\n".join(lines)


def roofline() -> str:
    """The page docs/roofline.md."""
    names = " | ".join(f"{gpu.name} µs" for gpu in GPUS)
    lines = [
        "# Roofline of the kernels",
        "",
        "Made by `make kernels-report`: the least each operation must move and compute in bfloat16",
        "and the time that takes at a GPU's published peaks: "
        + ", ".join(
            f"{gpu.name} {gpu.bytes_per_second / 1e12:.3g} TB/s and "
            f"{gpu.operations_per_second / 1e12:.0f} TFLOP/s"
            for gpu in GPUS
        )
        + ".",
        "Nothing here is measured; `make bench-gpu` measures where a GPU is, and puts its figures",
        "beside these floors.",
        "",
        f"| operation | model | step | MB | GFLOP | {names} |",
        f"|---|---|---|--:|--:|{'--:|' * len(GPUS)}",
    ]
    for case in all_cases():
        floors = " | ".join(f"{gpu.floor(case) * 1e6:.3g}" for gpu in GPUS)
        lines.append(
            f"| {case.op} | {case.model} | {case.step} | {case.nbytes / 1e6:.3g} | "
            f"{case.operations / 1e9:.3g} | {floors} |"
        )
    return "\n".join(lines) + "\n"


def differences(rows: Iterable[Row], text: str) -> Iterator[str]:
    """Where the table in docs/kernels.md says something else than was found."""
    written: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 + len(CHIPS):
            by_chip = dict(zip(CHIPS, cells[3:], strict=True))
            written.setdefault(tuple(cells[:3]), []).append(by_chip)
    for row in rows:
        key = (row.op, row.kernel, "; ".join(row.shapes))
        # An operation may start a kernel twice, with different constants: its rows are in order.
        lines = written.get(key, [])
        line_of_row = lines.pop(0) if lines else {}
        for chip, cell in row.cells().items():
            said = line_of_row.get(chip, "no such row")
            if said != cell:
                yield f"{' | '.join(key)} | {chip}: the table says {said!r}, found {cell!r}"


def _replace_table(text: str, new: str) -> str:
    before, rest = text.split(_BEGIN, 1)
    return f"{before}{_BEGIN}\n{new}\n{_END}{rest.split(_END, 1)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="compare with the pages, write nothing"
    )
    parser.add_argument("--only", default="", help="operations whose name is this")
    parser.add_argument("--chips", default=",".join(CHIPS), help="e.g. sm_90,sm_100")
    options = parser.parse_args()
    if INTERPRETED.value:
        print("the interpreter compiles nothing: unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    partial = bool(options.only) or options.chips != ",".join(CHIPS)
    cases = [case for case in all_cases() if options.only in ("", case.op)]
    rows = rows_of(cases, options.chips.split(","))
    problems = [*problems_of(rows), *batch_dependent(options.chips.split(","))]
    page = _DOCS / "kernels.md"
    if options.check:
        problems += differences(rows, page.read_text(encoding="utf-8"))
        if (_DOCS / "roofline.md").read_text(encoding="utf-8") != roofline():
            problems.append("docs/roofline.md is out of date")
    elif not partial:
        text = page.read_text(encoding="utf-8")
        page.write_text(_replace_table(text, table(rows)), encoding="utf-8")
        (_DOCS / "roofline.md").write_text(roofline(), encoding="utf-8")
    print("\n".join(problems) or f"{len(rows)} kernels compiled, nothing amiss")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
