"""What clients send to ``/v1/chat/completions``, after the documentation of each.

Each conversation holds what makes that client's requests its own: null contents, parts, roles,
arguments as text, fields of other servers.
"""

# ruff: noqa: E501  - a message is a line
from typing import Any

READ_FILE = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "Read a file of the project.",
        "parameters": {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "object",
            "properties": {
                "path": {"type": "string", "description": "Relative to the project."},
                "offset": {"type": ["integer", "null"]},
            },
            "required": ["path"],
            "additionalProperties": False,
        },
    },
}
SHELL = {
    "type": "function",
    "function": {
        "name": "shell",
        "description": "Run a command.",
        "strict": False,
        "parameters": {
            "type": "object",
            "properties": {
                "command": {"type": "array", "items": {"type": "string"}},
                "workdir": {"type": "string"},
                "timeout": {"type": "number"},
            },
            "required": ["command"],
        },
    },
}
NO_PARAMETERS = {"type": "function", "function": {"name": "list_files", "description": "All."}}


def call(name: str, arguments: Any, id_: str = "call_1", **more: Any) -> dict[str, Any]:
    return {
        "id": id_,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
        **more,
    }


OPENAI_PYTHON = {
    "model": "sample",
    "messages": [
        {"role": "developer", "content": "Answer in short sentences."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "What does main.py do?"}],
            "name": "a",
        },
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "audio": None,
            "tool_calls": [call("read_file", '{"path": "main.py"}')],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "print('hello')\n"},
    ],
    "tools": [READ_FILE],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "temperature": 1,
    "top_p": 1.0,
    "n": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "max_completion_tokens": 4,
    "metadata": {"trace": "1"},
    "modalities": ["text"],
    "prediction": None,
    "prompt_cache_key": "x",
    "reasoning_effort": "low",
    "safety_identifier": "u",
    "seed": 1,
    "service_tier": "auto",
    "stop": None,
    "store": False,
    "stream": False,
    "user": "u",
    "verbosity": "low",
    "response_format": {"type": "text"},
}
OPEN_WEBUI = {
    "model": "sample",
    "stream": True,
    "stream_options": {"include_usage": True},
    "messages": [
        {"role": "system", "content": "User Context:\n\nToday is Sunday."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello! How can I help?"},
        {"role": "user", "content": [{"type": "text", "text": "Count to two."}]},
    ],
    "max_tokens": 4,
    "session_id": "s",
    "chat_id": "c",
    "id": "m",
    "features": {"web_search": False, "code_interpreter": False},
    "variables": {"{{USER_NAME}}": "A"},
    "background_tasks": {"title_generation": True},
    "params": {},
}
CLINE = {
    "model": "sample",
    "messages": [
        {
            "role": "system",
            "content": "You are a coding agent.\n\n<read_file>\n<path>…</path>\n</read_file>",
        },
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "<task>\nRename f\n</task>"},
                {
                    "type": "text",
                    "text": "<environment_details>\n# Files\na.py\n</environment_details>",
                },
            ],
        },
        {
            "role": "assistant",
            "content": "<thinking>Read it.</thinking>\n<read_file>\n<path>a.py</path>\n</read_file>",
        },
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "[read_file for 'a.py'] Result:"},
                {"type": "text", "text": "def f():\n    pass"},
            ],
        },
    ],
    "temperature": 0,
    "max_tokens": -1,
    "stream": True,
    "stream_options": {"include_usage": True},
}
CONTINUE = {
    "model": "sample",
    "messages": [
        {
            "role": "system",
            "content": "<important_rules>\nYou are in agent mode.\n</important_rules>",
        },
        {"role": "user", "content": [{"type": "text", "text": "List the files"}]},
        {"role": "assistant", "content": "", "tool_calls": [call("list_files", "")]},
        {"role": "tool", "tool_call_id": "call_1", "content": "a.py\nb.py"},
        {"role": "assistant", "content": " ", "tool_calls": [call("list_files", "{}", "call_2")]},
        {"role": "tool", "tool_call_id": "call_2", "content": ""},
    ],
    "tools": [NO_PARAMETERS, READ_FILE],
    "parallel_tool_calls": False,
    "max_tokens": 4096,
    "stop": ["\n```\n"],
    "stream": True,
}
AIDER = {
    "model": "sample",
    "messages": [
        {"role": "system", "content": "Act as an expert software developer."},
        {"role": "user", "content": "Make it say hi"},
        {
            "role": "assistant",
            "content": "hello.py\n<<<<<<< SEARCH\n=======\nprint('hi')\n>>>>>>> REPLACE",
        },
        {"role": "user", "content": "I switched to a new code base."},
        {"role": "assistant", "content": "Ok."},
        {"role": "system", "content": "Only edit files that were added."},
        {"role": "user", "content": "Add a test"},
    ],
    "temperature": 0,
    "stream": True,
    "num_ctx": 8192,
}
LITELLM = {
    "model": "sample",
    "messages": [
        {
            "role": "system",
            "content": [
                {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}
            ],
        },
        {"role": "user", "content": "Run ls"},
        {
            "role": "assistant",
            "content": None,
            "function_call": None,
            "tool_calls": [
                call("shell", '{"command": ["ls", "-l"]}', index=0),
                call("shell", '{"command": ["pwd"], "timeout": 1.5}', "call_2", index=1),
            ],
            "thinking_blocks": [{"type": "thinking", "thinking": "ls", "signature": "s"}],
            "reasoning_content": "I run both.",
            "provider_specific_fields": {"refusal": None},
        },
        {
            "role": "tool",
            "tool_call_id": "call_1",
            "name": "shell",
            "content": [{"type": "text", "text": "a.py"}],
        },
        {"role": "tool", "tool_call_id": "call_2", "name": "shell", "content": "/src"},
    ],
    "tools": [SHELL],
    "tool_choice": "auto",
    "max_tokens": 4,
    "user": "",
    "metadata": None,
    "extra_body": {},
    "top_k": -1,
    "stream_options": None,
}
LANGCHAIN = {
    "model": "sample",
    "messages": [
        {"role": "system", "content": "You extract facts."},
        {"role": "user", "content": "Ann is 5.", "name": None},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [call("list_files", "{}")],
            "name": "agent",
        },
        {"role": "tool", "content": "[]", "tool_call_id": "call_1"},
    ],
    "tools": [NO_PARAMETERS],
    "tool_choice": {"type": "function", "function": {"name": "list_files"}},
    "parallel_tool_calls": False,
    "stream": False,
    "n": 1,
    "temperature": 0.7,
    "max_tokens": 4,
    "response_format": {
        "type": "json_schema",
        "json_schema": {
            "name": "person",
            "description": "",
            "strict": True,
            "schema": {
                "title": "person",
                "type": "object",
                "properties": {
                    "name": {"type": "string", "title": "Name"},
                    "age": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
                },
                "required": ["name", "age"],
                "additionalProperties": False,
            },
        },
    },
}
CODEX = {
    "model": "sample",
    "messages": [
        {"role": "system", "content": "You are a coding agent in a terminal."},
        {"role": "developer", "content": "<permissions>read-only</permissions>"},
        {
            "role": "user",
            "content": "<environment_context>\n  <cwd>/src</cwd>\n</environment_context>",
        },
        {"role": "user", "content": "Run the tests"},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "The tests.",
            "tool_calls": [
                call("shell", '{"command":["bash","-lc","pytest -q"],"workdir":"/src"}')
            ],
        },
        {
            "role": "tool",
            "tool_call_id": "call_1",
            "content": '{"output":"1 failed\\n","metadata":{"exit_code":1}}',
        },
    ],
    "stream": True,
    "tools": [SHELL],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "store": False,
    "reasoning_effort": "none",
    "include": [],
}
CLAUDE_CODE = {
    "model": "sample",
    "max_tokens": 32000,
    "temperature": 1,
    "messages": [
        {
            "role": "system",
            "content": [
                {
                    "type": "text",
                    "text": "You are a coding assistant.",
                    "cache_control": {"type": "ephemeral"},
                },
                {"type": "text", "text": "Be concise.", "cache_control": {"type": "ephemeral"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "<system-reminder>\nNotes.\n</system-reminder>"},
                {"type": "text", "text": "Fix it"},
            ],
        },
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [call("read_file", '{"path": "/src/a.py", "offset": null}', "toolu_1")],
        },
        {
            "role": "tool",
            "tool_call_id": "toolu_1",
            "content": [{"type": "text", "text": "     1\tdef f(): </tool_call>"}],
        },
        {"role": "user", "content": [{"type": "text", "text": "Go on"}]},
    ],
    "tools": [READ_FILE, SHELL],
    "tool_choice": "auto",
    "stream": True,
    "stream_options": {"include_usage": True},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "metadata": {"user_id": "u"},
}

BODIES: dict[str, dict[str, Any]] = {
    "openai-python": OPENAI_PYTHON,
    "Open WebUI": OPEN_WEBUI,
    "Cline": CLINE,
    "Continue": CONTINUE,
    "aider": AIDER,
    "LiteLLM": LITELLM,
    "LangChain": LANGCHAIN,
    "Codex": CODEX,
    "Claude Code": CLAUDE_CODE,
}
