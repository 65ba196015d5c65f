#!/bin/sh
# Install Slurm and munge where they are missing (Debian, as root); `make test-slurm` calls this first.
set -eu
missing=
for program in slurmctld slurmd sbatch munged; do
    PATH="$PATH:/usr/sbin" command -v "$program" >/dev/null || missing="$missing $program"
done
[ -n "$missing" ] || exit 0
[ "$(id -u)" = 0 ] || { echo "error:$missing: missing; install slurmctld, slurmd, slurm-client and munge, as root" >&2; exit 1; }
command -v apt-get >/dev/null || { echo "error:$missing: missing, and there is no apt-get; install Slurm and munge" >&2; exit 1; }
export DEBIAN_FRONTEND=noninteractive
install="apt-get install --yes --no-install-recommends slurmctld slurmd slurm-client munge"
# a machine's list of packages may be old, or not there yet
$install >/dev/null 2>&1 || { apt-get update >/dev/null && $install >/dev/null; }
