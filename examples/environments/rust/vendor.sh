#!/usr/bin/env bash
# For those who have Debian's packages and no crates.io: unpacks the crates that the build needs from
# the packages of Debian 13 into a folder of the cache. Nothing is installed; any Debian will do.
set -euo pipefail
vendor=${XDG_CACHE_HOME:-$HOME/.cache}/rollmesh/sort-letters/vendor
[ -e "$vendor/.complete" ] && exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/archives/partial" "$work/debs" "${vendor%/*}"

# The mirror that this machine uses already.
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | sort -u | head -n 1)
[ -n "$mirror" ] || { echo "apt knows no mirror of Debian: run apt-get update" >&2; exit 1; }
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb [signed-by=$keyring] $mirror trixie main" > "$work/sources.list"
apt=(apt-get -qq
  -o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=-
  -o "Dir::State::Lists=$work/lists" -o Dir::State::status=/dev/null
  -o "Dir::Cache::Archives=$work/archives" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=
  -o APT::Install-Recommends=false -o APT::Sandbox::User=root)
"${apt[@]}" update
packages=$("${apt[@]}" --simulate install librust-{prost,prost-types,tokio,tokio-stream,tonic,tonic-build}-dev |
  sed -n 's/^Inst \(librust-[a-z0-9.+-]*\) .*/\1/p')
(cd "$work/debs" && "${apt[@]}" download $packages)
for deb in "$work"/debs/*.deb; do dpkg-deb -x "$deb" "$work/root"; done
rm -rf "$vendor"
mv "$work/root/usr/share/cargo/registry" "$vendor"
touch "$vendor/.complete"
