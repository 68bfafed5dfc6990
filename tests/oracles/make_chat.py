"""Conversations as transformers renders them, by templates in the styles of public chat models.

The templates are written here, none is copied: each does what is peculiar to its style, and each
checkpoint keeps its templates in another of the places where they are found. Run in oracle-env.
"""

import argparse
import datetime
import json
import pathlib
import shutil
import tempfile

import tokenizers
import torch
import transformers
from transformers.utils import chat_template_utils

HERE = pathlib.Path(__file__).parent / "chat"
NOW = datetime.datetime(2026, 3, 9, 14, 5)

LLAMA3 = """\
{{- bos_token }}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none and tools is defined %}
    {{- "You have these functions:\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("This model only makes single tool-calls at once!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", ' }}
        {{- '"parameters": ' + call.arguments | tojson + "}<|eot_id|>" }}
    {%- elif message.role == "tool" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" + message.content | tojson }}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CHATML = """\
{%- if messages[0].role != 'system' %}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}
        {%- set ns.last_query = messages | length - 1 - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' %}
        {%- set thought = message.reasoning_content | default('') %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if thought and loop.index0 > ns.last_query %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for tool_call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' ~ (tool_call.function | tojson) ~ '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("After the system message, roles must alternate user/assistant/...") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
MISTRAL_TOOLS = """\
{{- bos_token }}
{{- "[AVAILABLE_TOOLS] [" }}
{%- for tool in tools %}
    {{- '{"type": "function", "function": {' }}
    {%- for key, value in tool.function.items() if key != "return" %}
        {%- if value is string %}
            {{- '"' + key + '": "' + value + '"' }}
        {%- else %}
            {{- '"' + key + '": ' + value | tojson(sort_keys=True, separators=(",", ":")) }}
        {%- endif %}
        {%- if not loop.last %}{{- ", " }}{%- endif %}
    {%- endfor %}
    {{- "}}" + (", " if not loop.last else "]") }}
{%- endfor %}
{{- "[/AVAILABLE_TOOLS]" }}
{%- for message in messages if message.role == "user" %}
    {{- "[INST] " + message.content + "[/INST]" }}
{%- endfor %}
"""
GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}\
{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\n' }}
{%- if message['content'] is string -%}
    {{ message['content'] | trim }}
{%- elif message['content'] is iterable -%}
    {%- for item in message['content'] -%}
        {%- if item['type'] == 'image' -%}
            {{ '<start_of_image>' }}
        {%- elif item['type'] == 'text' -%}
            {{ item['text'] | trim }}
        {%- else %}{%- continue %}{% endif -%}
    {%- endfor -%}
{%- else -%}
    {{ raise_exception("Invalid content type") }}
{%- endif -%}
{{ '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}
"""
DEEPSEEK = """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}\
{% set ns = namespace(is_first=false, system_prompt='') %}\
{%- for message in messages %}{%- if message['role'] == 'system' %}\
{%- set ns.system_prompt = ns.system_prompt + message['content'] %}{%- endif %}{%- endfor %}\
{{bos_token}}{{ns.system_prompt}}\
{%- macro turn(role, text) -%}{{ '<｜' ~ role ~ '｜>' }}{{ text }}{%- endmacro -%}\
{%- for message in messages %}\
{%- if message['role'] == 'user' %}{{ turn('User', message['content']) }}\
{%- elif message['role'] == 'assistant' %}{% set content = message['content'] %}\
{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}\
{{ turn('Assistant', content) + eos_token }}\
{%- endif %}\
{%- endfor -%}\
{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}
"""
ERNIE = """\
{%- if documents %}
{{- "<context>\\n" }}
{%- for document in documents %}
{{- loop.index ~ ". " ~ document.title | upper ~ ": " ~ document.text ~ "\\n" }}
{%- endfor %}
{{- "</context>\\n" }}
{%- endif %}
{%- set cls_token = cls_token | default("<|begin_of_sentence|>") %}
{%- set roles = dict(user="User: ", assistant="Assistant: ") %}
{{- cls_token }}
{%- for message in messages %}
    {%- if message["role"] in roles %}
        {%- if message["role"] == "user" %}
            {{- roles["user"] + message["content"] + "\\n" }}
        {%- else %}
            {{- roles["assistant"] }}
            {%- generation %}{{- message["content"] + eos_token }}{%- endgeneration %}
        {%- endif %}
    {%- elif message["role"] == "system" %}
        {{- message["content"] + "\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "Assistant: " }}
{%- endif %}
"""

# style: templates, special tokens, further tokens of the template, where the templates are kept
STYLES = {
    "llama3": (
        LLAMA3,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        ["<|start_header_id|>", "<|end_header_id|>"],
        "file",
    ),
    "chatml": (CHATML, {"eos_token": "<|im_end|>", "pad_token": "<pad>"}, ["<|im_start|>"], "json"),
    "mistral": (
        {"default": MISTRAL, "tool_use": MISTRAL_TOOLS},
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        ["[INST]", "[/INST]"],
        "file",
    ),
    "gemma": (
        GEMMA,
        {"bos_token": "<bos>", "eos_token": "<eos>"},
        ["<start_of_turn>", "<end_of_turn>"],
        "file",
    ),
    "deepseek": (
        {"default": DEEPSEEK, "short": "{{ messages[-1].content }}"},
        {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"},
        ["<｜User｜>", "<｜Assistant｜>"],
        "json",
    ),
    "ernie": (
        ERNIE,
        {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<|begin_of_sentence|>"},
        [],
        "processor",
    ),
}

_SYSTEM = {"role": "system", "content": " You are brief. "}
_TURNS = [
    {"role": "user", "content": "Hello <b>there</b> & äöü 你好\n"},
    {"role": "assistant", "content": "<think>\na greeting\n</think>\n\nHi! "},
    {"role": "user", "content": "  What is 6 * 7?"},
]
_TOOL = {
    "type": "function",
    "function": {
        "name": "multiply",
        "description": "The product of two numbers, é",
        "parameters": {
            "type": "object",
            "properties": {"b": {"type": "number"}, "a": {"type": "number"}},
            "required": ["a", "b"],
        },
    },
}
_CALL = {"type": "function", "function": {"name": "multiply", "arguments": {"a": 6, "b": 7.5}}}
_CALLED = [
    *_TURNS,
    {"role": "assistant", "content": None, "tool_calls": [_CALL], "reasoning": "use the tool"},
    {"role": "tool", "content": {"product": 42, "ok": True, "sign": None}},
]
_PARTS = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "One "}, {"type": "x"}, {"type": "image"}],
    }
]
_DOCUMENTS = [{"title": "Numbers", "text": "6 * 7 = 42"}, {"title": "é", "text": "<none>"}]
CASES = [
    {"messages": _TURNS[:1]},
    {"messages": _TURNS},
    {"messages": _TURNS[:2], "add_generation_prompt": False},
    {"messages": [_SYSTEM, *_TURNS]},
    {"messages": [_TURNS[0], _TURNS[2]]},
    {"messages": _TURNS, "tools": [_TOOL]},
    {"messages": _CALLED, "tools": [_TOOL, _TOOL]},
    {"messages": _PARTS},
    {"messages": _TURNS, "documents": _DOCUMENTS},
    {"messages": _TURNS, "variables": {"enable_thinking": False, "date_string": "1 Jan 2025"}},
]


class Clock(datetime.datetime):
    """Stands still."""

    @classmethod
    def now(cls, tz=None):
        return NOW


def tokenizer(named, more):
    """Bytes, without merges, and the special tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: i for i, token in enumerate(alphabet)}, [])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([*dict.fromkeys(named.values()), *more])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def rendered(made, case):
    """What transformers makes of a case: text and tokens, or an error."""
    options = dict(case.get("variables", {}))
    options["add_generation_prompt"] = case.get("add_generation_prompt", True)
    for name in ("tools", "documents"):
        options[name] = case.get(name)
    try:
        text = made.apply_chat_template(case["messages"], tokenize=False, **options)
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    ids = made.apply_chat_template(case["messages"], tokenize=True, return_dict=False, **options)
    return {"text": text, "ids": ids}


def make(style, folder):
    """The files of a checkpoint's tokenizer, and what comes of all cases."""
    template, named, more, place = STYLES[style]
    made = tokenizer(named, more)
    made.chat_template = template
    made.save_pretrained(folder, save_jinja_files=place != "json")
    # Read again, as whoever has the checkpoint reads it.
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    results = [{**case, **rendered(loaded, case)} for case in CASES]
    if place == "processor":
        path = folder / "chat_template.jinja"
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": path.read_text()}))
        path.unlink()
    content = {"now": NOW.isoformat(), "cases": results}
    text = json.dumps(content, ensure_ascii=False, indent=None)
    (folder / "expected.json").write_text(text + "\n", "utf-8")


TALK = ("Hello", "What is 6 * 7?", "And why?")


def greedy(model, ids, count, stops):
    """The likeliest tokens after `ids`, the stop token included, by transformers' generate."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=stops or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    best = [row[0].topk(2).values for row in out.scores]
    return out.sequences[0, len(ids) :].tolist(), min(float(a - b) for a, b in best)


def make_talk(folder):
    """A tiny random Llama with a template, and a talk with it of three turns."""
    _, named, more, _ = STYLES["llama3"]
    text = tokenizer(named, more)
    text.chat_template = LLAMA3
    text.save_pretrained(folder)
    torch.manual_seed(14)
    config = transformers.LlamaConfig(
        vocab_size=len(text),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=0.4,
        eos_token_id=text.eos_token_id,
        bos_token_id=text.bos_token_id,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    # It says nothing but letters and signs: a random text of bytes is not tokenized as it was said.
    with torch.no_grad():
        for token, number in text.get_vocab().items():
            if not (len(token) == 1 and "!" <= token <= "~"):
                model.lm_head.weight[number] = 0
    messages, turns, stops = [], [], [text.eos_token_id]
    for turn, said in enumerate(TALK):
        messages.append({"role": "user", "content": said})
        options = {"add_generation_prompt": True, "date_string": "9 Mar 2026"}
        ids = text.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
        if not turn:
            # The first answer ends at a token that only generation_config.json names.
            free, _ = greedy(model, ids, 24, [])
            stops.append(next(t for i, t in enumerate(free) if i > 4 and t not in free[:i]))
        found, margin = greedy(model, ids, 16, stops)
        assert margin > 1e-3, margin
        answer = found[:-1] if found[-1] in stops else found
        content = text.decode(answer, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": content})
        turns.append({"ids": ids, "answer": answer, "text": content, "stopped": answer != found})
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=stops, do_sample=True, temperature=0.7, top_p=0.9, top_k=20
    )
    model.save_pretrained(folder)
    content = {"turns": turns, "stops": stops, "said": TALK}
    (folder / "talk.json").write_text(json.dumps(content, ensure_ascii=False) + "\n", "utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with what is there")
    check = parser.parse_args().check
    chat_template_utils.datetime = Clock
    for style in (*STYLES, "tiny_llama"):
        with tempfile.TemporaryDirectory() as scratch:
            made = pathlib.Path(scratch) / style
            made.mkdir()
            make_talk(made) if style == "tiny_llama" else make(style, made)
            if check:
                for path in (p for p in made.rglob("*") if p.is_file()):
                    there = HERE / style / path.relative_to(made)
                    assert there.read_bytes() == path.read_bytes(), there
            else:
                shutil.rmtree(HERE / style, ignore_errors=True)
                shutil.copytree(made, HERE / style)
        size = sum(p.stat().st_size for p in (HERE / style).rglob("*"))
        print(style, "ok," if check else "made,", size, "bytes")


if __name__ == "__main__":
    main()
