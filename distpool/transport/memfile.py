"""Memory that two processes of one host map: making, opening and removing the files behind it (layer 2).

Data flow:

    sender    create() -> MemoryFile: memfd, known to others as /proc/<ospid>/fd/<n>   --- path in a message --->
              (no memfd or no /proc: a named file in a private 0700 directory)
    receiver  open_checked(path, size) -> descriptor -> mmap

No thread of its own; every function may run on any thread.  `shm` (buffers) and `journal` (results) build on it.

Why a path, and not a descriptor passed over the socket: it works over any stream and from any thread, and a receiver
that cannot open it says so in words.  Its price: the path ends with the process, so a receiver attaches while it reads
the message, not when somebody asks for the value.  What a death leaves: nothing for memfds. Named files go
with their segments, and their directory at the end of its maker's program (`SegmentPool.close`); a process that is
killed leaves both, under names that begin with "distpool-" and, the files, carry its ospid.

Why nobody meets SIGBUS: every page that is ever read or written through a mapping was allocated before, by a call
which reports "full" as an error (`write_at`, `allocate`); a mapping is never the first to touch a page.  That matters
for memfds as well: they have no size limit of their own, but under vm.overcommit_memory=2 a page fault that cannot
be accounted for is a SIGBUS.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import sys

#: What /proc/<ospid>/fd/<n> of our memfds points at: "/memfd:distpool (deleted)".
MEMFD_NAME = "distpool"
#: Linux: fill the page table in one call, without writing (mmap has no name for it; since Linux 5.14).
MADV_POPULATE_READ = 22
#: Our descriptors stay below this share of the table: the rest belongs to the user's program.
DESCRIPTOR_SHARE = 0.75


class MemoryFile:
    """A file in memory made by this process: `descriptor` (owned), `path` for others, `named` when it has a name."""

    __slots__ = ("descriptor", "named", "ospid", "path")

    def __init__(self, descriptor: int, path: str, named: bool) -> None:
        self.descriptor = descriptor
        self.path = path
        self.named = named
        self.ospid = os.getpid()

    def discard(self, free_pages: bool) -> None:
        """Close and unlink it; with `free_pages` its memory is freed even where others still have it mapped.

        Only the process that made it may free pages or unlink: a forked child merely closes its copy.
        """
        if self.descriptor < 0:
            return
        descriptor, self.descriptor = self.descriptor, -1
        try:
            if self.ospid == os.getpid():
                if self.named:
                    unlink(self.path)
                if free_pages:
                    os.ftruncate(descriptor, 0)
        except OSError:
            pass  # Windows refuses both while others have it mapped; the memory then goes with their mappings
        finally:
            os.close(descriptor)


def create(size: int, directory: str | None = None, *, memfd: bool = True) -> MemoryFile:
    """Make an empty file of `size` bytes (no page allocated yet): a memfd, else a named file in `directory`.

    Raises `OSError`: descriptors exhausted, no room, or neither way exists here.
    """
    failure = OSError(errno.ENOSYS, "no memfd and /proc here, and no directory for named segments was given")
    if memfd and hasattr(os, "memfd_create"):
        try:
            return _create_memfd(size)
        except OSError as error:
            failure = error
    if directory is None:
        raise failure
    path = os.path.join(directory, f"segment-{os.getpid()}-{os.urandom(8).hex()}")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    file = MemoryFile(os.open(path, flags, 0o600), path, named=True)
    return _sized(file, size)


def _create_memfd(size: int) -> MemoryFile:
    descriptor = os.memfd_create(MEMFD_NAME, os.MFD_CLOEXEC)
    file = _sized(MemoryFile(descriptor, f"/proc/{os.getpid()}/fd/{descriptor}", named=False), size)
    try:
        # /proc may be missing, hidden, or belong to another pid namespace: then the path leads elsewhere or nowhere.
        if not os.path.samestat(os.stat(file.path), os.fstat(descriptor)):
            raise OSError(errno.ENOENT, "/proc shows other processes than ours", file.path)
    except OSError:
        file.discard(free_pages=True)
        raise
    return file


def _sized(file: MemoryFile, size: int) -> MemoryFile:
    try:
        if not has_spare(file.descriptor):
            raise OSError(errno.EMFILE, "most file descriptors are in use")
        os.ftruncate(file.descriptor, size)
    except OSError:
        file.discard(free_pages=True)
        raise
    return file


def has_spare(descriptor: int) -> bool:
    """Whether a new descriptor leaves enough for others: the lowest free number tells how full the table is."""
    try:
        import resource
    except ImportError:  # Windows: no small limit
        return True
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return soft == resource.RLIM_INFINITY or descriptor < soft * DESCRIPTOR_SHARE


def open_checked(path: str, size: int, *, writable: bool = True) -> int:
    """Open a peer's file; the caller closes the descriptor.  `OSError` unless it has at least `size` bytes.

    The checks are for the case that the peer is gone and its ospid or descriptor number means something else now:
    without them an mmap of a shorter file would be a SIGBUS later.
    """
    if path.startswith("/proc/") and not os.readlink(path).startswith(f"/memfd:{MEMFD_NAME}"):
        raise OSError(errno.ESTALE, "not a shared segment of distpool", path)
    flags = os.O_RDWR if writable else os.O_RDONLY
    for name in ("O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY", "O_BINARY"):
        flags |= getattr(os, name, 0)
    descriptor = _open_anyway(path, flags)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size < size or size <= 0:
        os.close(descriptor)
        raise OSError(errno.ESTALE, f"not a segment of {size} bytes", path)
    return descriptor


_reserved: list[int] = []  # atomic ends


def reserve() -> None:
    """Keep a descriptor for `open_checked`. Where the user's program has used up all, what a peer sends can be read all
    the same: refused, it would cost the link and with it everything that the peer does."""
    if not _reserved:
        try:
            _reserved.append(os.open(os.devnull, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)))
        except OSError:
            pass  # later, perhaps


def _open_anyway(path: str, flags: int) -> int:
    try:
        return os.open(path, flags)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE) or not _reserved:
            raise
    os.close(_reserved.pop())
    return os.open(path, flags)


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` (format B); allocates pages, releases the GIL.  `OSError` when memory or disk is full."""
    while data.nbytes:
        if hasattr(os, "pwrite"):
            done = os.pwrite(descriptor, data, offset)
        else:  # Windows; a segment has one writer at a time, so the file position is ours
            os.lseek(descriptor, offset, os.SEEK_SET)
            done = os.write(descriptor, data)
        data = data[done:]
        offset += done


