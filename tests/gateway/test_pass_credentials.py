"""However a pass is shown, it ends at the gateway; what else authorizes a call, and all other cookies, go on."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from farebox.app.pass_tokens import PassTokens
from farebox.app.ports.clock import WallClock
from farebox.domain.limits import PassLimits
from farebox.domain.passes import Pass
from tests.gateway.kit import House

_NOW = datetime.now(UTC)
TOKEN = PassTokens(b"t" * 32, "sandbox", WallClock()).sign(
    Pass("pas_1", "r", None, "", None, "active", PassLimits(5), _NOW, _NOW + timedelta(hours=1))
)
FOREIGN = "Bearer eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxIn0.c2ln"


@pytest.mark.parametrize("fare", ["pass", "free", "exact"])
@pytest.mark.parametrize(
    ("sent", "authorization", "cookie", "api_key"),
    [
        ({"Authorization": f"Bearer {TOKEN}"}, None, None, None),
        ({"Authorization": f"Bearer {TOKEN}", "X_Api_Key": "theirs"}, None, None, "theirs"),
        ({"Apicharge": TOKEN}, None, None, None),
        ({"Apicharge": TOKEN, "Authorization": FOREIGN}, FOREIGN, None, None),
        ({"Cookie": f"apicharge={TOKEN}"}, None, None, None),
        ({"Cookie": f"a=b; apicharge={TOKEN}; c=d", "Authorization": FOREIGN}, FOREIGN, "a=b; c=d", None),
        ({"Cookie": f"apicharge={TOKEN}", "Authorization": f"Bearer {TOKEN}"}, None, None, None),
        ({"Cookie": "a=b; apicharge=stale"}, None, "a=b", None),
    ],
)
async def test_a_pass_never_reaches_the_upstream(
    house: House, fare: str, sent: dict[str, str], authorization: str | None, cookie: str | None, api_key: str | None
) -> None:  # fmt: skip
    admitted = house.door.admitted
    house.door.decide = lambda call: admitted(call, fare=fare)
    headers: dict[str, Any] = {**sent, "X_Trace": "1"}

    assert (await house.get("/weather", **headers)).status == 200

    heard = house.upstream.heard[0]
    assert heard.one("Authorization") == authorization
    assert heard.one("Cookie") == cookie
    assert heard.one("X-Api-Key") == api_key
    assert heard.one("X-Trace") == "1"
    assert TOKEN not in str(heard.headers)
    assert heard.one("Apicharge") is None


async def test_cookies_of_a_call_by_key_go_on(house: House) -> None:
    await house.get("/weather", Cookie="session=1; theme=dark", X_Api_Key="fbx_ck_" + "a" * 32)

    heard = house.upstream.heard[0]
    assert heard.one("Cookie") == "session=1; theme=dark"
    assert heard.one("X-Api-Key") is None
