#!/usr/bin/env bash
# Makes sure that PostgreSQL's programs are there, from Debian's packages if need be. Starts nothing.
set -euo pipefail
if command -v initdb >/dev/null || compgen -G "/usr/lib/postgresql/*/bin/initdb" >/dev/null; then
    exit 0
fi
if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    echo "PostgreSQL is not installed, and only root can install it with apt-get:" >&2
    echo "install your system's PostgreSQL server (its initdb and postgres on the PATH), then run this again" >&2
    exit 1
fi
# Debian's package would make a database of the machine and start it.
mkdir -p /etc/postgresql-common
[ -e /etc/postgresql-common/createcluster.conf ] ||
    echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends -o Dpkg::Options::=--force-confold postgresql
