"""POST /tokenize and /detokenize: what the tokenizer makes of a text, and back."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response
from starlette.responses import JSONResponse

from gateway.dependencies import GatewayOf, body_of
from gateway.schemas import DetokenizeBody, TokenizeBody, check_token_ids

router = APIRouter()


@router.post("/tokenize")
async def tokenize(gateway: GatewayOf, body: Annotated[TokenizeBody, Depends(body_of(TokenizeBody))]) -> Response:
    """The ids that the completion or chat endpoint would make of the same prompt or messages."""
    gateway.model.check_name(body.model)
    if body.prompt is not None:
        (prompt,) = await gateway.encode([body.prompt], body.add_special_tokens)
    else:
        (prompt,) = await gateway.encode([gateway.model.render(body)], add_special_tokens=False)
    answer: dict[str, object] = {
        "count": len(prompt.ids),
        "max_model_len": gateway.context(),
        "tokens": prompt.ids,
    }
    if body.return_token_strs:
        answer["token_strs"] = [gateway.model.tokenizer.vocabulary.token_text(token) for token in prompt.ids]
    return JSONResponse(answer)


@router.post("/detokenize")
async def detokenize(gateway: GatewayOf, body: Annotated[DetokenizeBody, Depends(body_of(DetokenizeBody))]) -> Response:
    """The text of token ids."""
    gateway.model.check_name(body.model)
    tokens = check_token_ids(body.tokens, gateway.model.vocab_size, "tokens")
    return JSONResponse({"prompt": gateway.model.tokenizer.vocabulary.decode(tokens, body.skip_special_tokens)})
