import pytest
from own_backend import InProcess

import starcast.testing


@pytest.mark.anyio
@pytest.mark.parametrize("check", starcast.testing.CHECKS, ids=lambda check: check.__name__)
async def test_my_backend(check):
    await check(InProcess)
