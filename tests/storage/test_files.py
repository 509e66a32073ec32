"""What the file door promises: private files, whole ones, and locks that end with their process."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from logstore.errors import NotAStoreError
from logstore.storage import files
from logstore.storage.files import Disk, Lock, lock_holders, refuse_unsupported_place
from tests.storage.disks import Fault, FaultyDisk, open_descriptors

DEADLINE_S = 30


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def run(code: str, *arguments: object, stdin: str = "") -> str:
    """Run code in a process of its own; what it prints is returned."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=True, timeout=DEADLINE_S).stdout


# Files and folders.


def test_no_room_is_made_for_more_than_there_is(tmp_path: Path) -> None:
    # As bytes this would be 4 GiB, which is more than the process may have.
    code = """
import resource, sys
from pathlib import Path
from logstore.storage.files import Disk
pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
if pages:
    bound = pages * resource.getpagesize() + (256 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
disk = Disk()
fd = disk.open(Path(sys.argv[1]))
print(disk.read(fd, 0xFFFFFFFF, 2), disk.read(fd, 0xFFFFFFFF, 9))
disk.close(fd)
"""
    (tmp_path / "file").write_bytes(b"12345")
    assert run(code, tmp_path / "file") == "b'345' b''\n"


def test_files_and_folders_are_private(tmp_path: Path) -> None:
    disk = Disk()
    folder = tmp_path / "a" / "b"
    disk.make_folder(folder)
    disk.close(disk.create(folder / "created"))
    disk.close(disk.open(folder / "opened", create=True))
    disk.publish(folder / "published", b"data")
    lock = disk.lock(folder / "lock")
    assert lock is not None
    lock.release()
    assert {path.name: mode_of(path) for path in folder.iterdir()} == dict.fromkeys(
        ("created", "opened", "published", "lock"), 0o600
    )
    assert mode_of(folder) == mode_of(folder.parent) == 0o700


def test_a_folder_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "there"
    folder.mkdir(mode=0o755)
    before = mode_of(folder)
    Disk().make_folder(folder)
    assert mode_of(folder) == before


def test_each_new_folder_is_synced_in_its_parent(tmp_path: Path) -> None:
    disk = FaultyDisk()
    disk.make_folder(tmp_path / "a" / "b")
    assert disk.calls == [("sync_folder", tmp_path.name), ("sync_folder", "a")]


def test_a_file_in_the_way_of_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        Disk().make_folder(tmp_path / "file")


def test_create_never_opens_a_file_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"data")
    with pytest.raises(FileExistsError):
        Disk().create(tmp_path / "there")
    assert (tmp_path / "there").read_bytes() == b"data"


def test_a_folder_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert Disk().list(tmp_path / "nowhere") == []


def test_to_remove_what_is_gone_is_no_error(tmp_path: Path) -> None:
    Disk().unlink(tmp_path / "gone")


@pytest.mark.parametrize("length", [0, 1, (1 << 20) - 1, (1 << 20) + 1, 3 << 20])
def test_reads_are_whole_and_shorter_only_at_the_end(tmp_path: Path, length: int) -> None:
    disk = Disk()
    data = bytes(range(256)) * 8192
    fd = disk.create(tmp_path / "file")
    disk.write(fd, data, 0)
    assert disk.read(fd, length, 0) == data[:length]
    assert disk.read(fd, length, len(data) - 5) == data[-5:][:length]
    assert disk.read(fd, length, len(data) + 5) == b""
    disk.close(fd)


