"""Triton's interpreter without what only costs time here; results are the same."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest


@cache
def quicken() -> None:
    """A third less time for a kernel. Call it before the first one.

    Each call of a device function searches triton.language for what there is to patch, though the
    kernel's start or an earlier call has done so. Each sum of integers is repeated in 64 bits to
    see whether it overflows, which no shape of a test is large enough for.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[object] = set()

    def patch_once(function: object) -> object:
        if function in patched:
            return None
        patched.add(function)
        return patch(function)

    def run_kernel(*arguments: object, **options: object) -> object:
        patched.clear()  # the last kernel's end has taken its patches back
        return run(*arguments, **options)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = run_kernel
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
