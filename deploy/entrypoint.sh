#!/bin/sh
# Start of the container: the launcher, as an ordinary user, with the arguments of `docker run`.
#
# Started as root (Docker's default), it first makes sure that this user can write /data, the hub
# cache, which Docker creates as root's when it mounts a folder that did not exist. Then root is
# given up; only the right to open a port below 1024 (PORT is 80) is kept. Started as another user, it
# goes on as that one: Docker lets every user open port 80 (net.ipv4.ip_unprivileged_port_start=0),
# elsewhere give a PORT above 1023.
set -eu
# SageMaker starts every image with the one word `serve` and asks on port 8080.
if [ "$#" = 1 ] && [ "$1" = serve ]; then
    set -- --port "${SAGEMAKER_BIND_TO_PORT:-8080}"
fi
if [ "$(id -u)" != 0 ]; then
    [ -w "${HOME:-/}" ] || export HOME=/tmp
    exec text-generation-launcher "$@"
fi

user=$(id -u headgate)
owner=$(stat -c %u /data)
if [ "$owner" = 0 ]; then
    echo "giving /data to user $user (headgate)" >&2
    chown -R headgate:headgate /data || echo "cannot: downloads to /data may fail" >&2
else
    user=$owner # a folder of the host's user: files made there stay that user's
fi
export HOME=/home/headgate
[ "$user" = "$(id -u headgate)" ] || export HOME=/tmp
port_below_1024="--inh-caps=+net_bind_service --ambient-caps=+net_bind_service"
setpriv --inh-caps=+net_bind_service true 2>/dev/null || port_below_1024=
# shellcheck disable=SC2086
exec setpriv --reuid="$user" --regid="$(stat -c %g /data)" --clear-groups $port_below_1024 \
    text-generation-launcher "$@"
