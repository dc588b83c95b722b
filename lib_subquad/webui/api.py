"""HTTP beside the web UI's own, under /subquad/v1/ and behind the same authentication: plan, status, measured, kept."""

from __future__ import annotations

from typing import Optional

from fastapi import Depends, FastAPI, HTTPException, Request
from pydantic import BaseModel, Field

from ..console import UserError
from ..engines import order
from ..engines.table import Class, Found
from ..lab.explain.halves import Half
from ..lab.explain.rows import Row
from . import decoding, measuring, models, status
from .hosts import host
from .words import sendable


class PlanRow(BaseModel):
    """One distinct attention shape: a row of the tab's table."""

    part: str = Field(description="unet, transformer, vae_encoder or vae_decoder")
    kind: str = Field(description="self, cross (at the prompt) or joint (image and text in one sequence)")
    layers: int = Field(description="how many layers have this shape")
    query_tokens: int = Field(description="of one image; in a joint layer those of the text as well")
    key_tokens: int
    heads: int = Field(description="heads of all images in the batch")
    head_width: int
    engine: str
    query_chunk: int
    kv_chunk: int
    workspace_bytes: int
    reasons: list[str] = Field(description="why this engine and these sizes, in words")


class VaeRow(BaseModel):
    """A half of the VAE: what its convolutions hold at their peak, by estimate."""

    part: str = Field(description="vae_decoder or vae_encoder")
    in_bands: bool = Field(description="whether it is computed in bands of rows, not all at once")
    band_rows: int = Field(description="rows of the largest feature map at a time, in bands")
    bands_bytes: int = Field(description="what it takes in bands")
    lowest_bytes: int = Field(description="what it takes in the lowest bands, which are for when memory runs out")
    usual_bytes: int = Field(description="what it takes all at once")
    fits: bool = Field(description="whether the way it is computed fits the memory limit")
    reasons: list[str] = Field(description="why in this way, in words")


class PlanResponse(BaseModel):
    family: str
    notes: list[str]
    rows: list[PlanRow]
    vae: list[VaeRow] = Field([], description="empty where the checkpoint does not tell")
    largest_image: Optional[list[int]] = Field(  # noqa: UP045 - pydantic 1 reads annotations itself
        None,
        description="[width, height] of the largest image in these proportions whose attention and decoding stay "
        "inside the memory limit; of attention alone where `vae` is empty",
    )


class StatusResponse(BaseModel):
    active: bool = Field(description="whether subquad computes attention")
    standing: str = Field("", description="the same in words, with what the web UI would use instead")
    summary: str
    calls: int
    retries: int
    engine: Optional[str] = None  # noqa: UP045
    query_chunk: Optional[int] = None  # noqa: UP045
    kv_chunk: Optional[int] = None  # noqa: UP045
    workspace_bytes: Optional[int] = Field(None, description="the largest of any call")  # noqa: UP045
    layers: int = Field(
        0,
        description="layers of the U-Net or transformer that made the last image, in which it looks at the prompt; "
        "where the web UI holds attention as a function, places that hold it",
    )
    out_of_reach: dict[str, int] = Field({}, description="whose are those that were not ours: owner -> layers")
    passed_on: dict[str, int] = Field({}, description="calls left to the web UI's own attention: reason -> calls")
    reruns: int = Field(
        0, description="calls computed again by an exact engine, as the inexact one's result was no use"
    )


class MeasuredRow(BaseModel):
    """Calls of one kind, and what was fastest for them."""

    dtype: str = Field(description="of queries and keys")
    value_dtype: str
    head_width: int
    value_width: int
    mask: str = Field(description="none, or its dtype")
    heads: int = Field(description="heads of all images in the batch, to the nearest power of two")
    query_tokens: int = Field(description="to the nearest power of two, as are those of the keys")
    key_tokens: int
    engine: str
    query_chunk: int = Field(description="0: as the engine picks it, as are those of the keys")
    kv_chunk: int
    margin: float = Field(description="how many times as fast as what rules would take; 1: nothing is clearly faster")
    disturbed: bool = Field(
        False, description="other programs ran meanwhile: it is measured again after the next start"
    )


class MeasuredResponse(BaseModel):
    device: str
    torch: str
    measured: list[MeasuredRow]


class ForgottenResponse(BaseModel):
    forgotten: int = Field(description="for how many kinds of calls something was known")


class KeptResponse(BaseModel):
    waiting: list[str] = Field(description="files of what was sampled and could not be decoded, without their folders")


class DismissedResponse(BaseModel):
    told: list[str] = Field(description="a sentence about each file")


class DecodedResponse(BaseModel):
    images: list[str] = Field(description="the files that were made, without their folders")
    told: list[str] = Field(description="a sentence about each file that waited")


