# shellcheck shell=bash
# The one place that starts and stops the server under test. Sourced by `run`; needs bash and root.
#
# Each run has a server of its own: state directory, port, instance name, sandboxes of a size that makes the tests of
# limits quick. Only the template is shared, because building it takes a minute: it lives in a state directory of its
# own, $BELLJAR_TEMPLATE_CACHE, that no server runs in.

# A small disk, so that filling it takes seconds. Sizes become part of a template when it is published, so they count for
# the cache too.
readonly SANDBOX_DISK_MIB=1024

readonly READY_WITHIN_SECONDS=60
readonly STOPPED_WITHIN_SECONDS=60

server_pid=""
work=""
outcome=1

start_server() {
    belljar=${BELLJAR_BIN:-$repository/target/release/belljar}
    [ -x "$belljar" ] || fail "there is no $belljar; build it with: cargo build --release, or set BELLJAR_BIN"
    [ "$(id -u)" = 0 ] || fail "the server makes network namespaces, mounts and cgroups for its sandboxes: run this as root"

    instance=conform-$$
    work=$(mktemp -d "${TMPDIR:-/tmp}/belljar-conformance.XXXXXX")
    state_dir=$work/state
    export BELLJAR_INSTANCE=$instance BELLJAR_SANDBOX_DISK_MIB=$SANDBOX_DISK_MIB
    write_config "$work/belljar.toml"
    export BELLJAR_CONFIG=$work/belljar.toml
    provide_template

    local port
    port=$(free_port)
    say "starting $belljar at 127.0.0.1:$port, its log in $work/server.log"
    "$belljar" up --state-dir "$state_dir" --listen "127.0.0.1:$port" --kill-on-exit >"$work/server.log" 2>&1 &
    server_pid=$!

    export E2B_API_URL=http://127.0.0.1:$port E2B_SANDBOX_URL=http://127.0.0.1:$port
    wait_until_ready
    E2B_API_KEY=$("$belljar" key create --name conformance --json --state-dir "$state_dir" | json_member key)
    export E2B_API_KEY

    # With these the tests act as the operator too: they make and revoke keys.
    export BELLJAR_BIN=$belljar BELLJAR_CONFORMANCE_STATE_DIR=$state_dir
}

# Settings that suit this machine (mirrors, certificates), if it has a script that knows them.
write_config() {
    if [ -x "$repository/scripts/host-config" ]; then
        "$repository/scripts/host-config" >"$1"
    else
        : >"$1"
    fi
}

# Builds the template where it is kept between runs, unless it is there, and shows it to the server: the rootfs is only
# read, so a link does; the records are copied, without what another server may have noted beside them.
provide_template() {
    local cache=${BELLJAR_TEMPLATE_CACHE:-$repository/target/conformance-template}
    "$belljar" template build base --state-dir "$cache"
    mkdir -m 700 "$state_dir"
    local part
    for part in templates engine; do
        ln -s "$(realpath "$cache/$part")" "$state_dir/$part"
    done
    python3 - "$cache/belljar.db" "$state_dir/belljar.db" <<'END'
import contextlib, sqlite3, sys

with contextlib.closing(sqlite3.connect(sys.argv[1])) as cache, contextlib.closing(sqlite3.connect(sys.argv[2])) as own:
    cache.backup(own)
    for table in ("idempotency_keys", "sandboxes", "api_keys"):
        own.execute(f"DELETE FROM {table}")
    own.commit()
END
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

json_member() {
    python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"
}

is_healthy() {
    python3 -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1] + "/health", timeout=2)' "$E2B_API_URL" 2>/dev/null
}

wait_until_ready() {
    local deadline=$((SECONDS + READY_WITHIN_SECONDS))
    until is_healthy; do
        kill -0 "$server_pid" 2>/dev/null || fail_with_log "the server ended while it started"
        [ $SECONDS -lt $deadline ] || fail_with_log "the server was not ready within $READY_WITHIN_SECONDS s"
        sleep 0.2
    done
}

# Asks the server to stop, waits for it, and looks for what it left behind. Fails if it didn't stop well or left anything.
stop_server() {
    local pid=$server_pid status=0
    server_pid=""
    if ! kill -0 "$pid" 2>/dev/null; then
        show_log "the server had ended before it was told to"
        return 1
    fi
    kill -TERM "$pid"
    local deadline=$((SECONDS + STOPPED_WITHIN_SECONDS))
    while kill -0 "$pid" 2>/dev/null; do
        if [ $SECONDS -ge $deadline ]; then
            show_log "the server did not stop within $STOPPED_WITHIN_SECONDS s"
            kill -KILL "$pid"
            status=1
        fi
        sleep 0.2
    done
    wait "$pid" || { show_log "the server ended with status $?"; status=1; }

    local leaks
    leaks=$(list_leaks)
    if [ -n "$leaks" ]; then
        say "LEAKED by the server:"
        printf '%s\n' "$leaks"
        status=1
    else
        say "no process, mount, network namespace, interface, packet filter, cgroup, loop device or file is left"
    fi
    return $status
}

# Everything on the machine that carries this instance's name or lies in its state directory, one per line.
list_leaks() {
    local prefix entry processes
    # The beginning of the instance's interface names: see belljar-runtime/src/network/slot.rs.
    prefix=bj$(printf %s "$instance" | sha256sum | cut -c1-6)-

    # Listed before grep runs, whose own arguments would match.
    processes=(/proc/[0-9]*/cmdline)
    while read -r entry; do
        echo "process: $entry: $(tr '\0' ' ' <"$entry" | cut -c1-200)"
    done < <(grep -slF -e "$state_dir" -e "/$instance/" "${processes[@]}")
    grep -F -e "$state_dir" -e "/run/belljar/$instance" /proc/self/mountinfo | sed 's/^/mount: /' || true
    find "/run/belljar/$instance" -mindepth 2 2>/dev/null | sed 's/^/run-time file: /' || true
    find /sys/class/net -name "$prefix*" -printf 'interface: %f\n'
    if command -v nft >/dev/null; then
        nft list tables | grep -E "[ _]$instance\$" | sed 's/^/packet filter: /' || true
    fi
    find /sys/fs/cgroup -type d -name "*$instance*" -printf 'cgroup: %p\n'
    grep -sF "$state_dir" /sys/block/loop*/loop/backing_file | sed 's/^/loop device: /' || true
    find "$state_dir/disks/scratch" -mindepth 1 -maxdepth 1 -printf 'file: %p\n' 2>/dev/null || true
}

# For the end of `run`, however it comes about.
clean_up() {
    if [ -n "$server_pid" ]; then
        kill -TERM "$server_pid" 2>/dev/null || true
        wait "$server_pid" 2>/dev/null || true
    fi
    # Kept after a failure: it has the log.
    if [ -n "$work" ] && [ "$outcome" = 0 ]; then
        rm -rf "$work"
    fi
}

show_log() {
    say "$1; the end of its log:"
    tail -n 40 "$work/server.log"
}

fail_with_log() {
    show_log "$1"
    fail "$1"
}
