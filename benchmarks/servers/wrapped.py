"""A middleware that wraps `send`, as those of tracing libraries do."""


class Wrapped:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def wrapped_send(message):
            await send(message)

        await self.app(scope, receive, wrapped_send)
