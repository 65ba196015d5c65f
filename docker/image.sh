#!/bin/sh
# Build the image that MLproject names. BASE_IMAGE: another base; CA_CERTIFICATES: another file of root certificates.
set -eu
cd "$(dirname "$0")/.."
image=$(sed -n 's/^ *image: *//p' MLproject)
docker/daemon.sh start

# find a docker client that has BuildKit: before version 23 it is built in, from 23 on it is the plugin buildx
builder=
for candidate in $(which -a docker); do
    version=$("$candidate" version --format '{{.Client.Version}}')
    if [ "${version%%.*}" -lt 23 ] || "$candidate" buildx version >/dev/null 2>&1; then
        builder=$candidate
        break
    fi
done
[ -n "$builder" ] || { echo "error: docker has no BuildKit; install its plugin buildx (Debian: docker-buildx)" >&2; exit 1; }

base=${BASE_IMAGE:-$(docker/base.sh)}
certificates=${CA_CERTIFICATES:-/etc/ssl/certs/ca-certificates.crt}
[ -f "$certificates" ] || certificates=/dev/null
commit=$(git describe --always --dirty --abbrev=40 --exclude '*')
DOCKER_BUILDKIT=1 "$builder" build --network=host --file docker/Dockerfile --tag "$image" \
    --build-arg BASE_IMAGE="$base" --secret id=ca,src="$certificates" \
    --label org.opencontainers.image.revision="$commit" \
    --label org.opencontainers.image.version="${image##*:}" \
    --label dp-lora.lock="$(sha256sum requirements.lock | cut -d' ' -f1)" \
    .
echo
echo "$image: $(docker image inspect --format '{{.Id}}' "$image")"
echo "next:   export MLFLOW_TRACKING_URI=http://127.0.0.1:5000   (the server that 'make ui' starts)"
echo "        .venv/bin/mlflow run . -e finetune -P eps=5        (on a host with a GPU: -A gpus=all)"
