"""Loads the compiled kernels with ctypes and declares their functions. It checks no shapes."""

from __future__ import annotations

import ctypes
import functools
import logging
import os

from headgate.kernels.cpu import build

_log = logging.getLogger(__name__)

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
_D = ctypes.c_double

FLOATS = (_F, _D)  # argument types that travel in floating-point registers

# Arguments of a product, the last six for what comes before it.
_PRODUCT = (*(_P, _L, _L, _L, _P, _I, _L, _P, _P, _L), *(_P, _F, _P, _L, _P, _I))

# Arguments of a gated MLP: its inputs and their norm, the first product and the second.
_GATED_MLP = (*(_P, _L, _L, _L, _P, _F, _P, _L, _P), *(_P, _I, _L, _P, _I), *(_P, _L, _P, _P, _L))

# A layer's keys and values, their scales, their dtype, and positions per block.
_CACHES = (_P, _P, _P, _P, _I, _I)

# Result and arguments of each function in interface.cpp, then of those in shared_sum.cpp, in
# replay.cpp and in step_rows.cpp. Where a function has a result of 32 bits and may be recorded, 0
# is success.
SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "hg_init": (ctypes.c_char_p, (ctypes.c_char_p,)),
    "hg_set_num_threads": (None, (_I,)),
    "hg_num_threads": (_I, ()),
    "hg_packed_bytes": (_L, (_L, _L, _I)),
    "hg_pack_weight": (None, (_P, _L, _L, _I, _P)),
    "hg_linear": (_I, _PRODUCT),
    "hg_gated_mlp": (_I, _GATED_MLP),
    "hg_gated_columns": (_L, ()),
    "hg_quantised_block": (_I, (_I,)),
    "hg_quantised_bytes": (_L, (_L, _L, _I)),
    "hg_quantise_weight": (None, (_P, _I, _L, _L, _I, _P)),
    "hg_linear_quantised": (_I, _PRODUCT),
    "hg_gated_mlp_quantised": (_I, _GATED_MLP),
    "hg_multiplies_bytes": (_I, ()),
    "hg_column_lengths_size": (_L, (_L,)),
    "hg_column_lengths": (None, (_P, _L, _L, _P, _P)),
    "hg_linear_likely": (_I, (_P, _L, _L, _L, _P, _I, _L, _P, _L, _I, _P, _P, _P, _I, _I)),
    "hg_linear_largest": (None, (_P, _L, _L, _L, _I, _L, _P, _L, _I, _P, _P, _P, _I)),
    "hg_paged_attention": (
        _I,
        (_P, _L, _L, *_CACHES, _P, _P, _P, _L, _I, _I, _I, _I, _F, _I, _F, _I, _P),
    ),
    "hg_embedding": (None, (_P, _L, _P, _I, _L, _L, _L, _P)),
    "hg_take_rows": (None, (_P, _L, _P, _L, _L, _P)),
    "hg_rms_norm": (None, (_P, _L, _P, _L, _P, _P, _P, _L, _L, _F)),
    "hg_gate": (None, (_P, _L, _P, _L, _L, _I)),
    "hg_rotary": (None, (_P, _L, _L, _P, _L, _L, _P, _P, _L, _I, _I, _I)),
    "hg_rotary_and_write_kv": (
        None,
        (_P, _L, _L) * 3 + (_P, _P, _F, _P, _P, _I, *_CACHES, _P, _L, _I, _I, _I),
    ),
    "hg_write_kv": (None, (_P, _L, _L, _P, _L, _L, *_CACHES, _P, _L, _I, _I)),
    "hg_argmax": (None, (_P, _L, _L, _P)),
    "hg_likeliest_keys": (None, (_P, _L, _L, _L, _I, _P, _I, _I)),
    "hg_likeliest": (None, (_P, _L, _I, _I, _P)),
    "hg_gumbel_argmax": (_L, (_P, _L, _F, _F, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32)),
    "hg_shared_bytes": (_L, (_I, _L)),
    "hg_shared_open": (_P, (_P, _I, _I, _L, _P, _P, _I, _D)),
    "hg_shared_close": (None, (_P,)),
    "hg_shared_sum_float": (_I, (_P, _P, _L)),
    "hg_shared_sum_int64": (_I, (_P, _P, _L)),
    "hg_shared_min_int64": (_I, (_P, _P, _L)),
    "hg_shared_gather": (_I, (_P, _P, _L, _P, _P, _I)),
    "hg_shared_hand_over": (_I, (_P, _P, _L, _L, _L, _I, _I, _L, _L, _P)),
    "hg_shared_broadcast": (_I, (_P, _P, _L)),
    "hg_replay_most_integers": (_I, ()),
    "hg_replay_most_floats": (_I, ()),
    "hg_replay_arguments": (None, (_P, _P, _L, _P, _I, _P)),
    "hg_replay": (_I, (_P, _L, _P, _P, _P, _P)),
    "hg_step_place": (_L, (_P, _L)),
    "hg_step_settle": (_L, (_P, _P)),
    "hg_guess": (_L, (_P, _L, _L, _L)),
}


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, compiled first if need be; None, after one warning, where that cannot be done.

    HEADGATE_CPU_ISA=avx512|avx2|generic asks for less than the machine's best instruction set.
    """
    try:
        library = ctypes.CDLL(str(build.ensure_built()))
    except (build.BuildError, OSError) as error:
        _log.warning("the C++ kernels are not used, which makes this CPU slower: %s", error)
        return None
    _declare(library)
    wanted = os.environ.get("HEADGATE_CPU_ISA", "")
    chosen = library.hg_init(wanted.encode())
    if chosen is None:
        _log.warning("the C++ kernels are not used: HEADGATE_CPU_ISA=%s is not to be had", wanted)
        return None
    _log.info("CPU kernels for %s", chosen.decode())
    return library


@functools.cache
def load_keeping_gil() -> ctypes.PyDLL | None:
    """The same library, for calls of a few microseconds: a call keeps the interpreter's lock.

    Another thread that took it meanwhile would have the caller wait.
    """
    if load() is None:
        return None
    library = ctypes.PyDLL(str(build.ensure_built()))
    _declare(library)
    return library


def _declare(library: ctypes.CDLL) -> None:
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