class SlowPipe:
    """A system call that writes a few bytes at a time, as a signal or a quota makes it do."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._pwrite = os.pwrite

    def __call__(self, fd: int, data: bytes, offset: int) -> int:
        return self._pwrite(fd, bytes(data[: self._step]), offset)


@pytest.mark.parametrize("step", [1, 7, 100])
def test_a_write_that_the_system_cuts_short_is_carried_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    disk = Disk()
    fd = disk.create(tmp_path / "file")
    disk.write(fd, b"before", 0)
    monkeypatch.setattr(os, "pwrite", SlowPipe(step))
    data = bytes(range(256)) * 2
    disk.write(fd, data, 3)
    assert disk.read(fd, 1000, 0) == b"bef" + data
    disk.close(fd)


def test_a_file_is_made_longer_and_never_shorter(tmp_path: Path) -> None:
    disk = Disk()
    fd = disk.create(tmp_path / "file")
    disk.write(fd, b"data", 0)
    disk.extend(fd, 10)
    disk.extend(fd, 2)
    assert disk.read(fd, 100, 0) == b"data" + bytes(6)
    disk.close(fd)


def test_syncs_and_a_forgotten_cache_leave_the_bytes_as_they_are(tmp_path: Path) -> None:
    disk = Disk()
    fd = disk.create(tmp_path / "file")
    disk.write(fd, b"data", 0)
    disk.sync(fd)
    disk.forget_cache(fd)
    assert disk.read(fd, 100, 0) == b"data"
    disk.close(fd)


# Publishing.


@pytest.mark.promise("crash-opens")
def test_a_file_is_published_in_an_order_that_a_crash_cannot_spoil(tmp_path: Path) -> None:
    disk = FaultyDisk()
    disk.publish(tmp_path / "file", b"new")
    assert [kind for kind, _ in disk.calls] == ["unlink", "create", "write", "sync", "rename", "sync_folder"]
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("kind", ["create", "write", "sync", "rename"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_publishing_on_a_failing_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, kind: str, error: int
) -> None:
    disk = FaultyDisk()
    disk.publish(tmp_path / "file", b"old")
    disk.fail(Fault(kind, error=error, written=2))
    with pytest.raises(OSError, match=rf"Errno {error}\b"):
        disk.publish(tmp_path / "file", b"newer")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}
    disk.heal()
    disk.publish(tmp_path / "file", b"newest")
    assert (tmp_path / "file").read_bytes() == b"newest"


def test_what_a_crash_left_while_publishing_is_not_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file.tmp").write_bytes(b"half of a much longer file")
    Disk().publish(tmp_path / "file", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"new"}


# Locks.


def held(lock: Lock | None) -> Lock:
    assert lock is not None
    return lock


def test_an_exclusive_lock_is_held_once(tmp_path: Path) -> None:
    disk, path = Disk(), tmp_path / "lock"
    with held(disk.lock(path)):
        assert disk.lock(path) is None
        assert disk.lock(path, shared=True) is None
    held(disk.lock(path)).release()
    assert path.exists()


def test_a_shared_lock_is_held_by_many_and_keeps_an_exclusive_one_out(tmp_path: Path) -> None:
    disk, path = Disk(), tmp_path / "lock"
    with held(disk.lock(path, shared=True)), held(disk.lock(path, shared=True)) as second:
        assert disk.lock(path) is None
        second.release()
        assert disk.lock(path) is None
    held(disk.lock(path)).release()


def test_to_release_twice_closes_nothing_else(tmp_path: Path) -> None:
    disk = Disk()
    lock = held(disk.lock(tmp_path / "lock"))
    lock.release()
    fd = disk.create(tmp_path / "file")
    lock.release()
    assert disk.size(fd) == 0
    disk.close(fd)


def test_a_refused_lock_leaves_no_descriptor_behind(tmp_path: Path) -> None:
    disk = Disk()
    with held(disk.lock(tmp_path / "lock")):
        before = open_descriptors()
        assert disk.lock(tmp_path / "lock") is None
        assert open_descriptors() == before


WAITER = """
import sys
from pathlib import Path
from logstore.storage.files import Disk
path = Path(sys.argv[1])
print("waiting", flush=True)
with Disk().lock(path, wait=True):
    print("held", flush=True)
