#!/usr/bin/env bash
# On the GPU's machine: keeps a piece of the kit; with the last one, unpacks all.
#   take.sh FOLDER SITE    FOLDER holds a piece and SHA256SUMS, as pieces.sh makes them
set -euo pipefail
site=$(mkdir -p "$2" && cd "$2" && pwd)
kept="$site.pieces"
mkdir -p "$kept"
cp "$1"/kit.tar.xz.* "$1/SHA256SUMS" "$kept/"
cd "$kept"
for piece in $(awk '{ print $2 }' SHA256SUMS); do
  if [ ! -f "$piece" ]; then
    echo "waiting for $piece"
    exit 0
  fi
done
sha256sum --quiet -c SHA256SUMS
# Where xz is missing, Python has its library.
if command -v xz >/dev/null; then
  unpack=(xz -T0 -d)
else
  unpack=(python3 -c 'import lzma, shutil, sys
shutil.copyfileobj(lzma.open(sys.stdin.buffer), sys.stdout.buffer, 1 << 20)')
fi
began=$(date +%s)
cat kit.tar.xz.* | "${unpack[@]}" | tar -xf - -C "$site"
cd / && rm -rf "$kept"
echo "unpacked in $(($(date +%s) - began)) s"
