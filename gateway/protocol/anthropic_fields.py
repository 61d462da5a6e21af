"""What becomes of those fields of Anthropic's requests that are not supported; of OpenAI's: fields.py."""

from __future__ import annotations

from gateway.protocol.fields import Rule

_CACHE = Rule("ignored", "a hint; the prefix cache finds every shared prefix itself")
_TEXT_ONLY = Rule("refused", "the models read text only")

_KEEP_ALL = {"type": "clear_thinking_20251015", "keep": "all"}
_NO_EDITS: tuple[object, ...] = ({"edits": []}, {"edits": [_KEEP_ALL]})

COUNT = {
    "cache_control": _CACHE,
    "speed": Rule("refused", "there is one speed", ("standard",)),
    "context_management": Rule("refused", "a conversation is served whole or refused", _NO_EDITS),
    "mcp_servers": Rule("refused", "the server calls no tools", ([],)),
    "user_profile_id": Rule("ignored", "a label for the caller's own use; the SDK sends it as a header"),
    "workspace_id": Rule("ignored", "a label for the caller's own use; the SDK sends it as a header"),
}

CREATE = COUNT | {
    "container": Rule("refused", "the server runs no code"),
    "diagnostics": Rule("refused", "the server keeps no earlier messages"),
    "inference_geo": Rule("refused", "the server is where it is"),
    "thread": Rule("refused", "the server keeps no conversations: send all messages"),
    "compaction": Rule("refused", "a conversation is served whole or refused"),
    "fallbacks": Rule("refused", "no other model answers for the one that is asked", ([],)),
    "fallback_credit_token": Rule("refused", "nothing is billed"),
    "billing_policy": Rule("ignored", "nothing is billed"),
    "metadata": Rule("ignored", "a label for the caller's own use"),
    "service_tier": Rule("ignored", "there is one tier"),
}

BLOCK = {
    "cache_control": _CACHE,
    "signature": Rule("ignored", "thoughts are taken back as they are"),
    "is_error": Rule("ignored", "the content of a result says what went wrong"),
    "citations": Rule("refused", "the models cite nothing", ([], {"enabled": False})),
    "caller": Rule("refused", "the client runs the tools", ({"type": "direct"},)),
    "toolset_name": Rule("refused", "only tools of type 'custom' are supported"),
    "data": Rule("refused", "only the server that has encrypted thoughts can read them"),
    "source": _TEXT_ONLY,
}

TEXT = {name: BLOCK[name] for name in ("cache_control", "citations")}

TOOL = {
    "cache_control": _CACHE,
    "eager_input_streaming": Rule("ignored", "inputs are streamed as the model writes them"),
    "allowed_callers": Rule("refused", "the client runs the tools", ([], ["direct"])),
    "defer_loading": Rule("refused", "every tool is shown to the model", (False,)),
    "input_examples": Rule(
        "refused", "models are shown name, description and schema: write them there", ([],)
    ),
}

THINKING = {
    "budget_tokens": Rule("ignored", "a model ends its thoughts itself, within 'max_tokens'"),
}
