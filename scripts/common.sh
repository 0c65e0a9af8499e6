# shellcheck shell=bash
# What the scripts beside this file share. Sourced by them; needs bash.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly repository

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
note() { printf '   %s\n' "$*"; }
fail() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }

# What a command is begun with to run as root: nothing, or sudo, which asks. (Not a function: a server is started with it
# in the background, and its signals must reach it.)
as_root=()
if [ "$(id -u)" != 0 ]; then
    as_root=(sudo "--preserve-env=http_proxy,https_proxy,no_proxy,SSL_CERT_FILE,SSL_CERT_DIR,DEBIAN_FRONTEND")
fi
# shellcheck disable=SC2034  # used by those who source this
readonly as_root

# Whether version $1 is at least $2.
is_at_least() { [ "$(printf '%s\n' "$1" "$2" | sort -V | head -n 1)" = "$2" ]; }

# Puts tools that install-dependencies may have placed where no login shell has looked yet on the PATH.
find_tools() {
    export PATH=$PATH:$HOME/.cargo/bin:$repository/target/tools/node/bin
}
