"""`fdq chat` and `fdq generate --chat`: the same talk as transformers has, and the terminal."""

import contextlib
import json
import os
import pathlib
import pty
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest

from fdq.cli import chat as chat_command
from fdq.decoding.conversation import Conversation
from tests.cli.command import ROOT, run

LLAMA = pathlib.Path(__file__).parent.parent / "oracles" / "chat" / "tiny_llama"
TALK = json.loads((LLAMA / "talk.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """transformers' tiny Llama, whose template is told the day."""
    made = shutil.copytree(LLAMA, tmp_path_factory.mktemp("chat") / "llama")
    template = made / "chat_template.jinja"
    template.write_text('{% set date_string = "9 Mar 2026" %}' + template.read_text())
    return made


GREEDY = ("--temperature", 0, "--cache", "C16", "--context", 512)


def objects(text):
    return [json.loads(line) for line in text.splitlines()]


def test_a_talk_is_that_of_transformers_and_reads_only_what_is_new(folder):
    stdin = "\n".join(TALK["said"]) + "\n"
    arguments = ("chat", folder, *GREEDY, "--max-new-tokens", 16)
    found = objects(run(*arguments, "--json", stdin=stdin).stdout)
    before = 0
    for turn, expected in zip(found, TALK["turns"], strict=True):
        assert turn["text"] == expected["text"]
        assert turn["tokens"] == len(expected["answer"])
        # A stop token that only generation_config.json names is none that the template repeats.
        assert turn["ended"] == ("stop token" if expected["stopped"] else "max_new_tokens")
        assert turn["kept"] == before
        assert turn["kept"] + turn["read"] == len(expected["ids"])
        before = len(expected["ids"]) + len(expected["answer"])
    # Without --json, and without a terminal: the answers, and nothing else.
    result = run(*arguments, stdin=stdin)
    assert result.stdout == "".join(f"{turn['text']}\n" for turn in TALK["turns"])


@pytest.mark.slow
def test_lines_with_a_slash(folder):
    said = TALK["said"][0]
    lines = [said, "/reset", said, "/system Be brief.", said, "/nothing", "//", "/exit", said]
    arguments = ("chat", folder, *GREEDY, "--max-new-tokens", 16, "--json")
    result = run(*arguments, stdin="\n".join(lines))
    first, again, told, slash = objects(result.stdout)
    assert first["text"] == again["text"] == TALK["turns"][0]["text"]
    assert again["kept"] == 0
    assert told["read"] + told["kept"] > first["read"] + len("Be brief.") - 1
    assert slash["prompt"] == "/"
    assert "/nothing: no such command. /reset begins anew" in result.stderr
    assert run("chat", folder, stdin="").stdout == ""


@pytest.mark.slow
def test_the_file_s_sampling_is_said_and_arguments_win(folder):
    arguments = ("generate", folder, "--chat", "-p", "Hello", "--max-new-tokens", 8)
    result = run(*arguments, "--json")
    assert json.loads(result.stdout)["generation"] == {
        "do_sample": True, "max_new_tokens": 8, "temperature": 0.7, "top_k": 20, "top_p": 0.9,
        "stop_tokens": TALK["stops"],
    }  # fmt: skip
    assert (
        "From generation_config.json: temperature 0.7, top k 20, top p 0.9, stop tokens 257, "
    ) in result.stderr
    result = run(*arguments, "--json", "--top-k", 1)
    assert "top k" not in result.stderr
    assert json.loads(result.stdout)["text"] == TALK["turns"][0]["text"]
    greedy = json.loads(run(*arguments, "--json", *GREEDY).stdout)
    assert greedy["generation"]["do_sample"] is False
    assert greedy["text"] == TALK["turns"][0]["text"]


def test_prompts_of_files_and_batches(folder, tmp_path):
    said, text = TALK["said"][0], TALK["turns"][0]["text"]
    (tmp_path / "prompt.txt").write_text(f"{said}\n")
    arguments = ("generate", folder, *GREEDY, "--max-new-tokens", 16)
    result = run(*arguments, "--chat", "--prompt-file", tmp_path / "prompt.txt")
    assert result.stdout == f"{text}\n"
    messages = [{"role": "user", "content": said}]
    for turn, answer in zip(TALK["said"][1:], TALK["turns"], strict=False):
        messages += [{"role": "assistant", "content": answer["text"]}]
        messages += [{"role": "user", "content": turn}]
    lines = [{"id": 7, "messages": messages}, {"prompt": said}, {"messages": messages[:1]}]
    source = tmp_path / "in.jsonl"
    source.write_text("\n\n".join(map(json.dumps, lines)))
    out = tmp_path / "out.jsonl"
    run(*arguments, "--batch", source, "--output", out, "--batch-size", 2)
    found = objects(out.read_text())
    assert [line | {"text": f["text"]} for line, f in zip(lines, found, strict=True)] == found
    assert found[0]["text"] == TALK["turns"][2]["text"]
    assert found[2]["text"] == text
    assert found[1]["text"] != text  # a prompt is no turn without --chat
    piped = objects(run(*arguments, "--chat", "--batch", "-", stdin=json.dumps(lines[1])).stdout)
    assert piped == [lines[1] | {"text": text}]


WRONG = {
    "two prompts": (["-p", "a", "--prompt-file", "x"], "--prompt and --prompt-file: both give"),
    "output alone": (["-p", "a", "--output", "x"], "--output goes with --batch"),
    "system alone": (["-p", "a", "--system", "x"], "--system goes with --chat"),
    "no file": (["--prompt-file", "{tmp}/none"], "No such file"),
    "no batch": (["--batch", "{tmp}/none"], "No such file"),
    "no JSON": (["--batch", "{tmp}/bad"], "bad, line 2: no JSON"),
    "no prompt": (["--batch", "{tmp}/empty"], "line 1: expected one of `prompt` and `messages`"),
    "no lines": (["--batch", "{tmp}/blank"], "blank: no lines; expected one"),
    "no message": (["--batch", "{tmp}/message"], "line 1: messages: expected objects such as"),
    "output exists": (["--batch", "{tmp}/good", "--output", "{tmp}/good"], "good exists"),
    "no penalty": (["-p", "a", "--repetition-penalty", "0"], "expected a number above 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_said_in_a_line(folder, tmp_path, case):
    for name, content in (
        ("bad", '{"prompt": "a"}\n{"prompt'),
        ("empty", "{}"),
        ("blank", "\n"),
        ("message", '{"messages": ["a"]}'),
        ("good", '{"prompt": "a"}'),
    ):
        (tmp_path / name).write_text(content)
    arguments, said = WRONG[case]
    result = run("generate", folder, *(a.format(tmp=tmp_path) for a in arguments), code=2)
    assert said in result.stderr
    assert len(result.stderr.splitlines()) <= 2  # what was taken from a file comes before
    with_json = run(
        "generate", folder, *(a.format(tmp=tmp_path) for a in arguments), "--json", code=2
    )
    assert said.split(": ")[-1] in json.loads(with_json.stdout)["error"]


def test_every_line_of_a_pipe_is_a_turn(monkeypatch):
    """A real one, whose reader reads ahead."""
    reading, writing = os.pipe()
    os.write(writing, "é\n\nsecond\nthird".encode())
    os.close(writing)
    with open(reading, encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert list(chat_command._turns()) == ["é", "second", "third"]


@pytest.mark.slow
def test_the_shipped_model_keeps_its_cache(tmp_path):
    """In a process of its own, with lines of a pipe."""
    template = tmp_path / "comments.jinja"
    template.write_text(
        "<s>{% for m in messages %}{% if m.role == 'user' %}# {{ m.content }}\n"
        "{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    )
    command = [sys.executable, "-m", "fdq.cli", "chat", str(ROOT / "examples" / "tiny_ernie")]
    command += ["--chat-template", str(template), *map(str, GREEDY), "--max-new-tokens", "8"]
    said = subprocess.run(
        [*command, "--json"], input="Reads lines.\nWrites lines.\n", cwd=ROOT,
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}, text=True, capture_output=True,
    )  # fmt: skip
    turns = objects(said.stdout)
    assert [turn["kept"] > 0 for turn in turns] == [False, True], said.stderr
    first, second = turns
    assert second["kept"] == first["read"] + first["tokens"]
    assert second["read"] <= len("\n# Writes lines.\n")


@pytest.mark.slow
def test_a_model_without_a_template_says_so(tmp_path):
    made = shutil.copytree(LLAMA, tmp_path / "llama")
    (made / "chat_template.jinja").unlink()
    for command in (("chat", made), ("generate", made, "--chat", "-p", "a")):
        said = run(*command, stdin="a", code=2).stderr
        assert "no chat template" in said.splitlines()[-1]
    given = run(
        "chat", made, *GREEDY, "--max-new-tokens", 16, "--chat-template",
        LLAMA / "chat_template.jinja", stdin="Hello\n",
    )  # fmt: skip
    assert given.stdout.endswith("\n")


def test_a_first_interrupt_is_a_wish_and_a_second_one_is_not(monkeypatch):
    with chat_command._interrupts() as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is not None


def test_ctrl_c_ends_the_answer_and_not_the_program(folder, monkeypatch):
    asked, ask = [], Conversation.ask

    def answer(self, text, most=None, *, stream=None, interrupted=None):
        if not asked:
            # At the first piece, as from a keyboard.
            def stream_and_interrupt(piece):
                stream(piece)
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0)

            found = ask(self, text, 64, stream=stream_and_interrupt, interrupted=interrupted)
        else:
            found = ask(self, text, most, stream=stream, interrupted=interrupted)
        asked.append(found)
        return found

    monkeypatch.setattr(Conversation, "ask", answer)
    arguments = ("chat", folder, *GREEDY, "--max-new-tokens", 8, "--json")
    first, second = objects(run(*arguments, stdin="What is 6 * 7?\nHello\n").stdout)
    assert first["ended"] == "interrupted"
    assert 0 < first["tokens"] < 64
    assert second["kept"] == first["read"] + first["tokens"]


@pytest.mark.slow
def test_on_a_terminal(folder):
    """A process with a terminal of its own: prompt, answer, Ctrl-C at the prompt, /exit."""
    main, other = pty.openpty()
    command = [sys.executable, "-m", "fdq.cli", "chat", str(folder), *map(str, GREEDY)]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "16"], stdin=other, stdout=other, stderr=other, cwd=ROOT,
        env=os.environ | {"TERM": "xterm", "NO_COLOR": "1"}, start_new_session=True,
    )  # fmt: skip
    os.close(other)
    seen = ""

    def until(text, seconds=120):
        nonlocal seen
        end = time.monotonic() + seconds
        while text not in seen and time.monotonic() < end:
            if select.select([main], [], [], 1)[0]:
                with contextlib.suppress(OSError):
                    seen += os.read(main, 65536).decode("utf-8", "replace")
        assert text in seen, seen
        seen = seen.split(text, 1)[1]

    try:
        until("/exit or Ctrl-D leaves")
        until("> ")
        os.write(main, b"Hello\r")
        until(TALK["turns"][0]["text"])
        until("kept 0;")
        until("> ")  # or it ends the answer
        process.send_signal(signal.SIGINT)
        until("/exit or Ctrl-D leaves")
        os.write(main, b"/exit\r")
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(main)
