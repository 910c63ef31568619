#!/bin/sh
# Proves, on bare Debian roots made by debootstrap, what no unit test can: that the image's steps give a
# server that starts with no network as an ordinary user, and that the README's commands work for a person
# on a fresh machine. Run as root on Linux: `make test-fresh`. It takes some 15 minutes.
#
# What the roots get from this machine, beside the last commit of this repository:
#   /etc/resolv.conf; the certificates of /etc/ssl/certs/ca-certificates.crt (named to pip and friends);
#   pip's settings (PIP_* variables, /etc/pip.conf, /etc/xdg/pip) and proxy variables;
#   the directories in FRESH_BIND (default: those in PIP_FIND_LINKS), read-only, at the same paths.
# FRESH_MIRROR: the Debian mirror. FRESH_PARTS: "image readme". FRESH_SKIP_TESTS=1: not `make test`.
set -eu
repository=$(cd "$(dirname "$0")/.." && pwd)

if [ "${1:-}" != --inside ]; then
    [ "$(id -u)" = 0 ] || { echo "test-fresh: needs root (for chroot)" >&2 && exit 1; }
    for tool in debootstrap unshare ip git; do
        command -v "$tool" >/dev/null || { echo "test-fresh: needs $tool" >&2 && exit 1; }
    done
    work=$(mktemp -d /var/tmp/headgate-fresh-XXXXXX)
    # Mounts live in a namespace of their own and end with it, so removing $work cannot reach through.
    status=0
    unshare --mount --propagation private "$repository/deploy/test_fresh.sh" --inside "$work" || status=$?
    rm -rf --one-file-system "$work"
    [ "$status" = 0 ] && echo "test-fresh: passed"
    exit "$status"
fi

work=$2
bare=$work/bare
certificates=/run/host-certificates.crt

say() {
    echo "=== $*"
}

# new_root NAME PACKAGES...: a bare Debian with the mounts and settings described above.
new_root() {
    root=$work/$1
    shift
    cp -a "$bare" "$root"
    mount --bind "$root" "$root" # a mount point, as the root of namespaces made inside must be
    mount -t proc proc "$root/proc"
    mount --bind /dev "$root/dev"
    mount -t tmpfs -o size=64m,mode=1777 shm "$root/dev/shm" # as much as Docker gives
    cp -L /etc/resolv.conf "$root/etc/resolv.conf"
    echo "127.0.0.1 localhost" >"$root/etc/hosts" # which installers and Docker write
    cp -L /etc/ssl/certs/ca-certificates.crt "$root$certificates"
    for settings in /etc/pip.conf /etc/xdg/pip; do
        [ -e "$settings" ] && mkdir -p "$root$(dirname "$settings")" && cp -rL "$settings" "$root$settings"
    done
    for directory in ${FRESH_BIND-${PIP_FIND_LINKS:-}}; do
        [ -d "$directory" ] || continue
        mkdir -p "$root$directory"
        mount --bind -o ro "$directory" "$root$directory"
    done
    [ $# = 0 ] || inside sh -c "apt-get update -qq && apt-get install -qq --yes --no-install-recommends $*" \
        >"$root.apt.log" 2>&1 || { cat "$root.apt.log" && exit 1; }
}

# inside COMMAND...: in $root, with a clean environment.
inside() {
    chroot "$root" env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root \
        LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive SSL_CERT_FILE=$certificates \
        REQUESTS_CA_BUNDLE=$certificates CURL_CA_BUNDLE=$certificates GIT_SSL_CAINFO=$certificates \
        $(env | grep -E '^(PIP_[A-Z_]*|https?_proxy|no_proxy|HTTPS?_PROXY|NO_PROXY)=[^ ]*$') \
        PIP_CERT=$certificates "$@"
}

copy_repository() { # copy_repository DIRECTORY: the last commit, as a clone
    git clone --quiet "$repository" "$root$1"
}

check_image() {
    say "image: deploy/install.sh"
    new_root image
    copy_repository /opt/headgate
    rm -rf "$root/opt/headgate/.git"
    inside env TORCH_INDEX="${TORCH_INDEX:-}" /opt/headgate/deploy/install.sh cpu
    say "image: start with no network"
    settings=$(sed -n 's/^\(ENV\|   \) *\([A-Z_]*=[^ ]*\).*/\2/p' "$root/opt/headgate/Dockerfile")
    # shellcheck disable=SC2086
    inside env $settings unshare --net --mount --pid --fork --kill-child \
        python3 /opt/headgate/deploy/fresh_image.py
}

check_readme() {
    say "readme: a person's machine"
    new_root readme make g++ git curl procps python3 python3-venv ca-certificates
    inside useradd --create-home person
    copy_repository /home/person/headgate
    inside chown -R person:person /home/person
    # Process numbers of its own, so that what is left after Ctrl-C can only be ours.
    inside unshare --mount --pid --fork --kill-child --mount-proc \
        setpriv --reuid=person --regid=person --clear-groups env HOME=/home/person USER=person \
        FRESH_SKIP_TESTS="${FRESH_SKIP_TESTS:-}" TORCH_INDEX="${TORCH_INDEX:-}" \
        sh -c 'cd ~/headgate && exec python3 deploy/fresh_readme.py'
}

say "bare Debian by debootstrap"
debootstrap --variant=minbase bookworm "$bare" "${FRESH_MIRROR:-http://deb.debian.org/debian}" \
    >"$work/debootstrap.log" 2>&1 || { tail -n 20 "$work/debootstrap.log" && exit 1; }
for part in ${FRESH_PARTS:-image readme}; do
    "check_$part"
done
