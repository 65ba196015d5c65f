#!/bin/sh
# Start or stop Docker's daemon on a machine without systemd: `docker/daemon.sh start`, `docker/daemon.sh stop`.
# It touches no bridge and no packet filter: containers use the host's network.
set -eu
pidfile=${DPLORA_DOCKERD_PID:-/run/dp-lora-dockerd.pid}
log=/var/log/dp-lora-dockerd.log

fail() {
    echo "error: $*" >&2
    exit 1
}

case ${1:-} in
start)
    command -v docker >/dev/null || fail "docker is missing; install it (Debian: apt-get install docker.io)"
    docker info >/dev/null 2>&1 && exit 0
    [ "$(id -u)" = 0 ] || fail "docker's daemon does not answer; start it (systemctl start docker), or call this as root"
    command -v dockerd >/dev/null || fail "dockerd is missing; install it (Debian: apt-get install docker.io)"
    nohup dockerd --storage-driver=overlay2 --iptables=false --ip6tables=false --ip-masq=false --bridge=none \
        --pidfile "$pidfile" >"$log" 2>&1 &
    for _ in $(seq 60); do
        if docker info >/dev/null 2>&1; then
            echo "docker's daemon was started by hand; docker/daemon.sh stop ends it"
            exit 0
        fi
        sleep 1
    done
    fail "dockerd did not come up in a minute: $(tail -n 1 "$log")"
    ;;
stop)
    [ -f "$pidfile" ] || exit 0
    pid=$(cat "$pidfile")
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 60); do
        kill -0 "$pid" 2>/dev/null || exit 0
        sleep 1
    done
    fail "dockerd (process $pid) did not end in a minute"
    ;;
*) fail "docker/daemon.sh start or stop" ;;
esac
