"""What clients may ask, as OpenAI's interface has it and vLLM extends it. Unknown fields are taken and left alone."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

Tokens = list[Annotated[int, Field(ge=0)]]


def _object(required: list[str], **properties: Any) -> WithJsonSchema:
    """What /openapi.json says of an object that is taken as it is given."""
    return WithJsonSchema({"type": "object", "required": required, "properties": properties})


_TEXT, _OBJECT = {"type": "string"}, {"type": "object"}
_PART = {"type": "object", "required": ["type", "text"], "properties": {"type": {"const": "text"}, "text": _TEXT}}
_FUNCTION = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {**_TEXT, "minLength": 1}, "description": _TEXT, "parameters": _OBJECT},
}
Message = Annotated[
    dict[str, Any],
    _object(["role", "content"], role=_TEXT, content={"anyOf": [_TEXT, {"type": "array", "items": _PART}]}),
]
Tool = Annotated[dict[str, Any], _object(["type", "function"], type={"const": "function"}, function=_FUNCTION)]
JsonSchema = Annotated[dict[str, Any], _object(["schema"], name=_TEXT, schema=_OBJECT)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", strict=False, allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool = False


class ResponseFormat(_Body):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema(self):
        if self.type == "json_schema" and not isinstance((self.json_schema or {}).get("schema"), dict):
            raise ValueError('expected {"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}')
        return self


class _Generation(_Body):
    """What both ways of asking share."""

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=64)
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: Tokens | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @model_validator(mode="after")
    def _stops(self):
        if len(self.stops) > 16 or any(len(stop) > 1000 for stop in self.stops):
            raise ValueError("stop: expected at most 16 strings of at most 1000 characters")
        return self


class CompletionRequest(_Generation):
    """POST /v1/completions."""

    prompt: str | Tokens | list[str] | list[Tokens] = Field(default_factory=lambda: "")
    suffix: str | None = None
    max_tokens: int | None = Field(16, ge=0)
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=64)


class ChatRequest(_Generation):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=2048)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | Tool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    thinking_budget: int | None = Field(None, ge=0, description="tokens of reasoning after which it is ended")
    majority: int | None = Field(None, ge=2, le=64, description="samples that vote on the final answer")
    want_experts: bool = Field(False, description="the experts of each token of the stream")

    @model_validator(mode="after")
    def _tools(self):
        for tool in self.tools or ():
            function = tool.get("function")
            name = function.get("name") if isinstance(function, dict) else None
            if not isinstance(name, str) or not name or not name.isprintable():
                raise ValueError('tools: expected {"type": "function", "function": {"name": ..., "parameters": ...}}')
            if not isinstance(function.get("parameters"), dict | None):
                raise ValueError(f"tools: the parameters of {name} are no JSON schema")
        return self


class TokenizeRequest(_Body):
    """POST /tokenize: of a text, or of messages in the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one(self):
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected either prompt or messages")
        return self


class DetokenizeRequest(_Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Tokens


class Problem(BaseModel):
    """What is wrong, as OpenAI says it."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorAnswer(BaseModel):
    """The body of every answer that is an error."""

    error: Problem
