#!/usr/bin/env bash
# A folder as one stream in pieces, of which each fits one call beside the checkout.
#   pieces.sh FOLDER OUT    -> OUT/0/kit.tar.xz.00, OUT/1/kit.tar.xz.01 ..., SHA256SUMS with each
#   pieces.sh --piece       -> a piece's bytes
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
MIB=$((1 << 20))
# A call holds 64 MiB: two are for what the checkout gains after packing.
CALL=$((62 * MIB))
# PIECE may be given, in bytes: tests have less to send.
if [ -z "${PIECE:-}" ]; then
  # What travels of the checkout: all that git does not ignore.
  travels=$(cd "$root" && git ls-files -z --cached --others --exclude-standard |
    { xargs -0 stat -c %s 2>/dev/null || true; } | awk '{ all += $1 } END { print all + 0 }')
  PIECE=$(((CALL - travels - 1) / MIB * MIB))
fi
if [ "$PIECE" -le 0 ]; then
  echo "the checkout fills a call: $travels bytes" >&2
  exit 1
fi
if [ "$1" = --piece ]; then
  echo "$PIECE"
  exit
fi
out=$(mkdir -p "$2" && cd "$2" && pwd)
rm -rf "${out:?}"/[0-9]*
tar -C "$1" -c . | xz -T0 -6 | split -b "$PIECE" -d -a 2 - "$out/kit.tar.xz."
cd "$out"
sha256sum kit.tar.xz.* > SHA256SUMS
number=0
for piece in kit.tar.xz.*; do
  mkdir "$number"
  mv "$piece" "$number/"
  # All sums with each: the last to come knows what it waits for.
  cp SHA256SUMS "$number/"
  number=$((number + 1))
done
rm SHA256SUMS
du -h "$out"/*/kit.tar.xz.*
