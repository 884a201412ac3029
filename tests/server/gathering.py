"""What a client has of a stream, whatever pieces it came in: every interface's, in one shape."""

import json
from typing import Any


def gathered(path: str, text: str) -> Any:
    """All of it that is the same however it was cut into pieces. Times are left out."""
    events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    if path not in ("/v1/messages", "/v1/responses"):
        assert events[-1] == "[DONE]", events[-1]
        events = events[:-1]
    found = [json.loads(event) for event in events]
    assert not any("error" in event and event["error"] for event in found), found
    return _SHAPES[path](found)


def _chat(events: list[Any]) -> Any:
    choices: dict[int, dict[str, Any]] = {}
    heads, usage = set(), None
    for event in events:
        heads.add((event["id"], event["created"], event["model"], event["system_fingerprint"]))
        usage = event.get("usage") or usage
        for part in event["choices"]:
            c = choices.setdefault(part["index"], {"said": {}, "logprobs": [], "ends": []})
            delta = part["delta"] if "delta" in part else {"text": part["text"]}
            for call in delta.pop("tool_calls", ()):
                into = c["said"].setdefault(("call", call["index"]), {"arguments": ""})
                into |= {k: v for k, v in call.items() if k != "function"}
                function = dict(call["function"])
                into["arguments"] += function.pop("arguments", "")
                into |= function
            for name, value in delta.items():
                c["said"][name] = c["said"].get(name, "") + value
            if part["logprobs"]:
                c["logprobs"] += _columns(part["logprobs"])
            c["ends"] += [part["finish_reason"]] if part["finish_reason"] else []
            c.setdefault("receipt", part.get("isobit_receipt"))
            c["receipt"] = part.get("isobit_receipt", c["receipt"])
    [head] = heads
    return head, choices, usage


def _columns(logprobs: dict[str, Any]) -> list[Any]:
    if "content" in logprobs:
        return logprobs["content"]
    return list(zip(*(logprobs[name] for name in sorted(logprobs)), strict=True))


def _messages(events: list[Any]) -> Any:
    blocks: dict[int, list[Any]] = {}
    others = []
    for event in events:
        if event["type"] == "content_block_delta":
            delta = dict(event["delta"])
            into = blocks.setdefault(event["index"], [delta.pop("type"), ""])
            into[1] += "".join(delta.values())
        elif event["type"] != "ping":
            others.append(event)
    return blocks, others


def _responses(events: list[Any]) -> Any:
    texts: dict[str, str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            texts[event["item_id"]] = texts.get(event["item_id"], "") + event["delta"]
    numbers = [event["sequence_number"] for event in events]
    assert numbers == list(range(len(events)))
    others = [e for e in events if not e["type"].endswith(".delta")]
    return texts, others


def _generate(events: list[Any]) -> Any:
    last = {event.get("index", 0): event for event in events}
    for event in last.values():
        del event["meta_info"]["e2e_latency"]
    return last


_SHAPES = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _chat,
    "/v1/messages": _messages,
    "/v1/responses": _responses,
    "/generate": _generate,
}