def mount(_page, app: FastAPI) -> None:
    """Add the routes where the web UI has an API, with the dependencies of one of its own."""
    own = [route for route in app.routes if getattr(route, "path", "").startswith("/sdapi/")]
    if not own:
        return
    dependencies = list(getattr(own[0], "dependencies", []))
    for method, path, endpoint, response in (
        ("GET", "/subquad/v1/plan", plan_route, PlanResponse),
        ("GET", "/subquad/v1/status", status_route, StatusResponse),
        ("GET", "/subquad/v1/measured", measured_route, MeasuredResponse),
        ("DELETE", "/subquad/v1/measured", forget_route, ForgottenResponse),
        ("GET", "/subquad/v1/kept", kept_route, KeptResponse),
        ("POST", "/subquad/v1/kept", decode_route, DecodedResponse),
        ("DELETE", "/subquad/v1/kept", dismiss_route, DismissedResponse),
    ):
        takes_no_body = [Depends(nothing_but_an_address)] if method != "GET" else []
        how = {"response_model": response, "dependencies": [*dependencies, *takes_no_body]}
        app.add_api_route(path, endpoint, methods=[method], **how)
    app.openapi_schema = None  # made anew, with our routes


def plan_route(width: int = 512, height: int = 512, batch: int = 1, checkpoint: str = models.LOADED) -> PlanResponse:
    """How attention would be computed for an image of this size: a row for every distinct shape."""
    try:
        asked = models.question(checkpoint, width, height, batch)
    except UserError as error:
        raise HTTPException(status_code=422, detail=sendable(str(error))) from error
    rows = asked.rows()
    largest = asked.largest_image() if rows else None
    return PlanResponse(
        family=asked.checkpoint.family,
        notes=[sendable(note) for note in asked.notes],
        rows=[_row(row) for row in rows],
        vae=[_half(half) for half in asked.halves()],
        largest_image=list(largest) if largest else None,
    )


def status_route() -> StatusResponse:
    """Which optimization is active, and what the last generation took."""
    seen, standing = status.generation(), host().standing()
    fields = {}
    if seen.largest is not None:
        names = ("engine", "query_chunk", "kv_chunk", "workspace_bytes")
        fields = {name: getattr(seen.largest, name) for name in names}
    return StatusResponse(
        active=host().active,
        standing=sendable(str(standing)),
        summary=sendable(status.summary()),
        calls=seen.calls,
        retries=seen.retries,
        layers=seen.reach.places,
        out_of_reach={sendable(owner): count for owner, count in seen.reach.owners.items()},
        passed_on=dict(seen.passed_on),
        reruns=seen.reruns,
        **fields,
    )


def measured_route() -> MeasuredResponse:
    """What was measured on this device, and what *automatic* takes by it."""
    machine = order.machine(host().device())
    rows = [_measured_row(calls, found) for calls, found in measuring.known().items()]
    return MeasuredResponse(device=machine.device, torch=machine.torch, measured=rows)


def forget_route() -> ForgottenResponse:
    """Forget what was measured on this device, when no image is being made: it is measured anew before the next one."""
    with host().lock():
        return ForgottenResponse(forgotten=measuring.forget())


def kept_route() -> KeptResponse:
    """What was sampled and waits to be decoded."""
    return KeptResponse(waiting=[sendable(path.name) for path in decoding.waiting()])


async def nothing_but_an_address(request: Request) -> None:
    """Whoever names a file elsewhere means that one, and not all of them."""
    if (await request.body()).strip() not in (b"", b"{}", b"null"):
        raise HTTPException(422, "Name a file in the address, as in ?file=…, and send no body.")


def decode_route(file: str | None = None) -> DecodedResponse:
    """Decode all of it, or this file, when no image is being made."""
    images, told = decoding.decode(file)
    return DecodedResponse(images=[sendable(path.name) for path in images], told=list(map(sendable, told)))


def dismiss_route(file: str | None = None) -> DismissedResponse:
    """Take all of it, or this file, off the list of what waits; files stay where they are."""
    return DismissedResponse(told=list(map(sendable, decoding.dismiss(file))))


def _measured_row(calls: Class, found: Found) -> MeasuredRow:
    return MeasuredRow(
        dtype=calls.dtype,
        value_dtype=calls.value_dtype,
        head_width=calls.width,
        value_width=calls.value_width,
        mask=calls.mask,
        heads=2**calls.heads,
        query_tokens=2**calls.queries,
        key_tokens=2**calls.keys,
        engine=found.engine,
        query_chunk=found.query_chunk,
        kv_chunk=found.kv_chunk,
        margin=found.margin,
        disturbed=found.disturbed,
    )


def _half(half: Half) -> VaeRow:
    return VaeRow(
        part=half.part,
        in_bands=half.in_bands,
        band_rows=half.plan.rows,
        bands_bytes=half.plan.bytes,
        lowest_bytes=half.lowest_bytes,
        usual_bytes=half.plan.usual_bytes,
        fits=half.fits,
        reasons=list(half.reasons),
    )


def _row(row: Row) -> PlanRow:
    return PlanRow(
        part=row.part,
        kind=row.kind,
        layers=row.layers,
        query_tokens=row.problem.queries,
        key_tokens=row.problem.keys,
        heads=row.problem.batch * row.problem.heads,
        head_width=row.problem.width,
        engine=row.plan.engine,
        query_chunk=row.plan.query_chunk,
        kv_chunk=row.plan.kv_chunk,
        workspace_bytes=row.plan.workspace_bytes,
        reasons=list(row.plan.reasons),
    )
