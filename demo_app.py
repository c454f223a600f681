"""The starcast demo: `uvicorn demo_app:app`, then three tabs of http://127.0.0.1:8000/?room=tea."""

import asyncio
import contextlib
import math
import os
import secrets
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, WebSocket, WebSocketDisconnect, WebSocketException
from starlette.applications import Starlette
from starlette.responses import HTMLResponse
from starlette.routing import Mount, Route, WebSocketRoute

from starcast import BackendUnavailable, Broadcast, BroadcastEndpoint, StarcastError

MAX_NAME, MAX_TEXT = 24, 500  # characters; the page has the same limits
hub = Broadcast(os.environ.get("STARCAST_URL", "memory://"), after_gap="close")


class Chat(BroadcastEndpoint):
    """The chat, as a Starlette endpoint. There is one instance for each client."""

    broadcast = hub
    encoding = "json"

    def get_channel(self, websocket: WebSocket) -> str:
        return "room:" + (websocket.query_params.get("room") or "lobby")

    async def on_connect(self, websocket: WebSocket) -> None:
        self.id = secrets.token_hex(8)
        await super().on_connect(websocket)
        await hub.send({"type": "welcome", "id": self.id}, to=websocket)
        await self.say_who_is_here(websocket)

    async def on_receive(self, websocket: WebSocket, data: Any) -> None:
        channel = self.get_channel(websocket)
        match data:
            case {"type": "message", "author": str(author), "text": str(text)} if (
                0 < len(author) <= MAX_NAME and 0 < len(text) <= MAX_TEXT
            ):
                message = {"type": "message", "id": self.id, "author": author, "text": text}
                try:
                    await hub.publish(channel, message | {"time": datetime.now(UTC)})
                except BackendUnavailable:
                    await hub.send({"type": "unsent", "text": text}, to=websocket)
            case {"type": "typing", "author": str(author)} if 0 < len(author) <= MAX_NAME:
                typing = {"type": "typing", "id": self.id, "author": author}
                hub.publish_nowait(channel, typing, exclude=websocket)
            case _:
                raise WebSocketException(1008, "not a message of this chat")

    async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
        await super().on_disconnect(websocket, close_code)
        await self.say_who_is_here(websocket)

    async def say_who_is_here(self, websocket: WebSocket) -> None:
        channel = self.get_channel(websocket)
        if hub.stats().backend is None:  # of other workers' clients this one knows nothing
            await hub.publish(channel, {"type": "here", "count": hub.channels.get(channel, 0)})


live = FastAPI()
TICKER = f"ticker:{secrets.token_hex(4)}"  # each worker has its own, with the same numbers


def values(count: int) -> list[float]:
    """The newest of numbers that wander. The clock makes them, so that all workers agree."""
    now, periods = round(time.time() * 4), (3, 8, 21, 55, 144)
    waves = [sum(math.sin((now - n) / period) for period in periods) for n in range(count)]
    return [round(100 + wave, 2) for wave in reversed(waves)]


@live.websocket("/ticker")
async def ticker(websocket: WebSocket, hub: Annotated[Broadcast, Depends(lambda: hub)]) -> None:
    """The ticker, as a FastAPI function. Clients only listen, and one that is slow skips ticks."""
    with contextlib.suppress(WebSocketDisconnect):  # it has left already
        await hub.connect(websocket, TICKER, overflow="latest")
        await hub.send({"values": values(120)}, to=websocket)
        await hub.serve(websocket, TICKER, publish=False)


async def tick() -> None:
    """Publish a number four times a second, through the same hub as the chat."""
    while True:
        await asyncio.sleep(0.25 - time.time() % 0.25)
        with contextlib.suppress(StarcastError):  # the next one comes soon
            await hub.publish(TICKER, {"values": values(1), "delivered": hub.stats().delivered})


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    async with hub, asyncio.TaskGroup() as tasks:
        task = tasks.create_task(tick(), name="ticker")
        yield
        task.cancel()


PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>starcast</title>
<meta name="viewport" content="width=device-width, initial-scale=1, viewport-fit=cover">
<link rel="icon" href="data:,"><style>
:root { color-scheme: light dark; --paper: light-dark(#faf8f4, #131418);
  --card: light-dark(#fff, #1d1f24); --line: light-dark(#e6e1d8, #2d2f36);
  --ink: light-dark(#22211f, #e9e7e2); --soft: light-dark(#6c6860, #9d9a93);
  --star: light-dark(#b84a28, #f0906c); --serif: ui-serif, Charter, Georgia, serif }
* { box-sizing: border-box; margin: 0; font: inherit; color: inherit }
:focus-visible { outline: 2px solid var(--star); outline-offset: 2px }
body { display: grid; grid: 100% / 17rem minmax(0, 44rem); gap: 4rem; justify-content: center;
  height: 100dvh; padding: 0 max(1rem, env(safe-area-inset-right)) env(safe-area-inset-bottom)
  max(1rem, env(safe-area-inset-left)); background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif }
aside { display: flex; flex-direction: column; gap: 2.5rem; padding-top: 3rem }
h1 { font: 500 2.75rem/1.2 var(--serif); letter-spacing: -.02em; overflow-wrap: anywhere }
.brand, a { color: var(--star); font-weight: 600 } .soft { color: var(--soft); font-size: .8125rem }
#status::before { content: "\25cf"; margin-right: .5em; color: light-dark(#2e8b57, #5fc48d) }
#status.off::before { color: light-dark(#c98a10, #e9b44c) } #ticker.off { opacity: .4 }
#value { font: 500 2rem/1.3 var(--serif); font-variant-numeric: tabular-nums }
svg { display: block; width: 100%; height: 4rem; margin: .75rem 0; overflow: visible }
path { fill: none; stroke: var(--star); stroke-width: 1.75; vector-effect: non-scaling-stroke }
main { display: flex; flex-direction: column; min-height: 0 } .more header { display: none }
#log { flex: 1; overflow: hidden auto; padding: 2.5rem .25rem 1rem }
#empty { max-width: 24rem; margin: 20vh auto 0; text-align: center; color: var(--soft) }
#empty b { display: block; font: 500 1.5rem/2 var(--serif); color: var(--ink) }
article { max-width: 85%; width: fit-content; margin-top: 1.25rem } .more { margin-top: .25rem }
.rule { margin: 1.5rem 0; text-align: center } .mine, .mine p { margin-left: auto }
header { display: flex; gap: .6rem; align-items: baseline; padding: 0 .25rem .25rem }
bdi { font-size: .875rem; font-weight: 600; overflow: hidden; text-overflow: ellipsis;
  color: light-dark(oklch(.48 .12 var(--hue)), oklch(.8 .1 var(--hue))) }
form, article p { border: 1px solid var(--line); border-radius: 1.75rem; background: var(--card) }
article p { padding: .55rem .95rem; border-radius: 1.1rem; width: fit-content;
  white-space: pre-wrap; overflow-wrap: anywhere } .mine header { justify-content: end }
.mine p { background: light-dark(#2b3a52, #33496b); border-color: transparent; color: #fff }
.row { display: flex; justify-content: space-between; align-items: end; gap: 1rem; padding: .5rem }
form:focus-within { border-color: var(--star) } #name { border-bottom: 1px dashed; max-width: 50vw }
label { flex: none } #typing { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
input { border: 0; background: none; min-width: 3rem; field-sizing: content; color: var(--ink) }
#text { flex: 1; padding: .5rem .8rem; outline: 0 } form { margin-bottom: 1.5rem }
button { padding: .5rem 1.2rem; border: 0; border-radius: 1.25rem; background: var(--star);
  color: var(--paper); font-weight: 600; cursor: pointer } button:disabled { opacity: .4 }
@media (max-width: 56rem) { #facts, #ticker p:first-child { display: none }
  body { grid: auto minmax(0, 1fr) / minmax(0, 44rem); gap: 0 } #ticker { text-align: right }
  aside { flex-direction: row; gap: 1rem; padding: 1rem 0 .75rem; align-items: end;
    justify-content: space-between; border-bottom: 1px solid var(--line) }
  h1, #value { font-size: 1.5rem } svg { height: 1.5rem; width: 7rem; margin: .25rem 0 }
  form { margin-bottom: .75rem } input { font-size: 1rem } }
</style>
<aside><div><p class="brand">&#10022; starcast</p><h1 id="room"></h1>
  <p class="soft off" id="status" role="status">Connecting</p></div>
  <section id="ticker" class="off" aria-label="Live ticker"><p class="soft">A number, live</p>
  <p id="value">&ndash;</p><svg viewBox="0 0 1 1" preserveAspectRatio="none"><path id="spark"/>
  </svg><p class="soft" id="facts">Four ticks a second</p></section></aside>
<main><div id="log" role="log" aria-live="polite" aria-label="Messages" tabindex="0"><p id="empty">
  <b>It is quiet here</b> <a href="" target="_blank">Open this page in another tab</a>
  and say hello. Every tab in this room sees every message.</p></div>
  <p class="row soft"><span id="typing"></span><label>You are <input id="name" maxlength="24"
  autocomplete="nickname" spellcheck="false"></label></p><form id="form" class="row">
  <input id="text" maxlength="500" aria-label="Message" placeholder="Write a message"
  autocomplete="off" enterkeyhint="send"><button id="send" disabled>Send</button></form></main>
<script type="module">
const $ = id => document.getElementById(id), log = $("log"), walk = []
const parse = data => { try { return JSON.parse(data) } catch { /* no message for this page */ } }
const str = (value, max) => typeof value === "string" ? value.slice(0, max) : ""
const pick = (...words) => words[Math.floor(Math.random() * words.length)]
const el = (tag, className, textContent) =>  // what people type never becomes HTML
  Object.assign(document.createElement(tag), { className, textContent })
const toBottom = () => stick && log.scrollTo(0, log.scrollHeight)
const say = (type, text) => send({ type, author: tab.chatName, text })
let me, stick = true, lost = false, told = 0, timer, still, last = {}, tab = {}, kept = {}
try { tab = sessionStorage, kept = localStorage } catch { /* storage is switched off */ }
$("name").value = tab.chatName ??= kept.chatName  // each new tab has its own until you choose one
  ?? pick("Quiet", "Sunny", "Swift", "Kind", "Bright") + " " + pick("Otter", "Wren", "Fox", "Hare")
$("name").onchange = ({ target }) =>
  target.value = tab.chatName = kept.chatName = target.value.trim() || tab.chatName
const asked = (new URLSearchParams(location.search).get("room") ?? "").replace(/\p{Cc}/gu, "")
const room = $("room").textContent = [...asked.trim()].slice(0, 40).join("") || "lobby"
document.title = `${room} · starcast`
function keepOpen(path, onState, onData, tries = 0) {  // returns a function that sends, if it can
  let socket; const open = () => {
    socket = new WebSocket(new URL(path, location.href).href.replace("http", "ws"))
    socket.onopen = () => onState(0)
    socket.onmessage = ({ data }) => { tries = 0, onData(parse(data) ?? {}) }
    socket.onclose = () => {
      const wait = Math.min(10, 2 ** tries++ / 2) * (0.5 + Math.random())  // seconds, with jitter
      setTimeout(open, wait * 1000), onState(wait)
    }
  }
  return open(), data => socket.readyState === 1 && (socket.send(JSON.stringify(data)), true)
}
const beat = off => (clearTimeout(still), still = setTimeout(beat, 3000, true),  // no tick: no news
  $("ticker").classList.toggle("off", off))
keepOpen("live/ticker", beat, data => {
  walk.push(...[data.values].flat().filter(Number.isFinite)), walk.splice(0, walk.length - 120)
  const low = Math.min(...walk), high = Math.max(...walk), point = (value, i) =>
    `${i / Math.max(1, walk.length - 1)} ${(high - value) / (high - low || 1)}`
  $("spark").setAttribute("d", "M" + walk.map(point).join("L"))
  beat(false), $("value").textContent = walk.at(-1).toFixed(2)
  if (data.delivered > 0) $("facts").textContent = `${data.delivered} deliveries by this process`
})
const heard = author => (clearTimeout(timer), timer = setTimeout(heard, 3000),  // nobody, then
  $("typing").textContent = author ? `${author} is typing` : "")
function append(node) {
  if (log.children.length > 200) log.children[1].remove()  // the first one is #empty
  $("empty").hidden = true, log.append(node), toBottom()
}
const rule = text => append(el("p", "rule soft", text))
function show(id, author, text, time) {
  const at = new Date(Date.parse(time) || Date.now()), mine = id === me
  const day = at.toLocaleDateString([], { weekday: "long", day: "numeric", month: "long" })
  if (day !== last.day) rule(day)
  const more = day === last.day && id === last.id && author === last.author && at - last.at < 3e5
  const article = el("article", `${mine ? "mine" : ""} ${more ? "more" : ""}`, "")
  const header = el("header", "soft", ""), name = el("bdi", "", mine ? "You" : author)
  name.style.setProperty("--hue", [...author].reduce((h, c) => h * 7 % 360 + c.codePointAt(), 0))
  header.append(name, el("time", "", at.toLocaleTimeString([], { timeStyle: "short" })))
  article.append(header, Object.assign(el("p", "", text), { dir: "auto" }))
  append(article), last = { day, id, author, at }
}
const send = keepOpen(`ws?room=${encodeURIComponent(room)}`, wait => {
  $("status").classList.toggle("off", $("send").disabled = wait > 0)
  $("status").textContent = wait ? `No connection. Next try in ${Math.ceil(wait)} s` : "Connected"
  lost = wait > 0 || void (lost && rule("Connected again. You may have missed messages."))
}, ({ type, id, author, text, time, count }) => {
  [id, author, text] = [str(id, 40), str(author, 24) || "Somebody", str(text, 500)]
  if (type === "welcome") me = id
  if (type === "here" && count > 0) $("status").textContent = `${count} here`
  if (type === "typing") heard(author)
  if (type === "unsent") rule(`Perhaps not sent: ${text}`), $("text").value ||= text
  if (type === "message" && text) heard(), show(id, author, text, time)
})
log.onscroll = () => stick = log.scrollHeight - log.scrollTop - log.clientHeight < 40
new ResizeObserver(toBottom).observe(log)
$("text").oninput = () => { if (Date.now() - told > 2000 && say("typing")) told = Date.now() }
$("form").onsubmit = event => {
  event.preventDefault()
  const text = $("text").value.trim()
  if (text && say("message", text)) $("text").value = "", told = 0, stick = true
}
</script>
"""

routes = [Route("/", lambda _: HTMLResponse(PAGE)), WebSocketRoute("/ws", Chat)]
app = Starlette(routes=[*routes, Mount("/live", live)], lifespan=lifespan)

if __name__ == "__main__":  # python demo_app.py: the same, with ready-made frames
    uvicorn.run(app, ws="starcast.uvicorn:BroadcastProtocol")
