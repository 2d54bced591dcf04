"""Tools and their calls as text, in the form that Hermes and Qwen introduced and `tokenizer.CHAT_TEMPLATE` writes."""

import json
from typing import Any

_TOOLS = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{signatures}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def tools_text(tools: Any) -> str:
    """What the system turn says about the tools at hand.

    Args:
        tools: list of OpenAI's or plain function signatures.

    Raises:
        ValueError: it is no such list.
    """
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and tool for tool in tools):
        raise ValueError(f"tools are no list of signatures: {tools!r}")
    return _TOOLS.format(signatures="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))


def tool_call_text(call: Any) -> str:
    """A call as the assistant writes it.

    Args:
        call: `name` and `arguments` (a mapping, or JSON in a text), alone or as OpenAI's `function`.

    Raises:
        ValueError: it has no name, or its arguments are no mapping.
    """
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError(f"a tool call names no function: {call!r}")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except RecursionError:
            raise ValueError(f"arguments of {name} are nested too deeply") from None
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments of {name} are {type(arguments).__name__}, not a mapping")
    written = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{written}\n</tool_call>"
