"""A chat begins: the conversation becomes a prompt, what is asked of the answer a grammar; each choice gets
its reader. Whichever endpoint asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import msgspec
from fastapi import Request

from gateway.answer.answer import AnswerReader
from gateway.answer.grammar import Function, without_ids
from gateway.conversation import chat_prompt, template_of
from gateway.generation import Generation
from gateway.grammar import Grammars
from gateway.prompt.conversation import Conversation
from gateway.prompts import require_ready
from gateway.protocol.common import (
    CompletionTokensDetails,
    GenerationParams,
    InvalidField,
    Usage,
    require_free_end,
)
from gateway.protocol.messages import ChatMessage, for_template
from gateway.protocol.structured import Shape
from gateway.protocol.tools import FunctionDefinition, ToolUse
from gateway.router import ServedModel
from gateway.routes.chat_answer import ChoiceAnswer
from gateway.routes.common import gateway_of, tenant_of


class ChatSoFar(Protocol):
    """What has been said."""

    @property
    def messages(self) -> Sequence[ChatMessage]: ...
    @property
    def add_generation_prompt(self) -> bool | None: ...
    @property
    def continue_final_message(self) -> bool | None: ...

    def template_variables(self, known: frozenset[str]) -> dict[str, Any]: ...


class ChatRequest(ChatSoFar, Protocol):
    """What is asked for, in whatever words."""

    @property
    def model(self) -> str: ...
    @property
    def prompt_cache_key(self) -> str | None: ...

    def params(self) -> GenerationParams: ...
    def shape(self) -> Shape | None: ...
    def tool_use(self) -> ToolUse: ...


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat underway, and who reads its choices."""

    generation: Generation
    answers: list[ChoiceAnswer]

    def usage(self) -> Usage:
        details = CompletionTokensDetails(sum(answer.num_reasoning_tokens for answer in self.answers))
        return msgspec.structs.replace(self.generation.usage(), completion_tokens_details=details)


async def start_chat(request: Request, body: ChatRequest) -> Chat:
    """Checks every limit; sends nothing yet. Raises what its parts raise."""
    gateway = gateway_of(request)
    model = gateway.router.find(body.model)
    require_ready(model)
    use = body.tool_use()
    conversation = conversation_of(model, body, use)
    params = await gateway.grammars.constrain(body.params(), body.shape())
    prompt = await chat_prompt(model, conversation)
    begun = body.messages[-1].written if body.continue_final_message else None
    is_thinking = model.answer.is_thinking(prompt.tail, begun)
    params = await _constrained(gateway.grammars, model, params, use, is_thinking)
    generation = Generation(
        gateway.admissions[model.name],
        [prompt.ids],
        replace(params, cache_key=body.prompt_cache_key or ""),
        tenant_of(request),
        prompt_param="messages",
        goes_on=bool(body.continue_final_message),
        decoder=model.answer.marks,
    )
    names = frozenset(function.name for function in use.allowed)
    answers = [
        ChoiceAnswer(AnswerReader(model.answer, names, is_thinking)) for _ in range(generation.num_choices)
    ]
    return Chat(generation, answers)


def _check_tools(model: ServedModel, use: ToolUse) -> None:
    """That the model can be told of tools, and its calls be read. Raises NoChatTemplate, InvalidField."""
    if not use.functions:
        return
    if "tools" not in template_of(model).variables:
        raise InvalidField(
            use.param,
            f"The chat template of the model '{model.name}' knows of no tools. Leave them out, choose 'none'"
            f" as '{use.choice_param}', or have the server started with a template that does"
            " ('chatTemplate' in its YAML file).",
        )
    if model.answer.tools is None:
        raise InvalidField(
            use.param,
            f"The chat template of the model '{model.name}' does not tell how it writes calls of tools. Leave"
            f" them out, choose 'none' as '{use.choice_param}', or have the server started with"
            " --tool-format.",
        )


def conversation_of(model: ServedModel, body: ChatSoFar, use: ToolUse) -> Conversation:
    """What the model's template is rendered over. Raises NoChatTemplate, InvalidField."""
    _check_tools(model, use)
    template, tools = template_of(model), model.answer.tools
    goes_on, begins = bool(body.continue_final_message), body.add_generation_prompt
    return Conversation(
        messages=for_template(body.messages, tools.id_for_template if tools else str),
        tools=[_for_template(function) for function in use.functions] or None,
        variables=body.template_variables(template.variables),
        add_generation_prompt=not goes_on if begins is None else begins,
        continue_final_message=goes_on,
    )


def _for_template(function: FunctionDefinition) -> Mapping[str, Any]:
    """A tool as models were shown them: without what is only for the server."""
    parameters = {"type": "object", "properties": {}} if function.parameters is None else function.parameters
    told = {"name": function.name, "description": function.description or "", "parameters": parameters}
    return {"type": "function", "function": told}


async def _check_strict(grammars: Grammars, use: ToolUse) -> None:
    """That each strict function's schema can be followed: by itself, so that the refusal names the function
    and the place in its schema. Raises InvalidField."""
    for function in use.allowed:
        if function.strict and function.parameters:
            where = f"in the parameters of {function.name!r}, "
            await grammars.check_schema(function.parameters, use.param, where)


async def _constrained(
    grammars: Grammars, model: ServedModel, params: GenerationParams, use: ToolUse, is_thinking: bool | None
) -> GenerationParams:
    """The grammar of the whole answer: calls that are to be followed, thoughts before them or before what the
    client's own grammar is for. Raises InvalidField."""
    if not use.is_constrained and (params.grammar is None or (not use.allowed and is_thinking is False)):
        return params
    if use.is_constrained:
        require_free_end(params.ignore_eos, params.min_tokens, f"calls that must keep to '{use.param}'")
        await _check_strict(grammars, use)
    grammar = model.answer.grammar(
        [
            Function(f.name, f.parameters, bool(f.strict), is_exact=use.is_required or bool(f.strict))
            for f in use.allowed
        ],
        required=use.is_required,
        many=use.is_parallel,
        is_thinking=is_thinking,
        content=params.grammar,
    )
    await grammars.check(without_ids(grammar), use.param)
    return replace(params, grammar=grammar)
