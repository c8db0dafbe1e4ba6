"""POST /tokenize, /detokenize, /apply-template: what the model is given, to look at."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from gemmakit.errors import TokenOutOfRange
from gemmakit.serve.conversation import chosen_tools, plain_messages
from gemmakit.serve.protocol import DetokenizeRequest, TemplateRequest, TokenizeRequest
from gemmakit.serve.refusals import Refusal
from gemmakit.serve.service import service_of
from gemmakit.text.chat import free_variables

router = APIRouter(tags=["tokens"])


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """The ids of a text or a conversation."""
    service = service_of(request)
    served = service.ready(body.model)
    service.count_unknown(body)
    if (body.prompt is None) == (body.messages is None):
        raise Refusal(400, "give prompt or messages, one of them.", param="prompt")
    if body.messages is not None:
        use = chosen_tools(body.tools, None, True, served.has_tools)
        tokens = await service.prompt(body.messages, use, body.chat_template_kwargs)
    else:
        options = {"add_special_tokens": body.add_special_tokens}
        tokens = (await served.aside(served.tokenizer, body.prompt, **options))["input_ids"]
    return {"tokens": tokens, "count": len(tokens), "max_model_len": served.context}


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, Any]:
    """The text of ids, special tokens by their names."""
    service = service_of(request)
    served = service.ready(body.model)
    service.count_unknown(body)
    try:
        return {"prompt": await served.aside(served.tokenizer.decode, body.tokens)}
    except TokenOutOfRange as error:
        raise Refusal(400, str(error), param="tokens") from None


@router.post("/apply-template")
async def apply_template(body: TemplateRequest, request: Request) -> dict[str, Any]:
    """A conversation as the template writes it. Text alone: what is a token in it and what is not, ids say."""
    service = service_of(request)
    served = service.ready(body.model)
    service.count_unknown(body)
    use = chosen_tools(body.tools, None, True, served.has_tools)
    messages = plain_messages(body.messages, served.has_developer)
    options = {"tools": use.told, "add_generation_prompt": True, "tokenize": False}
    options |= free_variables(body.chat_template_kwargs)
    return {"prompt": await served.aside(served.tokenizer.apply_chat_template, messages, **options)}
