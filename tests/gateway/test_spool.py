"""The spool file: what is written survives, what is torn is not believed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farebox.app.ports.spool import Rider, SpoolFull
from farebox.gateway.spool import Spool, file_name, lock_path, try_lock
from farebox.gateway.spool_records import (
    MAGIC,
    AdmittedRecord,
    CountedRecord,
    DoneRecord,
    LeasesRecord,
    Record,
    StubRecord,
    decode,
    decode_rider,
    encode,
    encode_rider,
)

u64 = st.integers(0, 2**64 - 1)
lease_ids = st.lists(u64, max_size=5).map(tuple)
texts = st.text(max_size=40)
records: st.SearchStrategy[Record] = st.one_of(
    st.builds(
        AdmittedRecord,
        u64,
        u64,
        st.from_regex(r"req_[a-z0-9_]{1,40}", fullmatch=True),
        lease_ids,
        st.binary(max_size=80),
        st.booleans(),
    ),
    st.builds(
        DoneRecord,
        u64,
        st.integers(0, 999),
        u64,
        u64,
        st.booleans(),
        st.lists(st.tuples(u64, st.integers(-(2**63), 2**63 - 1)), max_size=3).map(tuple),
        st.none() | st.integers(-1_000_000, 1_000_000),
    ),
    st.builds(
        LeasesRecord, st.lists(st.tuples(u64, st.integers(-(2**63), 2**63 - 1)), max_size=5).map(tuple)
    ),
    st.builds(StubRecord, st.integers(0, 2**32 - 1), st.binary(max_size=80)),
    st.builds(CountedRecord, u64, st.integers(0, 2**32 - 1), lease_ids),
)
riders = st.builds(
    Rider,
    st.sampled_from(["account", "pass", "exact", "free"]),
    texts,
    texts,
    texts,
    texts,
    texts,
    texts,
    texts,
    st.booleans(),
    st.booleans(),
)

RIDER = Rider("account", "forecast", "api_calls", customer_id="acme")


@given(st.lists(records, max_size=8))
def test_what_is_encoded_is_decoded(written: list[Record]) -> None:
    data = b"".join(encode(r) for r in written)

    read = decode(data)

    assert [record for record, _ in read.records] == written
    assert (read.end, read.damaged) == (len(data), False)


@given(riders)
def test_a_rider_is_read_back_as_it_was(rider: Rider) -> None:
    assert decode_rider(encode_rider(rider)) == rider


@given(st.lists(records, min_size=1, max_size=4), st.data())
def test_a_torn_tail_gives_the_whole_records_before_it_and_no_more(
    written: list[Record], data: st.DataObject
) -> None:
    frames = [encode(r) for r in written]
    whole = b"".join(frames)
    cut = data.draw(st.integers(0, len(whole) - 1))

    read = decode(whole[:cut])

    ends = [sum(map(len, frames[: n + 1])) for n in range(len(frames))]
    assert len(read.records) == sum(end <= cut for end in ends)
    assert not read.damaged


@given(st.lists(records, min_size=1, max_size=3), st.data())
def test_a_changed_byte_is_never_read_as_something_else(written: list[Record], data: st.DataObject) -> None:
    frames = [encode(r) for r in written]
    whole = bytearray(b"".join(frames))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))

    read = decode(bytes(whole))

    found = [record for record, _ in read.records]
    assert found == written[: len(found)]
    assert len(found) < len(written)


@given(st.binary(max_size=300))
def test_noise_is_no_record(noise: bytes) -> None:
    decode(noise)


def test_zeros_after_a_power_cut_are_damage_and_not_records() -> None:
    good = encode(DoneRecord(1, 200, 0, 0, True))

    read = decode(good + bytes(4096))

    assert (len(read.records), read.end, read.damaged) == (1, len(good), True)


# ── the writer ───────────────────────────────────────────────────────────────────────────────────────────────────────


def contents(directory: Path, number: int, process_id: str = "gw_x") -> list[Record]:
    data = (directory / file_name(process_id, number)).read_bytes()
    assert data.startswith(MAGIC)
    read = decode(data, len(MAGIC))
    assert read.end == len(data)
    return [record for record, _ in read.records]


def test_a_new_file_begins_with_what_is_open_so_that_the_old_one_can_go(tmp_path: Path) -> None:
    leases = {7: 3}
    spool = Spool(tmp_path, "gw_x", file_bytes_max=400, leases=lambda: leases)
    stub = spool.stub(RIDER)
    first = spool.admitted("req_first", stub, (7,))
    number = 1
    while not (tmp_path / file_name("gw_x", 2)).exists():
        number += 1
        leases[7] += 1
        done = spool.admitted(f"req_{number}", stub, (7,))
        spool.done(done, 200, 1, 2, True)
    spool.done(first, 200, 1, 2, True)
    spool.close()

    beginning = contents(tmp_path, 2)
    assert beginning[0] == LeasesRecord(((7, leases[7]),))
    carried = [r for r in beginning if isinstance(r, AdmittedRecord)]
    assert [r.request_id for r in carried] == ["req_first", f"req_{number}"]
    assert all(r.carried for r in carried)
    assert [r.number for r in beginning if isinstance(r, DoneRecord)] == [done, first]


def test_the_lock_is_held_for_life_and_free_afterwards(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "gw_x")
    assert try_lock(lock_path(tmp_path, "gw_x")) is None

    spool.close()

    fd = try_lock(lock_path(tmp_path, "gw_x"))
    assert fd is not None
    os.close(fd)


def test_a_full_spool_refuses_calls_but_lets_those_under_way_end(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "gw_x", bytes_max=1000)
    stub = spool.stub(RIDER)
    numbers = [spool.admitted(f"req_{n}", stub, ()) for n in range(20)]
    spool.look_at_disk()

    with pytest.raises(SpoolFull):
        spool.admitted("req_late", stub, ())
    for number in numbers:
        spool.done(number, 200, 0, 0, True)
    for path in tmp_path.glob("*.spool"):
        path.unlink()
    spool.look_at_disk()
    assert spool.admitted("req_again", stub, ()) > 0
    spool.close()


def test_where_detail_is_dropped_the_calls_are_still_counted(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "gw_x", bytes_max=1000, on_full="drop_detail")
    stub, only_success = spool.stub(RIDER), spool.stub(Rider("account", "r", billed_when_orphaned=False))
    while not spool.counting:
        spool.admitted("req_full", stub, ())
        spool.look_at_disk()
    size = sum(p.stat().st_size for p in tmp_path.glob("*.spool"))

    for _ in range(10):
        spool.done(spool.admitted("req_without_detail", stub, (5,)), 200, 1, 1, True)
    with_detail = spool.admitted("req_success", only_success, ())
    spool.close()

    found = contents(tmp_path, 1)
    assert sum(isinstance(r, CountedRecord) and r.lease_ids == (5,) for r in found) == 10
    assert [r.stub for r in found if isinstance(r, StubRecord)] == [stub]
    assert with_detail > 0
    assert sum(p.stat().st_size for p in tmp_path.glob("*.spool")) - size < 10 * 40 + 200


def test_half_a_record_is_taken_back_when_the_disk_is_full(tmp_path: Path) -> None:
    """A real file size limit, in a process of its own: the kernel writes what fits and then refuses."""
    program = f"""
