"""One client: the order of what it gets, its overflow policy, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref

import pytest
from starlette.websockets import WebSocketDisconnect, WebSocketState

from starcast import (
    Broadcast,
    ClientGone,
    ConnectionManager,
    NotConnected,
    Overflowed,
    Tuning,
)
from support import Peer, joined, starcast_tasks, until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("road")]


def behind(peer: Peer) -> None:
    """From now on its sends suspend, like those of a client that does not read."""
    peer.open.clear()


async def a_few_turns() -> None:
    """Let every other task run until it waits for the client."""
    for _ in range(5):
        await asyncio.sleep(0)


def leave(hub: Broadcast, peer: Peer) -> None:
    """Unregister the client, and do not wait until everything is sent."""
    ConnectionManager(hub).disconnect(peer.websocket)


# Order


async def test_text_and_bytes_go_out_as_they_are():
    hub = Broadcast()
    peer = await joined(hub)
    await hub.send("text")
    await hub.send(b"bytes")
    await hub.send({"a": 1})
    assert peer.got == ["text", b"bytes", '{"a":1}']


async def test_messages_of_a_client_that_is_behind_keep_their_order():
    hub = Broadcast()
    peer = await joined(hub)
    behind(peer)
    for number in range(10):
        await hub.send(str(number))
    assert peer.stalled == 1  # one send in flight, the rest waits in the outbox
    assert hub.stats().buffered > 0
    peer.open.set()
    await until(lambda: len(peer.got) == 10)
    assert peer.got == [str(number) for number in range(10)]
    assert hub.stats().buffered == 0


async def test_the_handlers_own_send_arrives_after_what_was_awaited():
    hub = Broadcast()
    peer = await joined(hub)
    await hub.send("1")
    await peer.websocket.send_text("2")
    await hub.send("3")
    await peer.websocket.send_json(4)
    assert peer.got == ["1", "2", "3", "4"]


async def test_the_handlers_own_send_takes_its_turn_behind_the_outbox():
    hub = Broadcast()
    peer = await joined(hub)
    behind(peer)
    await hub.send("1")
    await hub.send("2")
    own = asyncio.create_task(peer.websocket.send_text("3"))
    await a_few_turns()
    await hub.send("4")
    assert not own.done()
    peer.open.set()
    await own
    await until(lambda: len(peer.got) == 4)
    assert peer.got == ["1", "2", "3", "4"]


async def test_the_handlers_own_send_stays_behind_publish_nowait():
    hub = Broadcast()
    peer = await joined(hub)
    hub.publish_nowait("default", "1")
    await peer.websocket.send_text("2")
    assert peer.got == ["1", "2"]


async def test_what_comes_during_the_handlers_send_follows_it():
    hub = Broadcast()
    peer = await joined(hub)
    behind(peer)
    own = asyncio.create_task(peer.websocket.send_text("1"))
    await until(lambda: peer.stalled)
    await hub.send("2")
    await hub.send("3")
    peer.open.set()
    await own
    await until(lambda: len(peer.got) == 3)
    assert peer.got == ["1", "2", "3"]


async def test_a_message_awaited_before_close_arrives_before_it():
    hub = Broadcast()
    peer = await joined(hub)
    behind(peer)
    await hub.send("bye")
    await hub.send("bye bye")
    closing = asyncio.create_task(peer.websocket.close(4000, "enough"))
    await a_few_turns()
    peer.open.set()
    await closing
    assert [m["type"] for m in peer.sent[1:]] == ["websocket.send"] * 2 + ["websocket.close"]
    assert peer.closed == 4000
    assert len(hub) == 0


async def test_a_personal_message_keeps_its_place():
    hub = Broadcast()
    one, two = await joined(hub), await joined(hub)
    behind(one)
    await hub.send("a")
    await hub.send("b", to=one.websocket)
    await hub.send("c")
    one.open.set()
    await until(lambda: len(one.got) == 3)
    assert one.got == ["a", "b", "c"]
    assert two.got == ["a", "c"]


async def test_a_cancelled_send_that_waits_for_its_turn_is_not_sent():
    hub = Broadcast()
    peer = await joined(hub)
    behind(peer)
    await hub.send("1")
    own = asyncio.create_task(peer.websocket.send_text("never"))
    await a_few_turns()
    await hub.send("2")
    own.cancel()
    with pytest.raises(asyncio.CancelledError):
        await own
    peer.open.set()
    await until(lambda: len(peer.got) == 2)
    await hub.send("3")
    assert peer.got == ["1", "2", "3"]


@pytest.mark.parametrize("steps", range(8))
async def test_a_send_cancelled_around_its_turn_lets_the_next_one_go_on(steps):
    hub = Broadcast()
    peer = await joined(hub)
    behind(peer)
    await hub.send("1")
    own = asyncio.create_task(peer.websocket.send_text("perhaps"))
    await a_few_turns()
    peer.open.set()
    for _ in range(steps):
        await asyncio.sleep(0)
    own.cancel()
    await asyncio.wait([own])
    await hub.send("2")
    await until(lambda: peer.got and peer.got[-1] == "2")
    sent = ["1", "perhaps", "2"]
    assert peer.got == sent or (own.cancelled() and peer.got == ["1", "2"])


async def test_a_send_that_is_in_flight_when_its_handler_is_cancelled_is_completed():
    hub = Broadcast()
    peer = await joined(hub)
    behind(peer)
    own = asyncio.create_task(peer.websocket.send_text("own"))
    await until(lambda: peer.stalled)
    await hub.send("1")
    own.cancel()
    with pytest.raises(asyncio.CancelledError):
        await own
    peer.open.set()
    await until(lambda: peer.got == ["own", "1"])


# Ready-made frames


@pytest.mark.parametrize("road", ["frames"], indirect=True)
async def test_a_burst_is_one_write():
    hub = Broadcast()
    one, two = await joined(hub), await joined(hub)
    for number in range(10):
        hub.publish_nowait("default", str(number))
    await hub.send("10")
    assert one.got == two.got == [str(number) for number in range(11)]
    assert one.wire.writes == two.wire.writes == [11]


@pytest.mark.parametrize("road", ["frames"], indirect=True)
async def test_a_backlog_is_joined_up_to_a_bound():
    hub = Broadcast()
    peer = await joined(hub)
    behind(peer)
    for number in range(6):
        await hub.send(f"{number}".ljust(30_000))
    peer.open.set()
    await until(lambda: len(peer.got) == 6)
    assert peer.wire.writes == [2, 2, 2]  # 64 KiB


@pytest.mark.parametrize("road", ["frames"], indirect=True)
async def test_a_client_with_a_small_buffer_gets_small_writes():
    hub = Broadcast()
    peer = await joined(hub, max_buffer=1000, overflow="drop_newest")
    for number in range(6):
        hub.publish_nowait("default", f"{number}".ljust(400))
    await hub.send("last".ljust(400))
    await until(lambda: not starcast_tasks())
    assert len(peer.got) == 7
    assert max(peer.wire.writes) <= 2


@pytest.mark.parametrize("road", ["frames"], indirect=True)
async def test_without_ready_frames_everything_goes_through_asgi():
    hub = Broadcast(ready_frames=False)
    peer = await joined(hub)
    await hub.send("hello")
    assert peer.got == ["hello"]
    assert peer.wire.writes == []


@pytest.mark.parametrize("road", ["frames"], indirect=True)
async def test_a_client_that_comes_back_gets_frames_again():
    hub = Broadcast()
    peer = await joined(hub, "old")
    await hub.disconnect(peer.websocket)
    await hub.connect(peer.websocket, "new")
    await hub.publish("new", "hello")
    assert peer.got == ["hello"]
    assert peer.wire.writes == [1]


@pytest.mark.parametrize("road", ["frames"], indirect=True)
async def test_two_hubs_on_one_websocket_do_not_both_write_frames():
    hubs = [Broadcast(), Broadcast()]
    peer = Peer()
    for number, hub in enumerate(hubs):
        await hub.connect(peer.websocket)
        await hub.send(f"hub {number}")
    assert peer.got == ["hub 0", "hub 1"]
    assert peer.wire.writes == [1]


@pytest.mark.parametrize("road", ["frames"], indirect=True)
async def test_a_server_that_can_not_open_the_way_is_spoken_to_in_asgi():
    hub = Broadcast()
    peer = Peer()
    peer.wire.open = lambda: None
    await hub.connect(peer.websocket)
    await hub.send("hello")
    assert peer.got == ["hello"]
    assert peer.wire.writes == []


@pytest.mark.parametrize("road", ["frames"], indirect=True)
@pytest.mark.parametrize("own", [False, True])
async def test_a_client_that_stays_stuck_is_aborted(own):
    hub = Broadcast(tuning=Tuning(close_timeout=0.05))
    peer = await joined(hub)
    behind(peer)
    if own:
        sending = asyncio.create_task(peer.websocket.send_text("1"))
        await until(lambda: peer.stalled)
    else:
        await hub.send("1")
    await hub.close(peer.websocket)
    assert peer.wire.aborted
    if own:
        with pytest.raises(WebSocketDisconnect):
            await sending


# Overflow

BIG = "x" * 1000


async def overflowed(overflow: str, **options) -> tuple[Broadcast, Peer, list[Overflowed]]:
    """A client with room for three messages that has been sent six, and then reads."""
    told: list[Overflowed] = []
    hub = Broadcast(on_overflow=told.append)
    peer = await joined(hub, max_buffer=3 * 1070, overflow=overflow, **options)
    behind(peer)
    for number in range(6):
        await hub.send(str(number) + BIG)
        assert hub.stats().buffered <= 3 * 1070
    return hub, peer, told


def numbers(peer: Peer) -> list[int]:
    return [int(message[0]) for message in peer.got]


@pytest.mark.parametrize(
    ("overflow", "left", "dropped"),
    [
        ("drop_oldest", [0, 3, 4, 5], [1, 2]),
        ("drop_newest", [0, 1, 2, 3], [4, 5]),
        ("latest", [0, 5], [1, 2, 3, 4]),
    ],
)
async def test_a_policy_that_drops(overflow, left, dropped):
    hub, peer, told = await overflowed(overflow)
    peer.open.set()
    await until(lambda: len(peer.got) == len(left))
    await hub.send("9")
    assert numbers(peer) == [*left, 9]
    assert [int(event.message[0]) for one in told for event in one.dropped] == dropped
    assert {one.client for one in told} == {peer.websocket}
    assert {one.overflow for one in told} == {overflow}
    assert hub.stats().dropped == len(dropped)
    assert hub.stats().slow_clients == 0


async def test_disconnect_closes_with_1013_and_leaves_the_hub_at_once():
    hub, peer, told = await overflowed("disconnect")
    assert len(hub) == 0
    assert not hub.channels
    assert hub.stats().slow_clients == 1
    assert [int(event.message[0]) for event in told[0].dropped] == [1, 2, 3, 4]
    peer.open.set()
    await until(lambda: peer.closed)
    assert numbers(peer) == [0]
    assert peer.closed == 1013


async def test_the_handlers_send_that_waits_when_the_client_is_cut_off_is_told():
    hub = Broadcast(max_buffer=200)
    peer = await joined(hub)
    behind(peer)
    await hub.send("1")
    own = asyncio.create_task(peer.websocket.send_text("2"))
    await a_few_turns()
    await hub.send(BIG)
    await hub.send(BIG)
    with pytest.raises(WebSocketDisconnect) as caught:
        await own
    assert caught.value.code == 1013
    peer.open.set()
    await until(lambda: peer.closed == 1013)


async def test_an_error_in_the_hook_is_logged_and_harms_nobody(caplog):
    def broken(overflowed: Overflowed) -> None:
        raise ValueError("in the hook")

    hub = Broadcast(on_overflow=broken, max_buffer=100)
    peer, other = await joined(hub), await joined(hub)
    behind(peer)
    await hub.send("1")
    await hub.send("2")
    await hub.send(BIG)
    assert other.got == ["1", "2", BIG]
    assert [record.getMessage() for record in caplog.records] == ["on_overflow raised"]
    caplog.clear()
    peer.open.set()
    await until(lambda: peer.closed == 1013)


# The end


@pytest.mark.parametrize("error", [OSError(), RuntimeError("gone"), WebSocketDisconnect(1006)])
async def test_any_error_from_the_socket_means_that_the_client_is_gone(error):
    hub = Broadcast()
    dead, alive = await joined(hub), await joined(hub)
    dead.fail = error
    await hub.send("hello")
    assert alive.got == ["hello"]
    assert len(hub) == 1
    with pytest.raises(WebSocketDisconnect) as caught:
        await dead.websocket.send_text("too late")
    assert caught.value.code == 1006


async def test_a_client_whose_handler_saw_it_leave_is_forgotten_at_the_next_message():
    hub = Broadcast()
    peer = await joined(hub)
    peer.leave()
    with pytest.raises(WebSocketDisconnect):
        await peer.websocket.receive_text()
    await hub.send("hello")
    assert len(hub) == 0
    assert peer.got == []


async def test_an_error_of_the_handlers_own_send_reaches_the_handler():
    hub = Broadcast()
    peer = await joined(hub)
    peer.fail = OSError()
    with pytest.raises(WebSocketDisconnect):
        await peer.websocket.send_text("hello")
    assert len(hub) == 0


async def test_a_mistake_of_the_handler_is_no_reason_to_drop_the_client():
    hub = Broadcast()
    peer = await joined(hub)
    with pytest.raises(RuntimeError):
        await peer.websocket.send({"type": "websocket.nonsense"})
    await hub.send("still here")
    assert peer.got == ["still here"]


async def test_closing_twice_is_harmless_and_sending_after_it_is_one_typed_error():
    hub = Broadcast()
    peer = await joined(hub)
    await hub.close(peer.websocket, 4001, "first")
    await hub.close(peer.websocket, 4002)
    await peer.websocket.close(4003)
    assert peer.closed == 4001
    with pytest.raises(WebSocketDisconnect) as caught:
        await peer.websocket.send_text("too late")
    assert caught.value.code == 4001
    with pytest.raises(ClientGone):
        await hub.send("nobody", to=peer.websocket)
    with pytest.raises(ClientGone):
        await hub.connect(peer.websocket)
    assert [m["type"] for m in peer.sent] == ["websocket.accept", "websocket.close"]


async def test_a_handler_that_receives_after_the_hub_closed_is_told_so():
    hub = Broadcast()
    peer = await joined(hub)
    await hub.close(peer.websocket, 4001)
    peer.leave(4001)  # what a server answers
    with pytest.raises(WebSocketDisconnect) as caught:
        await peer.websocket.receive_text()
    assert caught.value.code == 4001


async def test_the_handlers_own_close_ends_the_registration():
    hub = Broadcast()
    peer = await joined(hub)
    await peer.websocket.close()
    await peer.websocket.close()
    assert len(hub) == 0
    assert peer.closed == 1000
    with pytest.raises(WebSocketDisconnect):
        await peer.websocket.send_text("too late")


async def test_close_comes_after_what_the_client_still_has_to_get():
    hub = Broadcast()
    peer = await joined(hub)
    behind(peer)
    await hub.send("1")
    await hub.send("2")
    closing = asyncio.create_task(hub.close(peer.websocket, 4000))
    await until(lambda: len(hub) == 0)
    assert not closing.done()
    with pytest.raises(WebSocketDisconnect):
        await peer.websocket.send_text("too late")
    await peer.websocket.close()
    peer.open.set()
    await closing
    assert peer.got == ["1", "2"]
    assert peer.closed == 4000


async def test_a_close_that_gets_nowhere_is_given_up():
    hub = Broadcast(tuning=Tuning(close_timeout=0.05))
    peer, other = await joined(hub), await joined(hub)
    behind(peer)
    await hub.send("1")
    await hub.close(peer.websocket)
    assert peer.closed is None
    await until(lambda: peer.stalled == 0)
    await hub.send("2")
    assert other.got == ["1", "2"]
    await until(lambda: not starcast_tasks())


async def test_closing_a_client_whose_handler_saw_it_leave_sends_nothing():
    hub = Broadcast()
    peer = await joined(hub)
    peer.leave()
    with pytest.raises(WebSocketDisconnect):
        await peer.websocket.receive_text()
    await hub.close(peer.websocket)
    assert len(hub) == 0
    assert peer.closed is None


async def test_a_close_behind_a_send_of_the_handler_that_gets_nowhere_is_given_up():
    hub = Broadcast(tuning=Tuning(close_timeout=0.05))
    peer = await joined(hub)
    behind(peer)
    own = asyncio.create_task(peer.websocket.send_text("stuck"))
    await until(lambda: peer.stalled)
    await hub.close(peer.websocket)
    with pytest.raises(WebSocketDisconnect):  # the handler need not wait for TCP to give up
        await own


async def test_the_hubs_end_closes_every_client_in_order():
    hub = Broadcast()
    peers = [await joined(hub) for _ in range(3)]
    hub.publish_nowait("default", "last words")
    await hub.disconnect()
    assert [peer.got for peer in peers] == [["last words"]] * 3
    assert [peer.closed for peer in peers] == [1001] * 3


async def test_a_client_that_leaves_gets_what_was_published_before_and_keeps_its_socket():
    hub = Broadcast()
    peer = await joined(hub)
    behind(peer)
    await hub.send("1")
    await hub.send("2")
    leaving = asyncio.create_task(hub.disconnect(peer.websocket))
    await until(lambda: len(hub) == 0)
    await hub.send("3")
    own = asyncio.create_task(peer.websocket.send_text("own"))
    await a_few_turns()
    assert not leaving.done()
    peer.open.set()
    await leaving
    await own
    assert peer.got == ["1", "2", "own"]
    await peer.websocket.send_text("more")
    with pytest.raises(NotConnected):
        await hub.send("stranger", to=peer.websocket)
    await hub.connect(peer.websocket)
    await hub.send("back")
    assert peer.got == ["1", "2", "own", "more", "back"]


async def test_a_dead_client_that_leaves_takes_its_stuck_send_along():
    hub = Broadcast()
    peer = await joined(hub)
    behind(peer)
    await hub.send("1")
    peer.leave()
    with pytest.raises(WebSocketDisconnect):
        await peer.websocket.receive_text()
    await hub.disconnect(peer.websocket)
    await until(lambda: not starcast_tasks())
    assert peer.stalled == 0


async def test_a_cancelled_sender_ends_its_client_only():
    hub = Broadcast()
    peer, other = await joined(hub), await joined(hub)
    behind(peer)
    await hub.send("1")
    (runner,) = starcast_tasks()
    runner.cancel()
    await until(lambda: len(hub) == 1)
    await hub.send("2")
    assert other.got == ["1", "2"]


async def test_a_sender_that_is_killed_and_cancelled_at_once_ends():
    hub = Broadcast(tuning=Tuning(close_timeout=0.01))
    peer = await joined(hub)
    behind(peer)
    await hub.send("1")
    (runner,) = starcast_tasks()
    peer.websocket.client_state = WebSocketState.DISCONNECTED  # so that it is given up at once
    leave(hub, peer)
    runner.cancel()
    await asyncio.wait([runner])
    assert runner.cancelled()


# Two hubs on one websocket


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_a_websocket_on_two_hubs_may_leave_them_in_any_order(order):
    hubs = [Broadcast(), Broadcast()]
    peer = Peer()
    for hub in hubs:
        await hub.connect(peer.websocket)
    for number, hub in enumerate(hubs):
        await hub.send(f"hub {number}")
    await peer.websocket.send_text("own")
    for index in order:
        await hubs[index].disconnect(peer.websocket)
        await until(lambda: not any(hub.stats().pending for hub in hubs))
        await peer.websocket.send_text(f"left {index}")
    assert peer.got == ["hub 0", "hub 1", "own", *[f"left {index}" for index in order]]


async def test_changing_rooms_again_and_again_leaves_no_trace():
    hub = Broadcast()
    peer = await joined(hub, "room 0")
    for number in range(2000):
        leave(hub, peer)
        await hub.connect(peer.websocket, f"room {number}")
        await hub.publish(f"room {number}", "hello")
    assert peer.got == ["hello"] * 2000
    assert hub.channels == {"room 1999": 1}


async def test_changing_rooms_while_behind_keeps_the_order():
    hub = Broadcast()
    peer = await joined(hub, "old")
    behind(peer)
    await hub.publish("old", "1")
    await hub.publish("old", "2")
    leaving = asyncio.create_task(hub.disconnect(peer.websocket))
    await until(lambda: len(hub) == 0)
    await hub.connect(peer.websocket, "new")
    await hub.publish("old", "never")
    await hub.publish("new", "3")
    peer.open.set()
    await until(lambda: len(peer.got) == 3)
    assert peer.got == ["1", "2", "3"]
    assert len(hub) == 1
    await leaving


async def test_two_hubs_joined_and_left_in_turns_leave_no_trace():
    hubs = [Broadcast(), Broadcast()]
    peer = Peer()
    for number in range(2001):
        hub = hubs[number % 2]
        await hub.connect(peer.websocket)
        await hub.send("hello")
        await hubs[(number + 1) % 2].disconnect(peer.websocket)
    await hubs[0].disconnect(peer.websocket)
    assert peer.got == ["hello"] * 2001
    assert not {"send", "receive"} & set(vars(peer.websocket))


async def test_a_guard_of_somebody_elses_is_left_in_place():
    hub = Broadcast()
    peer = await joined(hub)
    sent = []
    send = peer.websocket.send

    async def watching(message):
        sent.append(message)
        await send(message)

    peer.websocket.send = watching
    await hub.disconnect(peer.websocket)
    await peer.websocket.send_text("hello")
    behind(peer)
    own = asyncio.create_task(peer.websocket.send_text("never"))
    await until(lambda: peer.stalled)
    own.cancel()
    await asyncio.wait([own])
    peer.open.set()
    assert peer.got == ["hello"]
    assert len(sent) == 2


async def test_leaving_a_client_that_reads_nothing_gives_the_socket_back():
    hub = Broadcast(tuning=Tuning(close_timeout=0.05))
    peer = await joined(hub)
    behind(peer)
    await hub.send("1")
    await hub.send("2")
    await hub.disconnect(peer.websocket)
    await until(lambda: not starcast_tasks())
    peer.open.set()
    await peer.websocket.send_text("own")
    assert peer.got == ["own"]


async def test_leaving_does_not_stop_a_send_that_the_handler_waits_for():
    hub = Broadcast(tuning=Tuning(close_timeout=0.05))
    peer = await joined(hub)
    behind(peer)
    own = asyncio.create_task(peer.websocket.send_text("own"))
    await until(lambda: peer.stalled)
    await hub.disconnect(peer.websocket)
    assert not own.done()
    peer.open.set()
    await own
    assert peer.got == ["own"]


async def test_coming_back_in_time_is_not_undone_by_the_end_of_leaving():
    hub = Broadcast(tuning=Tuning(close_timeout=0.02))
    peer = await joined(hub)
    behind(peer)
    await hub.send("1")
    leave(hub, peer)
    await a_few_turns()
    deadline = asyncio.get_running_loop().time() + 0.02
    await hub.connect(peer.websocket)
    await hub.send("2")
    await until(lambda: asyncio.get_running_loop().time() > deadline)
    await asyncio.sleep(0)
    peer.open.set()
    await until(lambda: peer.got == ["1", "2"])
    assert len(hub) == 1


async def test_leaving_coming_back_and_leaving_again_while_behind():
    hub = Broadcast()
    peer = await joined(hub)
    behind(peer)
    await hub.send("1")
    for number in range(2, 5):
        leave(hub, peer)
        await hub.connect(peer.websocket)
        await hub.send(str(number))
    leaving = asyncio.create_task(hub.disconnect(peer.websocket))
    await until(lambda: len(hub) == 0)
    peer.open.set()
    await leaving
    assert peer.got == ["1", "2", "3", "4"]
    with pytest.raises(NotConnected):
        await hub.send("stranger", to=peer.websocket)


async def test_a_client_killed_before_its_next_send_began_lets_nobody_wait():
    hub = Broadcast()
    peer = await joined(hub)
    behind(peer)
    one = asyncio.create_task(peer.websocket.send_text("1"))
    await until(lambda: peer.stalled)
    two = asyncio.create_task(peer.websocket.send_text("2"))
    await a_few_turns()
    peer.leave()
    peer.open.set()
    await asyncio.wait([one])
    with pytest.raises(WebSocketDisconnect):
        await peer.websocket.receive_text()
    await hub.disconnect(peer.websocket)
    await asyncio.wait([two], timeout=10)
    assert two.done()
    assert two.exception() is None or isinstance(two.exception(), WebSocketDisconnect)


@pytest.mark.parametrize("stalled", [False, True])
async def test_disconnect_comes_back_although_somebody_connects_again(stalled):
    hub = Broadcast(tuning=Tuning(close_timeout=0.05))
    peer = await joined(hub)
    if stalled:
        behind(peer)
        await hub.send("1")
    leaving = asyncio.create_task(hub.disconnect(peer.websocket))
    await until(lambda: len(hub) == 0)
    await hub.connect(peer.websocket)
    await asyncio.wait_for(leaving, 10)
    assert len(hub) == 1
    peer.open.set()
    await hub.send("2")
    await until(lambda: peer.got[-1:] == ["2"])


async def test_a_cancelled_send_with_nothing_behind_it_holds_up_nobody():
    hub = Broadcast(max_buffer=200)
    peer = await joined(hub)
    behind(peer)
    own = asyncio.create_task(peer.websocket.send_text("own"))
    await until(lambda: peer.stalled)
    own.cancel()
    await asyncio.wait([own])
    peer.open.set()
    await until(lambda: peer.got == ["own"])
    for number in range(10):
        await hub.send(str(number))
    assert len(peer.got) == 11


async def test_a_close_of_a_stranger_that_reads_nothing_is_given_up():
    peer = Peer()
    await peer.websocket.accept()
    behind(peer)
    await asyncio.wait_for(Broadcast(tuning=Tuning(close_timeout=0.05)).close(peer.websocket), 10)
    assert peer.closed is None


async def test_a_timeout_inside_send_is_not_taken_for_the_hubs():
    hub = Broadcast()
    peer = Peer()
    await peer.websocket.accept()

    async def send(message):
        raise TimeoutError("somebody's own")

    peer.websocket.send = send
    await hub.connect(peer.websocket)
    with pytest.raises(TimeoutError, match="somebody's own"):
        await peer.websocket.send_text("hello")


def test_a_handler_that_is_thrown_away_with_its_loop_leaves_no_task(caplog):
    async def main() -> None:
        hub = Broadcast()
        peer = await joined(hub)
        behind(peer)
        own = asyncio.ensure_future(peer.websocket.send_text("never"))
        await until(lambda: peer.stalled)
        await hub.send("1")
        assert not own.done()
        kept.append(own)

    kept: list[asyncio.Future] = []
    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.close()
    kept.clear()
    gc.collect()
    # asyncio says so itself, and nothing else is said.
    assert {record.getMessage().partition("\n")[0] for record in caplog.records} == {
        "Task was destroyed but it is pending!"
    }
    caplog.clear()


# Receiving


async def test_what_a_client_sent_before_it_left_is_read_although_sends_to_it_fail():
    hub = Broadcast()
    listener = await joined(hub)
    peer = Peer()
    for number in range(500):
        peer.say(str(number))
    peer.leave(4321)
    await hub.connect(peer.websocket)
    peer.fail = OSError()
    assert await hub.serve(peer.websocket) == 4321
    await until(lambda: len(listener.got) == 500)


async def test_a_handler_whose_client_died_is_told_in_the_usual_way():
    hub = Broadcast()
    peer = await joined(hub)
    peer.fail = OSError()
    await hub.send("hello")
    peer.say("last words")
    peer.leave(4321)
    assert await peer.websocket.receive_text() == "last words"
    with pytest.raises(WebSocketDisconnect) as caught:
        await peer.websocket.receive_text()
    assert caught.value.code == 4321


@pytest.mark.parametrize("receiving", [False, True])
async def test_a_server_that_says_nothing_about_a_dead_client_is_not_waited_for(
    monkeypatch, receiving
):
    hub = Broadcast(tuning=Tuning(close_timeout=0.05))
    peer = await joined(hub)
    peer.fail = OSError()
    if not receiving:
        await hub.send("hello")
    reading = asyncio.create_task(peer.websocket.receive_text())
    await asyncio.sleep(0)
    await hub.send("hello")
    with pytest.raises(WebSocketDisconnect) as caught:
        await reading
    assert caught.value.code == 1006


async def test_the_handler_of_a_client_that_is_cut_off_is_told():
    hub = Broadcast(max_buffer=100, tuning=Tuning(close_timeout=0.05))
    peer = await joined(hub)
    behind(peer)
    reading = asyncio.create_task(peer.websocket.receive_text())
    await hub.send("1")
    await hub.send("2")
    await hub.send(BIG)
    with pytest.raises(WebSocketDisconnect) as caught:
        await reading
    assert caught.value.code == 1013
    with pytest.raises(RuntimeError):  # as Starlette has it once a handler was told
        await peer.websocket.receive_text()


async def test_receive_ends_when_the_hub_gives_the_client_up():
    hub = Broadcast(max_buffer=100, tuning=Tuning(close_timeout=0.05))
    peer = await joined(hub)
    behind(peer)
    serving = asyncio.create_task(hub.serve(peer.websocket))
    await hub.send("1")
    await hub.send("2")
    await hub.send(BIG)
    assert await asyncio.wait_for(serving, 5) == 1013


async def test_a_receive_that_begins_while_a_close_waits_ends_with_it():
    hub = Broadcast()
    peer = await joined(hub)
    behind(peer)
    await hub.send("1")
    closing = asyncio.create_task(hub.close(peer.websocket, 4000))
    await until(lambda: len(hub) == 0)
    reading = asyncio.create_task(peer.websocket.receive_text())
    await asyncio.sleep(0)
    peer.open.set()
    with pytest.raises(WebSocketDisconnect) as caught:
        await reading
    assert caught.value.code == 4000
    await closing
    assert reading.cancelling() == 0


async def test_a_message_that_comes_when_the_client_is_given_up():
    class Late(Peer):
        async def receive(self):
            if self.websocket.client_state is not WebSocketState.CONNECTED:
                return await super().receive()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            return {"type": "websocket.receive", "text": "the last"}

    hub = Broadcast()
    peer = Late()
    await hub.connect(peer.websocket)
    reading = asyncio.create_task(peer.websocket.receive_text())
    await asyncio.sleep(0)
    await hub.close(peer.websocket)
    assert await reading == "the last"
    assert reading.cancelling() == 0


async def test_who_cancels_a_handler_is_not_taken_for_the_hub():
    hub = Broadcast()
    peer = await joined(hub)
    reading = asyncio.create_task(peer.websocket.receive_text())
    await asyncio.sleep(0)
    reading.cancel()
    peer.websocket.client_state = WebSocketState.DISCONNECTED  # so that it is given up at once
    leave(hub, peer)
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert reading.cancelling() == 1


async def test_a_timeout_inside_receive_is_not_taken_for_the_hubs():
    class Impatient(Peer):
        async def receive(self):
            if self.websocket.client_state is not WebSocketState.CONNECTED:
                return await super().receive()
            raise TimeoutError("somebody's middleware")

    hub = Broadcast()
    peer = Impatient()
    await hub.connect(peer.websocket)
    with pytest.raises(TimeoutError, match="somebody's"):
        await hub.serve(peer.websocket)


@pytest.mark.parametrize("how", ["disconnect", "close"])
async def test_nothing_keeps_a_client_alive_after_its_end(how):
    hub = Broadcast()
    peer = await joined(hub)
    await getattr(hub, how)(peer.websocket)
    await until(lambda: not hub.stats().pending)
    gone = weakref.ref(peer.websocket)
    del peer
    await asyncio.sleep(0)
    gc.collect()
    assert gone() is None
