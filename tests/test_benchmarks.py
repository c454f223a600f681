"""The benchmarks: frames are counted right, and a short run gives everybody every message.

Nothing is said about how long anything takes.
"""

from __future__ import annotations

import json
import socket
import sys
import zlib

import pytest
from websockets.protocol import Protocol, Side

from benchmarks import payloads, plots, report
from benchmarks.frames import PING, FrameCounter, client_frame, server_frame
from benchmarks.load import percentile
from benchmarks.scenarios import SCENARIOS, TRIPS, Point
from benchmarks.servers import BROKERS, SERVERS

# Frames

SIZES = [0, 1, 125, 126, 65535, 65536]


def pieces(data, size):
    return [data[start : start + size] for start in range(0, len(data), size)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000, 1 << 20])
def test_messages_are_counted_however_they_arrive(size):
    contents = [
        bytes([65 + number]) * length for number, length in enumerate([0, 1, 125, 126, 300])
    ]
    counter = FrameCounter(keep=True)
    counts = [counter.feed(piece) for piece in pieces(b"".join(map(server_frame, contents)), size)]
    assert sum(counts) == counter.messages == len(contents)
    assert counter.payloads == contents
    assert not counter.partial


@pytest.mark.parametrize("size", SIZES)
def test_every_length(size):
    counter = FrameCounter(keep=True)
    data = server_frame(b"x" * size)
    assert counter.feed(data[:-1]) == 0
    assert counter.feed(data[-1:]) == 1
    assert counter.payloads == [b"x" * size]


def test_control_frames_are_not_messages():
    seen = []
    counter = FrameCounter(lambda opcode, payload: seen.append((opcode, payload)))
    data = server_frame(b"one") + server_frame(b"?", PING) + server_frame(b"two")
    assert sum(counter.feed(piece) for piece in pieces(data, 2)) == 2
    assert seen == [(PING, b"?")]
    assert counter.payloads is None


def test_fragments_are_one_message():
    counter = FrameCounter(keep=True)
    first, last = bytearray(server_frame(b"to")), bytearray(server_frame(b"gether"))
    first[0] &= 0x7F
    last[0] = 0x80
    assert counter.feed(first) == 0
    assert counter.feed(server_frame(b"", PING)) == 0
    assert counter.feed(last) == 1
    assert counter.payloads == [b"together"]


def test_deflated_messages_are_counted_and_inflated():
    deflater = zlib.compressobj(wbits=-15)
    counter = FrameCounter(keep=True)
    for _ in range(3):
        content = deflater.compress(b"again and again") + deflater.flush(zlib.Z_SYNC_FLUSH)
        frame = bytearray(server_frame(content[:-4]))
        frame[0] |= 0x40
        counter.feed(frame)
    counter.feed(server_frame(b"plain"))
    assert counter.payloads == [b"again and again"] * 3 + [b"plain"]
    assert (counter.messages, counter.compressed) == (4, 3)


def test_a_masked_frame_is_not_a_servers():
    with pytest.raises(ValueError, match="masked"):
        FrameCounter().feed(client_frame(b"x"))


@pytest.mark.parametrize("size", SIZES)
def test_client_frames_are_understood_by_websockets(size):
    protocol = Protocol(Side.SERVER)
    protocol.receive_data(client_frame(b"x" * size))
    (frame,) = protocol.events_received()
    assert (frame.opcode, bytes(frame.data)) == (1, b"x" * size)


# What is sent


@pytest.mark.parametrize("size", [1024, 16384])
def test_json_has_its_size_and_differs(size):
    contents = payloads.json_objects(size, 20)
    assert {len(content) for content in contents} == {size}
    assert len(set(contents)) == 20
    assert [json.loads(content)["number"] for content in contents] == list(range(20))


def test_text_has_its_size_and_differs():
    contents = payloads.text(128)
    assert {len(content) for content in contents} == {128}
    assert len(set(contents)) == len(contents)


# A run


def need_linux():
    if not sys.platform.startswith("linux"):
        pytest.skip("the benchmarks read Linux's /proc")


def run(name, **settings):
    """Start a server and the load, or skip if this environment or system has not got it."""
    need_linux()
    pytest.importorskip("uvloop")  # the floor runs on it, and not every platform has it
    from benchmarks.run import NoBroker, NotRun, measure

    point = Point("", "", SERVERS[name], {"path": SERVERS[name].path, **settings})
    try:
        return measure(point, 0.05, verify=True)
    except (NotRun, NoBroker) as exc:
        pytest.skip(f"{name}: {exc}")


# With `verify` the load fails unless every client got exactly what was sent, in order.


@pytest.mark.parametrize("name", ["starcast", "floor"])
def test_every_client_gets_every_message(name):
    result = run(name, clients=7, batch=5)
    assert result["clients"] == 7
    assert result["deliveries"] == result["rounds"] * 5 * 7 > 0
    assert result["bytes_per_delivery"] == len(server_frame(b"x" * 128))


def test_rooms():
    result = run("starcast", kind="rooms", clients=12, rooms=4, in_flight=2)
    # A room may be halfway when the clock starts.
    assert abs(result["deliveries"] - result["rounds"] * 3) < 2 * 3 < result["deliveries"]


@pytest.mark.parametrize("name", SCENARIOS["N"].servers)
def test_everybody_talks(name):
    result = run(name, kind="talks", clients=12, rooms=6)
    assert result["clients"] == 12
    assert result["deliveries"] > 12


