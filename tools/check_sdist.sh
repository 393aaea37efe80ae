#!/usr/bin/env bash
# A source distribution has every file that git has, but for those of CI and of git.
# usage: tools/check_sdist.sh ARCHIVE
set -euo pipefail
archive="$(realpath "${1:?usage: check_sdist.sh ARCHIVE}")"
cd "$(dirname "$0")/.."
missing="$(comm -23 \
  <(git ls-files -- ':!.ci' ':!.gitignore' | sort) \
  <(tar -tzf "$archive" | sed 's|^[^/]*/||' | sort))"
if [ -n "$missing" ]; then
  echo "not in the source distribution:"
  echo "$missing"
  exit 1
fi
echo "  $(basename "$archive") has all $(git ls-files | wc -l) files, $(du -h "$archive" | cut -f1)"