def read_into(descriptor: int, data: bytearray) -> None:
    """Fill `data` from the start of the file."""
    import io

    target = memoryview(data)
    with io.FileIO(descriptor, "rb", closefd=False) as source:
        while target.nbytes:
            done = source.readinto(target)
            if not done:
                raise OSError(errno.ESTALE, "the segment is shorter than announced")
            target = target[done:]


def allocate(descriptor: int, size: int) -> None:
    """Allocate the pages of [0, size) now; `OSError` when there is no room."""
    if hasattr(os, "posix_fallocate") and sys.platform.startswith("linux"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    write_at(descriptor, memoryview(bytes(size)), 0)


def populate(mapping: mmap.mmap, nbytes: int) -> None:
    """Enter the first `nbytes` into the page table at once: a third of the cost of faulting them in one by one."""
    if sys.platform.startswith("linux"):
        try:
            mapping.madvise(MADV_POPULATE_READ, 0, nbytes)
        except OSError:
            pass  # before Linux 5.14: they come by page faults


def private_directory() -> str:
    """Make a 0700 directory for named segments, in memory (/dev/shm) where that exists."""
    import tempfile

    try:
        return tempfile.mkdtemp(prefix="distpool-", dir="/dev/shm")
    except OSError:
        return tempfile.mkdtemp(prefix="distpool-")


def discard_directory(directory: str) -> None:
    """Remove what `private_directory` made, with the named segments in it."""
    try:
        for name in os.listdir(directory):
            unlink(os.path.join(directory, name))
        os.rmdir(directory)
    except OSError:
        pass  # gone already; or, on Windows, still open


def unlink(path: str) -> None:
    """Remove a named file; whether somebody else was quicker, or it is open on Windows, does not matter."""
    try:
        os.unlink(path)
    except OSError:
        pass
