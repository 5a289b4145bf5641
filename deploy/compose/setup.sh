#!/bin/sh
# Makes what the containers must not share with anybody: secrets/, with passwords and certificates, once. Run it before
# the first `docker compose up`. It needs openssl.
#
# The files can be read by every user inside the containers, since Compose keeps the owner and the mode that they have
# here; outside, the folder keeps others away.
set -eu
cd "$(dirname "$0")"
if [ -e secrets ]; then
    echo "secrets/ is there already: nothing was changed" >&2
    exit 0
fi
password() { LC_ALL=C tr -dc A-Za-z0-9 </dev/urandom | head -c 40; }

new=$(mktemp -d secrets.XXXXXX)
password >"$new/postgres-password"
password >"$new/grafana-password"
../examples/certificates.sh "$new"
chmod 0700 "$new"
chmod 0644 "$new"/*
mv "$new" secrets
