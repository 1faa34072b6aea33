"""A file system that answers nobody: after FUSE's handshake, requests are taken and left unanswered.

What waits for such an answer waits in the kernel, where no signal ends it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

_LOOKUP, _GETATTR, _INIT, _STATX = 1, 3, 26, 52
_ROOT = 1
_FILES = {b"adapter_config.json": 2, b"adapter_model.safetensors": 3}
_ATTR = struct.Struct("<6Q10I")
_HEADER = struct.Struct("<IIQQIIII")
_OUT_HEADER = struct.Struct("<IiQ")
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


def may_mount() -> bool:
    """Whether this user may mount FUSE here."""
    return os.geteuid() == 0 and os.access("/dev/fuse", os.R_OK | os.W_OK)


@contextlib.contextmanager
def silent_mount(folder: Path, *, shows_files: bool = False) -> Iterator[None]:
    """Mount it on an empty directory. At the end whatever waits for it gets an error and goes on.

    Args:
        shows_files: whether stat sees an adapter's two files, which cannot be opened; else even stat waits.
    """
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    if _libc.mount(b"silent", os.fsencode(folder), b"fuse", 0, options):
        number = ctypes.get_errno()
        os.close(device)
        raise OSError(number, "mount", str(folder))
    is_over = threading.Event()
    thread = threading.Thread(target=_read_requests, args=(device, is_over, shows_files), daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        _libc.umount2(os.fsencode(folder), _MNT_DETACH)
        # Ends the connection, so that every request that waits fails.
        os.close(device)


def _read_requests(device: int, is_over: threading.Event, shows_files: bool) -> None:
    while not is_over.is_set():
        if not select.select([device], [], [], 0.1)[0]:
            continue
        request = os.read(device, 1 << 20)
        _, opcode, unique, node, *_ = _HEADER.unpack_from(request)
        body, error = b"", 0
        if opcode == _INIT:
            body = struct.pack("<IIIIHHII", 7, 19, 65536, 0, 12, 9, 65536, 0)
        elif shows_files and opcode == _GETATTR:
            body = struct.pack("<QII", 0, 0, 0) + _attributes(node)
        elif shows_files and opcode == _LOOKUP:
            found = _FILES.get(request[_HEADER.size :].rstrip(b"\0"), 0)
            body = struct.pack("<4Q2I", found, 0, 0, 0, 0, 0) + _attributes(found) if found else b""
            error = 0 if found else -errno.ENOENT
        elif shows_files and opcode == _STATX:
            error = -errno.ENOSYS
        else:
            continue
        os.write(device, _OUT_HEADER.pack(_OUT_HEADER.size + len(body), error, unique) + body)


def _attributes(node: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if node == _ROOT else stat.S_IFREG | 0o644
    return _ATTR.pack(node, 1000, 8, 1, 1, 1, 0, 0, 0, mode, 1, 0, 0, 0, 512, 0)
