"""POST /v1/chat/completions."""

from __future__ import annotations

from starlette.responses import Response

from api.answering import Answering
from api.deps import CallerDep, RequestId, ServiceDep, make_router
from api.schemas import ChatBody
from api.wire import ChatWire

router = make_router()


@router.post("/v1/chat/completions")
async def chat(
    body: ChatBody, service: ServiceDep, request_id: RequestId, caller: CallerDep
) -> Response:
    """Answer a conversation. `model` is a policy (`auto` by default) or an expert."""
    request = body.request(ChatWire.prefix + request_id, caller)
    return Answering(
        service.pipeline,
        request,
        ChatWire(logprobs=request.sampling.logprobs is not None),
        include_usage=body.include_usage,
    )
