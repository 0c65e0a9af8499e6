#!/bin/sh
# mmdebstrap's customize hook: runs on the host when all packages are installed, with the new system's root as $1 and
# /proc, /sys and /dev mounted in it. belljar has put what varies into $BELLJAR_INPUTS (see mmdebstrap.rs).
# Lines that begin with "belljar:" are read by belljar; keep their wording in step with the constants there.
set -eu
root=$1

echo "belljar: creating the user $BELLJAR_USER"
chroot "$root" groupadd --gid "$BELLJAR_UID" "$BELLJAR_USER"
chroot "$root" useradd --uid "$BELLJAR_UID" --gid "$BELLJAR_UID" --create-home --home-dir "$BELLJAR_HOME" \
    --shell /bin/bash --no-log-init "$BELLJAR_USER"
if [ "$BELLJAR_SUDO" = yes ]; then
    install -m 0440 "$BELLJAR_INPUTS/sudoers" "$root/etc/sudoers.d/90-belljar"
    # sudo lives from its set-user-ID bit, which the gVisor release that belljar uses ignores. Where an engine needs it,
    # the agent has root start the command and puts the program that asks for it in /.belljar.
    chroot "$root" dpkg-divert --local --rename --add /usr/bin/sudo
    cat >"$root/usr/bin/sudo" <<'END'
#!/bin/sh
# Diverted by belljar: see dpkg-divert --list. Debian's own is sudo.distrib.
case $0 in *sudoedit) set -- --edit "$@" ;; esac
if [ -x /.belljar/sudo ] && [ "$(id -u)" != 0 ]; then
    exec /.belljar/sudo "$@"
fi
exec /usr/bin/sudo.distrib "$@"
END
    chmod 0755 "$root/usr/bin/sudo"
fi

# What `su` and a login start with: PAM reads it.
install -m 0644 "$BELLJAR_INPUTS/environment" "$root/etc/environment"

if [ -d "$BELLJAR_INPUTS/certificates" ]; then
    echo "belljar: trusting this host's CA certificates"
    install -d "$root/usr/local/share/ca-certificates/belljar-host"
    install -m 0644 "$BELLJAR_INPUTS/certificates"/*.crt "$root/usr/local/share/ca-certificates/belljar-host/"
    chroot "$root" update-ca-certificates
fi

# The build's own apt options (a proxy, a time limit) are of no use inside; belljar's come in their place.
rm -f "$root/etc/apt/apt.conf.d/99mmdebstrap"
if [ -d "$root/etc/apt/apt.conf.d" ]; then
    install -m 0644 "$BELLJAR_INPUTS/apt.conf" "$root/etc/apt/apt.conf.d/90belljar"
fi

# Where commands start; made as the user so that it is theirs wherever the recipe puts it below the home.
if [ ! -d "$root$BELLJAR_WORKING_DIRECTORY" ]; then
    install -d -o "$BELLJAR_UID" -g "$BELLJAR_UID" "$root$BELLJAR_WORKING_DIRECTORY"
fi

number=0
for script in "$BELLJAR_INPUTS"/run/*.sh; do
    [ -e "$script" ] || continue
    number=$((number + 1))
    command=$(sed -n '1s/^# //p' "$script")
    echo "belljar: run $number: $command"
    # As an argument, not as standard input: a command that reads its input must not eat the rest.
    chroot "$root" sh -euc "$(cat "$script")" </dev/null || {
        echo "belljar: failed: $number: $command"
        exit 1
    }
done
