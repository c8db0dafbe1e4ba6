"""What clients send, as data: OpenAI's fields and ours, each once, with its range.

A field that is not here is accepted and counted. One that is here and cannot be honoured is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MAX_STOPS, MAX_CHOICES, MAX_TOP = 4, 128, 20
MAX_MESSAGES, MAX_PROMPTS, MAX_TOOLS = 4096, 256, 128


class Body(BaseModel):
    """A JSON object whose types are taken at their word: "1" is no number."""

    model_config = ConfigDict(strict=True, extra="allow")

    @property
    def unknown(self) -> list[str]:
        """The names of the fields that nobody here reads."""
        return list(self.model_extra or ())


def _number(low: float, high: float) -> Any:
    return Field(ge=low, le=high, allow_inf_nan=False)


Share = Annotated[float, _number(0, 1)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
NewTokens = Annotated[int, Field(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Stops = StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)]
Name = Annotated[str, StringConstraints(max_length=512)]
TemplateVariables = Annotated[
    dict[Annotated[str, StringConstraints(pattern=r"^[a-z_]{1,64}$")], Any], Field(max_length=64)
]


class StreamOptions(Body):
    include_usage: bool = False


class JsonSchema(Body):
    name: Name = "answer"
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Sampling(Body):
    """How an answer is drawn. What is not given is the model's own way; model may name an adapter."""

    model: Name | None = None
    temperature: Annotated[float, _number(0, 2)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Share | None = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    frequency_penalty: Annotated[float, _number(-2, 2)] | None = None
    presence_penalty: Annotated[float, _number(-2, 2)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, _number(-100, 100)]], Field(max_length=1024)] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool = False
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    regex: Annotated[str, StringConstraints(min_length=1, max_length=2**16)] | None = None
    grammar: Annotated[str, StringConstraints(min_length=1, max_length=2**16)] | None = None
    json_schema: dict[str, Any] | bool | Annotated[str, StringConstraints(min_length=1)] | None = None
    chat_template_kwargs: TemplateVariables | None = None
    cache_salt: Name | None = None


class Generating(Sampling):
    """What chat and completions share beside."""

    stop: Stops | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None


Tokens = Annotated[list[TokenId], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
TokenLists = Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]


class CompletionRequest(Generating):
    prompt: str | Tokens | Texts | TokenLists
    max_tokens: Count | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    echo: bool | None = False
    suffix: str | None = None


class Function(Body):
    name: Annotated[str, StringConstraints(pattern=r"^[\w.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class CalledFunction(Body):
    name: Name
    arguments: str


class ToolCall(Body):
    id: Name | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Part(Body):
    type: Name
    text: str | None = None


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Name | None = None
    # What the model thought before it said this, by either of its names.
    reasoning: str | None = None
    reasoning_content: str | None = None


class NamedFunction(Body):
    name: Name


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedChoice(Body):
    """The tools that may, or must, be called; those that are not named may not."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class ChatRequest(Generating):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: NewTokens | None = None
    max_completion_tokens: NewTokens | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Name | None = None
    # Known, and not to be had: refused unless they ask for what there is anyway.
    functions: list[Any] | None = None
    function_call: Any = None
    audio: Any = None
    modalities: list[str] | None = None
    web_search_options: Any = None


# -- OpenAI's Responses ------------------------------------------------------------------------------------------------


class InputItem(Body):
    """A message, a thought, a call that was made, or what came of one; which, its type says."""

    type: Literal["message", "reasoning", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[Part] | None = None
    call_id: Name | None = None
    name: Name | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None


class FlatTool(Function):
    type: Literal["function"]


class FlatNamedTool(NamedFunction):
    type: Literal["function"]


class FlatAllowedChoice(Body):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FlatNamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class TextFormat(JsonSchema):
    type: Literal["text", "json_object", "json_schema"] = "text"


class ReasoningOptions(Body):
    effort: Name | None = None


class TextOptions(Body):
    format: TextFormat | None = None


class ResponsesRequest(Sampling):
    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: NewTokens | None = None
    stream: bool | None = False
    stop: Stops | None = None
    text: TextOptions | None = None
    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatNamedTool | FlatAllowedChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    metadata: dict[str, str] | None = None
    # Known, and not to be had.
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    prompt: Any = None


# -- Anthropic's Messages ----------------------------------------------------------------------------------------------


class Block(Body):
    """A piece of a message: text, a thought, a call, or what came of one."""

    type: Name
    text: str | None = None
    thinking: str | None = None
    id: Name | None = None
    name: Name | None = None
    input: dict[str, Any] | None = None
    tool_use_id: Name | None = None
    content: str | list[Part] | None = None


class Turn(Body):
    role: Literal["user", "assistant"]
    content: str | list[Block]


class AnthropicTool(Body):
    name: Annotated[str, StringConstraints(pattern=r"^[\w.-]{1,64}$")]
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None


class AnthropicChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive"]


class CountRequest(Body):
    model: Name | None = None
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: str | list[Part] | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: AnthropicChoice | None = None
    thinking: Thinking | None = None


class MessagesRequest(CountRequest, Sampling):
    max_tokens: NewTokens
    stop_sequences: Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = False


# -- the rest ----------------------------------------------------------------------------------------------------------


class EmbeddingsRequest(Body):
    model: Name | None = None
    input: str | Tokens | Texts | TokenLists
    dimensions: Annotated[int, Field(ge=1, le=2**20)] | None = None
    encoding_format: Literal["float", "base64"] | None = "float"
    pooling: Literal["mean"] | None = None
    prompt_name: Name | None = None


class TokenizeRequest(Body):
    """A text, or messages as a chat would have them."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    chat_template_kwargs: TemplateVariables | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(Body):
    model: Name | None = None
    tokens: list[TokenId]


class TemplateRequest(Body):
    model: Name | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    chat_template_kwargs: TemplateVariables | None = None