import resource, signal
from pathlib import Path
from farebox.app.ports.spool import Rider, SpoolFull
from farebox.gateway.spool import Spool
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
spool = Spool(Path({str(tmp_path)!r}), "gw_x")
stub = spool.stub(Rider("account", "forecast", "api_calls"))
first = spool.admitted("req_1", stub, ())
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
count = 1
try:
    while True:
        spool.admitted(f"req_{{count + 1}}", stub, ())
        count += 1
except SpoolFull:
    pass
spool.done(first, 200, 0, 0, True)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
spool.look_at_disk()
print(count)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    found = contents(tmp_path, 1)
    assert sum(isinstance(r, AdmittedRecord) for r in found) == int(said)
    assert [r.number for r in found if isinstance(r, DoneRecord)] == [1]


def test_a_full_disk_met_again_and_again_uses_up_no_descriptors(tmp_path: Path) -> None:
    """There is room for records and none for the beginning of the next file."""
    program = f"""
import os, resource, signal
from pathlib import Path
from farebox.app.ports.spool import Rider
from farebox.gateway.spool import Spool
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
leases = {{}}
spool = Spool(Path({str(tmp_path)!r}), "gw_x", file_bytes_max=200, leases=lambda: leases)
leases |= dict.fromkeys(range(1_000), 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
stub = spool.stub(Rider("account", "forecast", "api_calls"))
before = len(os.listdir("/proc/self/fd"))
for n in range(50):
    spool.admitted(f"req_{{n}}", stub, ())
print(before == len(os.listdir("/proc/self/fd")))
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert said.split() == ["True"]


@pytest.mark.parametrize("round_", range(3))
def test_what_a_killed_process_said_it_wrote_is_there(tmp_path: Path, round_: int) -> None:
    program = f"""
import os
from pathlib import Path
from farebox.app.ports.spool import Rider
from farebox.gateway.spool import Spool
spool = Spool(Path({str(tmp_path)!r}), "gw_x", file_bytes_max=20_000)
stub = spool.stub(Rider("account", "forecast", "api_calls"))
while True:
    number = spool.admitted("req_x", stub, ())
    spool.done(number, 200, 0, 0, True)
    os.write(1, b"%d\\n" % number)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(2000 + 700 * round_):
        last = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().split(b"\n")[:-1]  # what comes after the last line end may be cut
    process.wait()

    last = int(rest[-1]) if rest else last
    done: set[int] = set()
    for path in sorted(tmp_path.glob("*.spool")):
        done |= {
            r.number for r, _ in decode(path.read_bytes(), len(MAGIC)).records if isinstance(r, DoneRecord)
        }
    assert set(range(1, last + 1)) <= done
    assert max(done) <= last + 1
