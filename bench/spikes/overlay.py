#!/usr/bin/env python3
"""Which filesystem does a gVisor sandbox get? Two candidates, one course, a table of figures.

  sentry   --overlay2=root:dir=DIR, DIR on a loop-mounted ext4 of the sandbox's quota; the rootfs is shared, read-only
  host     --overlay2=none on a host overlayfs whose upper directory is on a loop-mounted ext4 of the quota

The decision that came out of it is docs/decisions/0001-sandbox-filesystem.md.

  overlay.py RUNSC ROOTFS      as root; ROOTFS needs /bin/sh, dd, df, cat and sleep (busybox is enough)

Everything it makes carries this process's number and is removed at the end, also after a failure.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# The sandbox's init: takes one command at a time from a bind mount, since `runsc exec` would break restore. The names
# are always the same three: each new one would stay in the sentry's cache and be measured as growth of the image. For
# the same reason /proc is mounted again with a small cache: every process that looks at /proc/self (busybox's all do)
# leaves 82 KB of directory entries in the image, up to a thousand processes, 82 MB in all.
INIT = """
mount -t proc -o dentry_cache_limit=16 proc /proc
while true; do
  if [ -e /control/command ]; then
    rm /control/status
    ( . /control/command ) > /control/output 2>&1
    status=$?
    rm /control/command
    echo $status > /control/status
  else
    sleep 0.01
  fi
done
"""


def run(*command, **options):
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True, **options)


def timed(function):
    start = time.monotonic()
    result = function()
    return time.monotonic() - start, result


def allocated_bytes(path):
    """What the file or tree really occupies, holes left out."""
    files = [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]
    return sum(entry.stat().st_blocks * 512 for entry in files)


def unmount(path):
    """The sentry of a big sandbox takes a moment to end after `runsc delete` has returned."""
    deadline = time.monotonic() + 20
    while subprocess.run(["umount", str(path)], capture_output=True).returncode != 0:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{path} stays busy")
        time.sleep(0.02)


class Sandbox:
    """One sandbox of either kind, with its scratch disk mounted at `directory/mount`."""

    def __init__(self, course, name, quota_mib, copy_of=None):
        self.course = course
        self.id = f"{course.prefix}-{name}"
        self.directory = course.work / name
        self.control = self.directory / "control"
        self.mount = self.directory / "mount"
        self.merged = self.directory / "merged"
        self.image = self.directory / "scratch.img"
        self.log = self.directory / "runsc.log"
        self.process = None
        for path in (self.control, self.mount, self.merged):
            path.mkdir(parents=True)
        if copy_of is None:
            with open(self.image, "wb") as image:
                image.truncate(quota_mib << 20)
            run("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", "-E", "lazy_itable_init=1", self.image)
        else:
            run("cp", "--sparse=always", "--reflink=auto", copy_of.image, self.image)
        course.sandboxes.append(self)
        run("mount", "-o", "loop,nosuid,nodev" if course.kind == "sentry" else "loop", self.image, self.mount)
        self.assemble()
        self.write_config()

    def assemble(self):
        if self.course.kind == "sentry":
            return
        for name in ("upper", "work"):
            (self.mount / name).mkdir(exist_ok=True)
        layers = f"lowerdir={self.course.rootfs},upperdir={self.mount}/upper,workdir={self.mount}/work"
        run("mount", "-t", "overlay", "overlay", "-o", layers, self.merged)

    def write_config(self):
        rootfs = self.course.rootfs if self.course.kind == "sentry" else self.merged
        config = {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0},
                "capabilities": {kind: ["CAP_SYS_ADMIN"] for kind in ("bounding", "effective", "permitted")},
                "args": ["/bin/sh", "-c", INIT],
                "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
                "cwd": "/",
            },
            "root": {"path": str(rootfs), "readonly": False},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
                {"destination": "/control", "type": "bind", "source": str(self.control), "options": ["rw"]},
            ],
            "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "network")]},
        }
        (self.directory / "config.json").write_text(json.dumps(config))

    def runsc(self, *command):
        overlay = f"root:dir={self.mount}" if self.course.kind == "sentry" else "none"
        return [
            str(self.course.runsc), f"--root={self.course.work}/run", "--platform=systrap", "--network=none",
            "--ignore-cgroups", f"--overlay2={overlay}", f"--log={self.log}", *map(str, command),
        ]

    def start(self, *command):
        self.process = subprocess.Popen(
            self.runsc(*command), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=open(self.log, "a")
        )

    def boot(self):
        self.start("run", "--bundle", self.directory, self.id)
        self.guest("true")

    def checkpoint(self, image, leave_running=False):
        """Answers the seconds it took. Without `leave_running` the sandbox ends, and `forget` clears the way back."""
        image.mkdir(parents=True, exist_ok=True)
        for stale in image.iterdir():
            stale.unlink()
        extra = ["--leave-running"] if leave_running else []
        command = self.runsc("checkpoint", "--compression=none", f"--image-path={image}", *extra, self.id)
        seconds, answer = timed(lambda: subprocess.run(command, capture_output=True, text=True))
        if answer.returncode != 0:
            raise RuntimeError((answer.stderr or self.log.read_text())[-400:])
        if not leave_running:
            self.process.wait(60)
        return seconds

    def forget(self):
        """Not part of any figure: `runsc delete` waits until the machine's init has reaped the sentry."""
        subprocess.run(self.runsc("delete", "--force", self.id), capture_output=True)

    def restore(self, image):
        self.start("restore", "--bundle", self.directory, f"--image-path={image}", self.id)
        self.guest("true")

    def guest(self, script, timeout_seconds=120):
        """Runs a script in the guest's init shell; answers (exit status, output)."""
        command, part, status = (self.control / name for name in ("command", "part", "status"))
        part.write_text(script)
        part.rename(command)
        deadline = time.monotonic() + timeout_seconds
        while command.exists() or not status.exists() or not status.read_text().endswith("\n"):
            if time.monotonic() > deadline:
                raise TimeoutError(script)
            if self.process.poll() is not None:
                raise RuntimeError(f"the sandbox ended during: {script}\n{self.log.read_text()[-2000:]}")
            time.sleep(0.002)
        return int(status.read_text()), (self.control / "output").read_text().strip()

    def remove(self):
        self.forget()
        if self.process is not None:
            self.process.wait(60)
        for path in (self.merged, self.mount):
            if os.path.ismount(path):
                unmount(path)
        shutil.rmtree(self.directory)
        self.course.sandboxes.remove(self)


