#!/bin/sh
# Installs Headgate into a Debian root, as root: what the Dockerfile does, and what the fresh-machine test
# proves without Docker.
#
#   deploy/install.sh cpu|cuda
#
# cpu takes PyTorch from TORCH_INDEX (if given), cuda from PyPI, whose build carries the CUDA libraries.
# The source tree stays where it is (/opt/headgate in the image) and everything made goes into it, so
# that the server starts with no network, no compiler and no home directory.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
variant=${1:?usage: deploy/install.sh cpu|cuda}

export DEBIAN_FRONTEND=noninteractive
apt-get update
apt-get install --yes --no-install-recommends ca-certificates g++ python3 python3-venv util-linux
rm -rf /var/lib/apt/lists/*

case $variant in
cpu) ;;
cuda) TORCH_INDEX= ;; # Triton compiles its launchers at run time: g++ stays
*) echo "install: unknown variant '$variant'" >&2 && exit 2 ;;
esac
export TORCH_INDEX="${TORCH_INDEX:-}" PIP_NO_CACHE_DIR=1
HEADGATE_CACHE=$root/cache VENV=$root/.venv "$root/deploy/setup.sh"

for command in headgate text-generation-launcher; do
    ln -sf "$root/.venv/bin/$command" "/usr/local/bin/$command"
done
# The server's user. Its number is the first ordinary user's on most hosts, so that files in a mounted
# folder belong to the person who mounted it.
getent passwd headgate >/dev/null || useradd --uid 1000 --create-home headgate
mkdir -p /data
chown headgate:headgate /data
# Any user may convert a .gguf file into the cache beside the embedded model.
chmod -R a+rX "$root"
chmod a+rwxt "$root/cache" "$root/cache/gguf"
