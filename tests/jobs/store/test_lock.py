"""The lock of the store: one process at a time, and free again however that one ends."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from chromarpc_server.jobs.store.lock import StoreLock
from chromarpc_server.jobs.store.unusable import StoreInUse, StoreUnusable

HOLD = """
import sys
from pathlib import Path
from chromarpc_server.jobs.store.lock import StoreLock
lock = StoreLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_one_holder_at_a_time_and_its_name_is_told(tmp_path: Path) -> None:
    first, second = StoreLock(tmp_path), StoreLock(tmp_path)
    first.acquire()
    first.acquire()  # it has it already
    with pytest.raises(StoreInUse, match=f"{tmp_path} is in use by another process: stop that one"):
        second.acquire()
    second.release()  # it has nothing to give back
    with pytest.raises(StoreInUse):
        second.acquire()
    first.release()
    second.acquire()
    second.release()
    assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600


def test_another_thread_may_give_it_back(tmp_path: Path) -> None:
    lock = StoreLock(tmp_path)
    thread = threading.Thread(target=lock.acquire)
    thread.start()
    thread.join()
    lock.release()
    StoreLock(tmp_path).acquire()


@pytest.mark.slow
def test_a_killed_process_leaves_it_free(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StoreInUse):
            StoreLock(tmp_path).acquire()
        holder.kill()
        holder.wait()
    lock = StoreLock(tmp_path)
    lock.acquire()
    lock.release()


def test_a_folder_that_takes_no_lock_is_named(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(StoreUnusable, match=f"{tmp_path} cannot be locked"):
        StoreLock(tmp_path).acquire()
