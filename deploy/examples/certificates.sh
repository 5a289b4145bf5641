#!/bin/sh
# Makes an authority and what it certifies, to try things out: Keyward's certificate (keyward.crt, keyward.key) and the one
# that Envoy shows to Keyward (envoy.crt, envoy.key). Where there is an authority already, let that one do it, and let it
# keep its key elsewhere: who has ca.key is whoever they like.
#
# Usage: certificates.sh FOLDER
set -eu
[ $# = 1 ] || { echo "usage: certificates.sh FOLDER" >&2; exit 2; }
cd "$1"
umask 077

key() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1" 2>/dev/null; }

# issue NAME USE ALTERNATIVE-NAMES
issue() {
    key "$1.key"
    printf 'basicConstraints=CA:FALSE\nkeyUsage=digitalSignature\nextendedKeyUsage=%s\nsubjectAltName=%s\n' "$2" "$3" >"$1.ext"
    openssl req -new -key "$1.key" -subj "/CN=$1" -out "$1.csr"
    openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -set_serial "0x$(openssl rand -hex 16)" -sha256 -days 90 \
        -extfile "$1.ext" -out "$1.crt" 2>/dev/null
    rm "$1.ext" "$1.csr"
}

key ca.key
openssl req -x509 -new -key ca.key -sha256 -days 3650 -subj '/CN=Keyward, for trying out' \
    -addext 'keyUsage=critical,keyCertSign,cRLSign' -out ca.crt
issue keyward serverAuth DNS:keyward.internal,DNS:keyward-1,DNS:keyward-2,DNS:localhost,IP:127.0.0.1
issue envoy clientAuth URI:spiffe://example.org/envoy
