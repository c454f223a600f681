from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from fastapi.responses import HTMLResponse

from starcast import ConnectionManager

app = FastAPI()

html = """
<!doctype html>
<title>Chat</title>
<form><input autocomplete="off"> <button>Send</button></form>
<ul></ul>
<script>
  const socket = new WebSocket(`ws://${location.host}/ws/${Date.now()}`);
  socket.onmessage = (event) => {
    const line = document.createElement("li");
    line.textContent = event.data;
    document.querySelector("ul").append(line);
  };
  document.querySelector("form").onsubmit = (event) => {
    event.preventDefault();
    const input = document.querySelector("input");
    socket.send(input.value);
    input.value = "";
  };
</script>
"""

manager = ConnectionManager()


@app.get("/")
async def get():
    return HTMLResponse(html)


@app.websocket("/ws/{client_id}")
async def websocket_endpoint(websocket: WebSocket, client_id: int):
    await manager.connect(websocket)
    try:
        while True:
            data = await websocket.receive_text()
            await manager.send_personal_message(f"You wrote: {data}", websocket)
            await manager.broadcast(f"Client #{client_id} says: {data}")
    except WebSocketDisconnect:
        manager.disconnect(websocket)
        await manager.broadcast(f"Client #{client_id} left the chat")
