from datetime import UTC, datetime

from fastapi import FastAPI
from pydantic import BaseModel, Field

from starcast import Broadcast

app = FastAPI()
hub = Broadcast("memory://")
app.mount("/live", hub)


class Order(BaseModel):
    placed_at: datetime = Field(serialization_alias="placedAt")
    items: set[str]


@app.post("/orders")
async def place() -> Order:
    order = Order(placed_at=datetime(2030, 1, 31, 12, tzinfo=UTC), items={"tea"})
    await hub.publish("orders", order)
    return order
    # Both are {"placedAt":"2030-01-31T12:00:00Z","items":["tea"]}


class User(BaseModel):
    name: str


class UserInDB(User):
    password_hash: str


@app.post("/users")
async def join() -> User:
    user = UserInDB(name="Ann", password_hash="$2b$12$...")
    await hub.publish("users", User.model_validate(user.model_dump()))
    return user  # filtered by "-> User"
