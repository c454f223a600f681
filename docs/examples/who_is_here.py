from fastapi import FastAPI

from starcast import Broadcast, BroadcastEndpoint, Member

hub = Broadcast()
app = FastAPI(lifespan=hub.lifespan)


@app.websocket("/ws/{channel}")
class Chat(BroadcastEndpoint):
    broadcast = hub
    join_leave = True

    def get_member(self, websocket):
        # Take the user from a session or a token, never from what a client may choose.
        user = websocket.query_params.get("user", "guest")
        return Member(user, info={"name": user.title()})


@app.get("/rooms/{channel}")
async def who(channel: str):
    return [{"id": member.id, **member.info} for member in await hub.members(channel)]


@app.get("/rooms/{channel}/count")
async def how_many(channel: str):
    counts = await hub.member_counts([channel])
    return {"clients": counts[channel].clients, "users": counts[channel].users}
