#!/bin/sh
# Print the name of a slim Debian image: use one that is here, else pull it, else make it with debootstrap.
set -eu
pulled=debian:bookworm-slim
made=localhost/debian:bookworm-minbase

has() { docker image inspect "$1" >/dev/null 2>&1; }

if has "$pulled" || docker pull --quiet "$pulled" >/dev/null 2>&1; then
    echo "$pulled"
    exit 0
fi
if ! has "$made"; then
    if ! command -v debootstrap >/dev/null || [ "$(id -u)" != 0 ]; then
        echo "error: $pulled cannot be pulled; name another by BASE_IMAGE, or as root install debootstrap" >&2
        exit 1
    fi
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    echo "no registry answers: a base image is made by debootstrap" >&2
    debootstrap --variant=minbase bookworm "$folder" >"$folder.log" 2>&1 \
        || { tail -n 3 "$folder.log" >&2; echo "error: debootstrap failed; $folder.log has its lines" >&2; exit 1; }
    rm -f "$folder.log" "$folder"/var/cache/apt/archives/*.deb
    tar -C "$folder" -c . | docker import - "$made" >/dev/null
fi
echo "$made"
