#!/bin/sh
# Run PostgreSQL for the MLflow server, in its own container. The first start makes the database. It listens on a socket
# alone: there is no port, so it needs no password.
set -eu
programs=$(find /usr/lib/postgresql -path '*/bin/postgres' -printf '%h\n' | sort -V | tail -n 1)
data=/srv/database
if [ ! -s "$data/PG_VERSION" ]; then
    "$programs/initdb" --pgdata "$data" --username dp-lora --auth-local trust --auth-host reject --encoding UTF8 --no-sync
fi
exec "$programs/postgres" -D "$data" -k /run/database -c listen_addresses=
