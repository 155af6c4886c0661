"""Accounts, devices, consents, erasure, blocks, appeals."""

from fastapi import APIRouter, Request, Response

from elmwood.hub.actions import members
from elmwood.hub.api.asked import Here, Recent, Whose, network
from elmwood.hub.messages import AccountReply, Appeal, Consent, Done, Id, Key, NewAccount, NewDevice, Reason

router = APIRouter(tags=["members"])


@router.post("/v1/accounts", status_code=201, response_model=AccountReply, dependencies=[Recent])
async def register(request: Request, whose: Whose, message: NewAccount) -> Response:
    """A new account, with the key that signs as its first device."""
    request.app.state.limits.check(network(request), "accounts_per_hour")
    return await whose.act(lambda c, caller: members.register(c, caller, message, whose.hub.moment()), 201, new=True)


@router.post("/v1/devices", status_code=201, response_model=AccountReply, dependencies=[Recent])
async def add_device(request: Request, whose: Whose, message: NewDevice) -> Response:
    """A further device of an account, by its recovery code."""
    request.app.state.limits.check(network(request), "accounts_per_hour")
    return await whose.act(lambda c, caller: members.add_device(c, caller, message, whose.hub.moment()), 201, new=True)


@router.post("/v1/consents", response_model=Done)
async def agree(whose: Whose, message: Consent) -> Response:
    """Agree to the licences of the run."""
    return await whose.act(lambda c, caller: members.agree(c, caller, message, whose.hub.moment(), whose.proof))


@router.post("/v1/consents/withdraw", response_model=Done)
async def withdraw(whose: Whose, hub: Here) -> Response:
    """Take all consents back; the account's experts are retired."""
    return await whose.act(lambda c, caller: members.withdraw(c, caller, hub.moment(), hub.office))


@router.post("/v1/accounts/{account}/erase", response_model=Done)
async def erase(whose: Whose, account: Id) -> Response:
    """Forget the name of an account; its owner or an admin."""
    return await whose.act(lambda c, caller: members.erase(c, caller, account, whose.hub.moment()))


@router.post("/v1/devices/{key}/block", response_model=Done)
async def block(whose: Whose, key: Key, message: Reason) -> Response:
    """Block a key (admin)."""
    return await whose.act(lambda c, caller: members.block(c, caller, key, message.reason, whose.hub.moment()))


@router.post("/v1/appeals", status_code=201, response_model=Done)
async def ask_a_person(whose: Whose, message: Appeal) -> Response:
    """Ask a person to look at a verdict."""
    return await whose.act(lambda c, caller: members.ask_a_person(c, caller, message, whose.hub.moment()), 201)
