"""What becomes of the fields of POST /v1/responses that are not supported: ignored or refused, and why."""

from __future__ import annotations

from gateway.protocol.fields import Rule


def _ignored(why: str) -> Rule:
    return Rule("ignored", why)


def _refused(why: str, *no_op: object) -> Rule:
    return Rule("refused", why, no_op)


_LABEL = _ignored("a label for the caller's own use")
_HINT = _ignored("a hint; the prefix cache finds every shared prefix itself")
_STATUS = _ignored("what the item was when it was written")
_DIRECT = {"type": "direct"}

RESPONSES = {
    "user": _LABEL,
    "safety_identifier": _LABEL,
    "service_tier": _ignored("there is one tier"),
    "max_tool_calls": _ignored("it counts calls of built-in tools, and there are none"),
    "prompt_cache_retention": _HINT,
    "access_programs": _refused("the server has no such programs"),
    "background": _refused("a response is made while its client waits", False),
    "conversation": _refused("send previous_response_id, or the items themselves"),
    "context_management": _refused("a conversation is served whole or refused", []),
    "truncation": _refused("a conversation is served whole or refused", "disabled"),
    "prompt": _refused("there are no stored prompts: send instructions and input"),
    "image": _refused("the models read text only"),
    "moderation": _refused("the server does not moderate"),
}

STREAM_OPTIONS = {
    "include_obfuscation": _ignored("padding against traffic analysis is not written"),
}

PROMPT_CACHE_OPTIONS = {
    "mode": _HINT,
    "ttl": _HINT,
    "comparison_response_id": _refused("the server does not compare what was cached"),
    "prewarm": _refused("every request is answered", False),
}

TEXT = {
    "verbosity": _refused("models write as they have learned to: ask for it in a message", "medium"),
}

REASONING = {
    "summary": _ignored("thoughts are told whole, as the content of reasoning items"),
    "generate_summary": _ignored("thoughts are told whole, as the content of reasoning items"),
    "context": _refused("the chat template chooses which thoughts it shows again", "auto"),
    "mode": _refused("there is one mode", "standard"),
}

ITEM = {
    "status": _STATUS,
    "phase": _ignored("chat templates know of no phases"),
    "summary": _ignored("the content of a reasoning item has the thoughts"),
    "encrypted_content": _refused("only who has encrypted it can read it"),
    "caller": _refused("only the model calls functions", _DIRECT),
    "namespace": _refused("functions have no namespaces"),
    "async": _refused("results of calls come with the next request", False),
    "parsed_arguments": _ignored("OpenAI's SDK adds it to calls that it has read"),
}

PART = {
    "annotations": _ignored("they tell where a text is from, and the model reads the text"),
    "logprobs": _ignored("they tell of an answer that was given"),
    "parsed": _ignored("OpenAI's SDK adds it to messages that it has read"),
    "prompt_cache_breakpoint": _HINT,
    "image_url": _refused("the models read text only"),
    "file_id": _refused("the models read text only"),
}

TOOL = {
    "allowed_callers": _refused("only the model calls functions", ["direct"]),
    "async": _refused("results of calls come with the next request", False),
    "defer_loading": _refused("the model is shown every function", False),
    "output_schema": _ignored("results are shown to the model as they come"),
}
