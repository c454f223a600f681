import logging

from anyio import from_thread
from fastapi import BackgroundTasks, FastAPI, Request, WebSocket, WebSocketException
from fastapi.exceptions import WebSocketRequestValidationError
from fastapi.responses import JSONResponse

from starcast import BackendUnavailable, Broadcast, BroadcastEndpoint, StarcastError

logger = logging.getLogger("news")
news = Broadcast("memory://")
app = FastAPI(lifespan=news.lifespan)


@app.post("/news/{channel}")
async def publish_news(channel: str, headline: str):
    await news.publish(channel, headline)  # 503 if the broker is away, 422 if the name is not valid


@app.post("/plain/{channel}")
def publish_from_a_plain_route(channel: str, headline: str):
    from_thread.run(news.publish, channel, headline)  # the same answers, from a thread


async def announce(headline: str):
    try:
        await news.publish("all", headline)
    except StarcastError as exc:  # the response has been sent already
        logger.warning("not announced: %s", exc)


@app.post("/later")
async def publish_later(headline: str, tasks: BackgroundTasks):
    tasks.add_task(announce, headline)


api = FastAPI()


@api.post("/news")
async def publish_with_an_answer_of_ones_own():
    await news.publish("all", "hello")


@api.websocket("/ws")
async def publish_with_a_close_of_ones_own(websocket: WebSocket):
    await websocket.accept()
    await news.publish("all", "hello")


@api.exception_handler(BackendUnavailable)
async def not_published(request: Request | WebSocket, exc: BackendUnavailable):
    if isinstance(request, WebSocket):
        await request.close(exc.code, exc.reason)
        return None
    return JSONResponse({"published": False}, exc.status_code, {"Retry-After": "10"})


app.mount("/api", api)


@app.exception_handler(WebSocketRequestValidationError)
@app.exception_handler(WebSocketException)
async def refused(websocket: WebSocket, exc: Exception):
    code, reason = 1008, "parameters are not valid"
    if isinstance(exc, WebSocketException):
        code, reason = exc.code, exc.reason
    logger.warning("refused %s: %s", websocket.scope["path"], reason)
    await websocket.close(code, reason)


@app.websocket("/rooms")
async def room(websocket: WebSocket, number: int):
    raise WebSocketException(1008, "no such room")


@app.websocket("/chat/{channel}")
class Chat(BroadcastEndpoint):
    broadcast = news

    async def on_publish_error(self, websocket, data, exc):
        await websocket.send_text(f"Not sent: {data}")