"""


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = held(Disk().lock(path))
    with subprocess.Popen([sys.executable, "-c", WAITER, path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        assert process.poll() is None
        lock.release()
        assert process.stdout.readline() == "held\n"
        assert process.wait(DEADLINE_S) == 0


FORKED = """
import os, sys
from pathlib import Path
from logstore.storage.files import Disk
disk, path = Disk(), Path(sys.argv[1])
lock = disk.lock(path)
asked = os.pipe()
child = os.fork()
if child == 0:
    os.read(asked[0], 1)  # until the parent's own descriptor is closed
    print(disk.lock(path) is not None, flush=True)
    os._exit(0)
assert disk.lock(path) is None, "the child's copy must not release the parent's lock"
lock.release()
os.write(asked[1], b".")
os.waitpid(child, 0)
"""


@pytest.mark.promise("forked-child")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_lets_go_of_the_locks_and_its_parent_does_not(tmp_path: Path) -> None:
    assert run(FORKED, tmp_path / "lock") == "True\n"


SURVIVED = """
import os, sys
from pathlib import Path
from logstore.storage.files import Disk
lock = Disk().lock(Path(sys.argv[1]))
child = os.fork()
if child == 0:
    print(os.getpid(), flush=True)
    sys.stdin.read()  # lives until told, after its parent
os._exit(0)
"""


@pytest.mark.promise("forked-child")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_lock_ends_with_its_process_though_a_forked_child_lives_on(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SURVIVED, tmp_path / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert process.wait(DEADLINE_S) == 0
        os.kill(child, 0)
        held(Disk().lock(tmp_path / "lock")).release()


HOLDER = """
import sys
from pathlib import Path
from logstore.storage.files import Disk
lock = Disk().lock(Path(sys.argv[1]), shared=True)
print(flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="the system does not tell")
def test_the_holders_of_a_lock_are_named(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert lock_holders(path) == []
    with (
        held(Disk().lock(path, shared=True)),
        subprocess.Popen(
            [sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other,
    ):
        assert other.stdout is not None
        other.stdout.readline()
        assert lock_holders(path) == sorted([os.getpid(), other.pid])
    assert lock_holders(path) == []


# Places.

MOUNTS = """\
23 28 0:21 / /proc rw,nosuid,nodev,noexec,relatime shared:12 - proc proc rw
28 1 253:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,errors=remount-ro
39 28 0:34 / /srv/with\\040-\\040hyphen rw master:2 propagate_from:3 - nfs4 server:/export rw,vers=4.2
40 28 0:35 / /mnt rw - fuse.sshfs me@host: rw
"""


@pytest.mark.parametrize(
    ("device", "kind"), [((253, 0), "ext4"), ((0, 34), "nfs4"), ((0, 35), "fuse.sshfs"), ((0, 99), None)]
)
def test_the_type_of_a_file_system_is_read_from_the_mounts(device: tuple[int, int], kind: str | None) -> None:
    assert files._type_of_device(MOUNTS, os.makedev(*device)) == kind


@pytest.mark.promise("network-refused")
@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "fuse.sshfs"])
def test_a_network_file_system_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(NotAStoreError, match=rf"network file system \({kind}\); put the store on a local disk"):
        files._refuse_type(tmp_path, kind)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "overlay", "tmpfs", "apfs", None])
def test_a_local_file_system_is_accepted(tmp_path: Path, kind: str | None) -> None:
    files._refuse_type(tmp_path, kind)


def test_this_place_is_accepted(tmp_path: Path) -> None:
    refuse_unsupported_place(tmp_path)


def test_a_system_without_flock_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(NotAStoreError, match="runs on Linux and macOS; win32"):
        refuse_unsupported_place(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the path of a descriptor")
@pytest.mark.promise("unreadable-is-told")
def test_an_error_of_a_call_on_a_descriptor_names_the_file(tmp_path: Path) -> None:
    disk = Disk()
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        # A folder's descriptor refuses them all.
        for call in (lambda: disk.read(folder, 1, 0), lambda: disk.write(folder, b"1", 0)):
            with pytest.raises(OSError, match=re.escape(str(tmp_path))):
                call()
    finally:
        os.close(folder)