@pytest.mark.parametrize("name", SCENARIOS["O"].servers)
def test_clients_connect(name):
    result = run(name, kind="storm", clients=70)
    assert result["clients"] == 70
    assert result["connections_per_second"] > 0


@pytest.mark.parametrize("name", SCENARIOS["P"].servers)
def test_clients_connect_all_at_once(name):
    result = run(name, kind="restart", clients=300, rooms=31)
    assert result["clients"] == 300
    assert result["messages"] > 0


def test_deflated():
    result = run("starcast", clients=5, deflate=True, payload="json", size=1024, pings=True)
    assert result["deflate_agreed"]
    assert 50 < result["bytes_per_delivery"] < 1024


@pytest.mark.parametrize("broker", BROKERS)
def test_two_workers_over_a_broker(broker):
    result = run("starcast", clients=6, batch=5, broker=broker, workers=2)
    assert result["deliveries"] == result["rounds"] * 5 * 6 > 0


@pytest.mark.parametrize("name", TRIPS)
def test_from_one_process_to_another(name):
    for broker in SERVERS[name].brokers:
        result = run(name, kind="trips", broker=broker)
        assert result["trips"] > 0
        assert 0 < result["trip_p50_us"] <= result["trip_p99_us"]


def test_no_broker_is_left_behind():
    need_linux()
    from benchmarks.run import NoBroker, broker

    for name in BROKERS:
        try:
            with broker(name) as url:
                port = int(url.rpartition(":")[2].partition("/")[0])
                socket.create_connection(("127.0.0.1", port), 5).close()
        except NoBroker as exc:
            pytest.skip(str(exc))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 5)


# The report


def results(**more):
    runs = [
        {"scenario": "A", "variant": "", "server": server, "repeat": repeat, "cpu_us": cpu}
        for server, cpus in {"starcast": (4, 6, 5), "floor": (4, 4, 10)}.items()
        for repeat, cpu in enumerate(cpus)
    ]
    runs.append(
        {"scenario": "C", "variant": "", "server": "floor", "repeat": 0, "failed": "no deflate"}
    )
    return {
        "date": "2025-01-02",
        "busy": 0.0,
        "minutes": 1,
        "seconds": 1,
        "repeats": 3,
        "spin": False,
        "pinned": True,
        "broker_alone": False,
        "machine": {"cpu": "A", "cores": 2, "kernel": "Linux 6", "python": "CPython 3"},
        "versions": {"floor": {"uvloop": "1"}},
        "not_run": {"picows_server": "No module named 'picows'"},
        "runs": runs,
        **more,
    }


def test_ratios_are_those_of_medians_with_the_spread_of_single_repeats():
    assert report.ratio(results(), report.GOALS[0]) == report.Figure(1.25, 0.5, 1.5)
    assert "| 1.10 | 1.25 | 0.50 - 1.50 | **no** |" in report.goals(results())


def test_nobody_is_left_out_of_the_report():
    summary = report.summary(results())
    assert "| picows (Cython) | not run |" in summary
    assert "- picows (Cython): No module named 'picows'" in summary
    assert "no deflate" in summary
    assert "5.00 (4.00 - 6.00)" in summary


def test_a_table_has_rows_only_for_brokers_that_a_server_can_use():
    runs = [
        {"scenario": "L", "variant": variant, "server": server, "repeat": 0, "trip_p50_us": 100.0}
        for variant, server in [("nats", "trip_nats"), ("redis", "trip_starcast")]
    ]
    summary = report.summary(results(runs=runs))
    assert "| nats | nats-py | 100 |" in summary
    assert "| redis | nats-py |" not in summary
    assert "a broker to the core of the load" in summary


def test_a_machine_with_few_cores_says_nothing_about_two_workers():
    runs = [
        {
            "scenario": "K",
            "variant": f"redis, {workers}",
            "server": "starcast",
            "repeat": 0,
            "cpu_us": 1.0,
            "deliveries_per_second": rate,
        }
        for workers, rate in (("1 worker", 1e6), ("2 workers", 2e6))
    ]
    few = results(runs=runs)
    many = results(runs=runs, machine={**few["machine"], "cores": 4})
    assert "deliveries a second, one worker over redis" not in report.goals(few)
    assert "one worker over redis / two | 0.63 | 0.50 |" in report.goals(many)
    assert "two workers over redis / one | 1.25 | 1.00 |" in report.goals(few)


def test_writing_keeps_the_rest_of_the_page(tmp_path):
    page = tmp_path / "docs" / "benchmarks.md"
    page.parent.mkdir()
    page.write_text(f"Before.\n\n{report.BEGIN}\nold\n{report.END}\nAfter.\n")
    for _ in range(2):
        report.write(results(runs=[], not_run={}), tmp_path / "results" / "x.json", page)
    text = page.read_text()
    assert text.startswith("Before.\n")
    assert text.endswith("After.\n")
    assert "old" not in text
    assert text.count("## Versions") == 1
    assert json.loads((tmp_path / "results" / "x.json").read_text()) == results(runs=[], not_run={})


def test_percentiles():
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile(list(range(1, 101)), 99) == 99
    assert percentile([5.0], 99) == 5.0


def test_goals_name_what_is_measured():
    for goal in report.GOALS:
        for scenario, server, variant in (goal.ours, goal.theirs):
            assert variant in SCENARIOS[scenario].variants
            assert SCENARIOS[scenario].takes(server, variant)


def test_each_server_of_a_picture_has_a_name_in_it():
    drawn = {name for key in "ABCDGH" for name in SCENARIOS[key].servers}
    assert drawn <= set(plots.NAMES)
