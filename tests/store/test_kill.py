"""A process killed by kill -9 loses nothing that was journaled or acknowledged."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

from composer.store import Recorder, Store

CHILD = """
import asyncio, sys
from pathlib import Path
from composer.store import Feedback, Recorder, Store
from composer.store.failures import DatabaseAway
from tests.store.records import make_record

class Away(Store):
    async def _run(self, work, what, *, writes=False):
        raise DatabaseAway("switched off")

async def main():
    store = Away(sys.argv[1])
    recorder = Recorder(store, Path(sys.argv[2]))
    await recorder.start()
    for i in range(1_000_000):
        recorder.put(make_record(f"r{i:06d}"))
        if i % 50 == 49:
            await recorder.flush()
            receipt = await recorder.add_feedback(Feedback.checked(f"r{i:06d}", 1, id="f"))
            assert receipt.stored == "journal"
            print(i, flush=True)  # everything up to here is acknowledged

asyncio.run(main())
"""


async def test_what_was_journaled_before_kill_9_is_replayed_by_the_next_process(
    sqlite_url: str, tmp_path: Path
) -> None:
    folder = tmp_path / "journal"

    def run_and_kill() -> int:
        command = [sys.executable, "-c", CHILD, sqlite_url, str(folder)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) >= 500:
                child.send_signal(signal.SIGKILL)  # wherever it now is
                break
        last = [int(line), *(int(line) for line in child.stdout.read().split())][-1]
        assert child.wait() == -signal.SIGKILL
        child.stdout.close()
        return last

    acknowledged = [await asyncio.to_thread(run_and_kill) for _ in range(2)]
    store = Store(sqlite_url)
    await store.start()
    recorder = Recorder(store, folder)
    await recorder.start()
    async with asyncio.timeout(60):
        while recorder.stats()["journal_bytes"]:
            await asyncio.sleep(0.02)
    found = {record.id async for record in store.iter_requests()}
    for i in range(max(acknowledged) + 1):
        assert f"r{i:06d}" in found
    for i in range(49, max(acknowledged) + 1, 50):
        assert len(await store.feedback_for(f"r{i:06d}")) == 1
    assert recorder.stats()["rejected"] == 0
    await recorder.close()
    await store.close()
