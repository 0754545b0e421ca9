#!/usr/bin/env bash
# Makes sure that PostgreSQL's programs are there, from Debian's packages if need be. Starts nothing.
set -euo pipefail
package=postgresql
if command -v initdb >/dev/null || compgen -G "/usr/lib/postgresql/*/bin/initdb" >/dev/null; then
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "PostgreSQL is not installed and there is no apt-get here: install your system's PostgreSQL server," >&2
    echo "so that initdb and postgres are on the PATH, then run this again" >&2
    exit 1
fi
if [ "$(id -u)" = 0 ]; then
    as_root=()
elif sudo -n true 2>/dev/null; then
    as_root=(sudo)
else
    echo "PostgreSQL is not installed, and $(id -un) may not install it (no sudo without a password): let root run" >&2
    echo "    apt-get update && apt-get install --no-install-recommends $package" >&2
    echo "then run this again" >&2
    exit 1
fi
# Debian's package would make a database of the machine and start it.
settings=/etc/postgresql-common/createcluster.conf
if [ ! -e "$settings" ]; then
    "${as_root[@]}" mkdir -p "$(dirname "$settings")"
    echo "create_main_cluster = false" | "${as_root[@]}" tee "$settings" >/dev/null
fi
"${as_root[@]}" apt-get update -qq
# The setting that is there already is kept.
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends -o Dpkg::Options::=--force-confold "$package"