class Course:
    """Every exercise, for one kind of filesystem; `figures` is a column of the table."""

    def __init__(self, kind, runsc, rootfs, work):
        self.kind, self.runsc, self.rootfs = kind, runsc, rootfs
        self.prefix = f"overlay-spike-{os.getpid()}-{kind}"
        self.work = work / kind
        self.work.mkdir()
        self.sandboxes = []
        self.figures = {}

    def quota(self):
        sandbox = Sandbox(self, "quota", 256)
        sandbox.boot()
        _, before = sandbox.guest("df -m / | tail -1")
        status, output = sandbox.guest("dd if=/dev/zero of=/fill bs=1M 2>&1 | head -1")
        alive, _ = sandbox.guest("rm /fill && echo again > /after && cat /after")
        self.figures["256 MiB quota: df shows (MiB)"] = before.split()[1]
        self.figures["256 MiB quota: filling says"] = output.rsplit(": ", 1)[-1]
        self.figures["256 MiB quota: alive after, space back"] = "yes" if alive == 0 else "no"
        sandbox.remove()

    def gigabyte(self):
        sandbox = Sandbox(self, "gigabyte", 4096)
        sandbox.boot()
        seconds, _ = timed(lambda: sandbox.guest("dd if=/dev/urandom of=/big bs=1M count=1024 && sync"))
        image = self.work / "gigabyte-image"
        paused = sandbox.checkpoint(image)
        self.figures["1 GiB: write and sync (s)"] = f"{seconds:.2f}"
        self.figures["1 GiB: pause (s)"] = f"{paused:.2f}"
        self.figures["1 GiB: pause image (MiB)"] = allocated_bytes(image) >> 20
        sandbox.forget()
        resumed, _ = timed(lambda: sandbox.restore(image))
        self.figures["1 GiB: resume (s)"] = f"{resumed:.2f}"
        sandbox.remove()
        shutil.rmtree(image)

    def unlinked(self):
        sandbox = Sandbox(self, "unlinked", 256)
        sandbox.boot()
        # The subshell that runs commands must not own the descriptor: a background process does.
        sandbox.guest(
            "( exec 3<>/gone; echo kept >&3; rm /gone; while [ ! -e /ask ]; do sleep 0.02; done; "
            "cat /proc/self/fd/3 > /answer ) > /dev/null 2>&1 &"
        )
        sandbox.guest("while [ -e /gone ] || ! ls / > /dev/null; do sleep 0.02; done; sleep 0.2")
        image = self.work / "unlinked-image"
        try:
            sandbox.checkpoint(image)
            sandbox.forget()
            sandbox.restore(image)
            _, answer = sandbox.guest("touch /ask; sleep 0.5; cat /answer")
            self.figures["open, unlinked file over a pause"] = answer or "lost"
        except RuntimeError as error:
            self.figures["open, unlinked file over a pause"] = "pause fails"
            print(f"[{self.kind}] checkpoint: {error}", file=sys.stderr)
        sandbox.remove()

    def pauses(self):
        sandbox = Sandbox(self, "pauses", 1024)
        sandbox.boot()
        sandbox.guest("dd if=/dev/urandom of=/base bs=1M count=64")
        image = self.work / "pauses-image"
        pause_s, resume_s, sizes, disks = [], [], [], []
        for _ in range(50):
            sandbox.guest("dd if=/dev/urandom of=/scratch bs=1M count=8")
            pause_s.append(sandbox.checkpoint(image))
            sizes.append(allocated_bytes(image))
            sandbox.forget()
            resume_s.append(timed(lambda: sandbox.restore(image))[0])
            os.sync()
            disks.append(allocated_bytes(sandbox.image))
        _, total = sandbox.guest("cat /base /scratch | wc -c")
        self.figures["50 pauses: files intact (bytes)"] = total
        self.figures["50 pauses: pause p50 (ms)"] = round(sorted(pause_s)[25] * 1000)
        self.figures["50 pauses: resume p50 (ms)"] = round(sorted(resume_s)[25] * 1000)
        self.figures["50 pauses: image first, last (MiB)"] = f"{sizes[0] >> 20}, {sizes[-1] >> 20}"
        self.figures["50 pauses: disk first, last (MiB)"] = f"{disks[0] >> 20}, {disks[-1] >> 20}"
        sandbox.remove()
        shutil.rmtree(image)

    def forks(self):
        parent = Sandbox(self, "parent", 1024)
        parent.boot()
        parent.guest("dd if=/dev/urandom of=/base bs=1M count=64; md5sum /base > /sum")
        image = self.work / "forks-image"

        def fork_all():
            # A host disk can only be copied whole while nobody writes: its parent has to stop, the sentry's need not.
            parent.checkpoint(image, leave_running=self.kind == "sentry")
            children = []
            for number in range(10):
                copy_of = parent if self.kind == "host" else None
                if copy_of is not None and number == 0:
                    run("sync", "-f", parent.mount)
                child = Sandbox(self, f"child{number}", 1024, copy_of=copy_of)
                child.restore(image)
                children.append(child)
            return children

        seconds, children = timed(fork_all)
        intact = sum(child.guest("md5sum -c /sum")[0] == 0 for child in children)
        self.figures["10 forks of 64 MiB: all (s)"] = f"{seconds:.2f}"
        self.figures["10 forks of 64 MiB: intact"] = intact
        self.figures["10 forks: parent keeps running"] = "yes" if self.kind == "sentry" else "stops"
        for sandbox in [*children, parent]:
            sandbox.remove()
        shutil.rmtree(image)

    def run_all(self):
        try:
            for exercise in (self.quota, self.gigabyte, self.unlinked, self.pauses, self.forks):
                print(f"[{self.kind}] {exercise.__name__}", file=sys.stderr)
                exercise()
        finally:
            for sandbox in list(self.sandboxes):
                sandbox.remove()


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    if os.geteuid() != 0:
        sys.exit("needs root: it mounts filesystems and starts runsc")
    runsc, rootfs = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    work = Path(tempfile.mkdtemp(prefix="belljar-overlay-"))
    (work / "note").write_text("made by bench/spikes/overlay.py\n")
    try:
        columns = []
        for kind in ("sentry", "host"):
            course = Course(kind, runsc, rootfs, work)
            course.run_all()
            columns.append(course.figures)
    finally:
        shutil.rmtree(work)
    print(f"| {'':44} | {'sentry':>24} | {'host':>24} |\n|{'-' * 46}|{'-' * 25}:|{'-' * 25}:|")
    for name in columns[0]:
        print(f"| {name:44} | {columns[0][name]!s:>24} | {columns[1].get(name, '-')!s:>24} |")


if __name__ == "__main__":
    main()
