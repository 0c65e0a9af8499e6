# shellcheck shell=sh
# Runs "$@" as the first process of a PID namespace (see supervisor.rs).
# Standard input ends when belljar ends; standard output is a locked directory that must stay open as long as we live.
exec 8<&0 9>&1 </dev/null 1>&2
# What packages install has modes of its own; what their scripts make must not depend on who runs belljar.
umask 022
# In the background shells give a command /dev/null as input, hence descriptor 8. `read` returns at the end of it.
{ read -r _ <&8; kill -KILL -1; } &
# Packages' scripts ask for the host name; it is nothing that belongs into a template.
echo localhost >/proc/sys/kernel/hostname
"$@" 8<&-
# Not `exec`: process 1 must be this shell, since signals from inside do not reach process 1.
exit $?
