"""Claims, beats, pauses and releases."""

from fastapi import APIRouter, Request, Response

from elmwood.hub.actions import leases
from elmwood.hub.api.asked import Recent, Whose, network
from elmwood.hub.messages import Beat, BeatReply, Claim, Grant, Held, Id

router = APIRouter(tags=["leases"])


@router.post("/v1/leases/{lease}/beat", response_model=BeatReply)
async def beat(whose: Whose, lease: Id, message: Beat) -> Response:
    """A sign of life, with the step."""
    return await whose.act(lambda c, caller: leases.beat(c, caller, lease, message, whose.hub.moment()), again=True)


@router.post(
    "/v1/leases", status_code=201, response_model=Grant, dependencies=[Recent], responses={204: {"description": "no work; Elmwood-Reason"}}
)
async def claim(request: Request, whose: Whose, message: Claim) -> Response:
    """Lease a domain."""
    place = whose.hub.office.hide(network(request))
    return await whose.act(lambda c, caller: leases.claim(c, caller, message, whose.hub.moment(), place), 201)


@router.post("/v1/leases/{lease}/pause", response_model=BeatReply)
async def pause(whose: Whose, lease: Id, message: Held) -> Response:
    """Stop for a while; no beats are needed."""
    return await whose.act(lambda c, caller: leases.pause(c, caller, lease, message.token, whose.hub.moment()))


@router.post("/v1/leases/{lease}/resume", response_model=BeatReply)
async def resume(whose: Whose, lease: Id, message: Held) -> Response:
    """Go on after a pause."""
    return await whose.act(lambda c, caller: leases.resume(c, caller, lease, message.token, whose.hub.moment()))


@router.post("/v1/leases/{lease}/release", response_model=BeatReply)
async def release(whose: Whose, lease: Id, message: Held) -> Response:
    """Give a domain back."""
    return await whose.act(lambda c, caller: leases.release(c, caller, lease, message.token, whose.hub.moment()))
