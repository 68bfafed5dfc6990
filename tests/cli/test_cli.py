"""The `fdq` command, in process: what it prints, its JSON, its errors and exit codes."""

import hashlib
import json
import os
import pathlib
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from typer.testing import CliRunner

import fdq.cli
import fdq_checkpoints
from fdq.analysis.shipped_model import shipped_model_path
from fdq.cache import CACHE_FORMATS
from fdq.cli import html_page
from fdq.cli.app import app
from fdq.cli.console import size
from fdq.models import CONFIGS, FAMILIES, Decoder
from tests.checkpoints import foreign

ROOT = pathlib.Path(__file__).parent.parent.parent
COMMANDS = (
    "demo",
    "convert",
    "export",
    "inspect",
    "generate",
    "chat",
    "evaluate",
    "plan",
    "schemes",
    "models",
    "kernels",
)
TEXT = "def main(argv):\n    return argv\n\n\nclass Reader:\n    pass\n" * 3


def run(*arguments, code=0, stdin=None):
    """The result of a command line; its standard output and error apart."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def original(folder):
    """A random float model with a byte-level tokenizer, as an fdq checkpoint."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=288,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.save(str(folder / "tokenizer.json"))
    config = CONFIGS["ernie-4.5-0.3b"].replace(
        vocab_size=288,
        hidden_size=128,
        intermediate_size=128,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
        dtype="float32",
    )
    model = Decoder(config, rngs=nnx.Rngs(params=0))
    model.tokenizer_path = str(folder / "tokenizer.json")
    fdq_checkpoints.save(model, folder / "original")
    return folder / "original"


@pytest.fixture(scope="module")
def converted(original, folder):
    result = run("convert", original, folder / "w4", "--scheme", "W4A16C8", "--json")
    content = json.loads(result.stdout)
    assert content["bytes_after"] < content["bytes_before"]
    assert content["quantized_bits_per_weight"] == 4.125
    assert {row["format"] for row in content["formats"]} == {"W4", "float32"}
    return folder / "w4"


@pytest.fixture(scope="module")
def stranger(original, folder):
    """A model of the same sizes whose tokens `a` and `b` have changed places."""
    other = folder / "stranger" / "tokenizer.json"
    other.parent.mkdir()
    content = json.loads((original / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    other.write_text(json.dumps(content))
    model = fdq_checkpoints.load(original)
    model.tokenizer_path = str(other)
    fdq_checkpoints.save(model, folder / "stranger" / "model")
    return folder / "stranger" / "model"


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_help_lists_the_commands_and_shows_an_example_of_each():
    output = run("--help").stdout
    assert all(name in output for name in COMMANDS)
    for name in COMMANDS:
        output = run(name, "--help").stdout
        assert f"fdq {name} " in output
        assert "--json" in output


def test_version():
    assert run("--version").stdout == f"fdq {fdq.__version__}\n"


def test_convert_prints_what_it_did(original, tmp_path):
    output = run("convert", original, tmp_path / "w8", "-s", "wint8").stdout
    assert "W8" in output
    assert "times smaller" in output


def test_inspect_shows_tensors_and_verifies(converted, tmp_path):
    output = run("inspect", converted, "--verify").stdout
    assert "layers.0.self_attn.qkv_proj.kernel" in output
    assert "checksums verified" in output
    content = json.loads(run("inspect", converted, "--json").stdout)
    assert content["scheme"] == "W4A16C8"
    assert content["problem"] is None
    assert sum(row["nbytes"] for row in content["rows"]) == content["nbytes"]


def test_inspect_folds_equal_layers_as_convert_does():
    lines = run("inspect", shipped_model_path()).stdout.splitlines()
    (line,) = [line for line in lines if "experts.{0..3}.up_proj" in line]
    assert line.split()[:2] == ["model.layers.{1..3}.mlp.experts.{0..3}.up_proj.weight", "12"]
    every = run("inspect", shipped_model_path(), "--every").stdout.splitlines()
    assert len(lines) < 30 < 80 < len(every)
    assert any("layers.2.mlp.experts.1.up_proj" in line for line in every)


def test_inspect_finds_a_flipped_byte(original, tmp_path):
    run("convert", original, tmp_path / "damaged", "-s", "W8A16")
    files = [p for p in (tmp_path / "damaged" / "weights").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.chmod(0o600)
    largest.write_bytes(bytes(data))
    result = run("inspect", tmp_path / "damaged", "--verify", code=1)
    assert result.stderr.startswith("Error: ")
    assert json.loads(run("inspect", tmp_path / "damaged", "--verify", "--json", code=1).stdout)[
        "problem"
    ]


@pytest.mark.slow
def test_generate_streams_the_text_that_json_holds(converted):
    arguments = ("generate", converted, "--prompt", "def main(", "--max-new-tokens", 24)
    content = json.loads(run(*arguments, "--json").stdout)
    assert content["text"]
    assert 0 < content["first_token_seconds"] <= content["seconds"]
    assert content["lowering_seconds"] + content["compiling_seconds"] > 0
    result = run(*arguments)
    assert result.stdout == f"def main({content['text']}\n"
    assert "First text after" in result.stderr
    sampled = (*arguments, "--temperature", 1, "--json")
    texts = [json.loads(run(*sampled, "--seed", s).stdout)["text"] for s in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_evaluate_measures_and_compares(original, converted, text_file):
    output = run("evaluate", converted, "--text", text_file, "--against", original).stdout
    assert "bits per byte" in output
    assert "KL to the reference" in output
    for name in ("of the reference", "bits per weight, quantized", "bits per weight, all"):
        assert name in output
    content = json.loads(run("evaluate", converted, "--text", text_file, "--json").stdout)
    assert content["cache"] == "C8"
    # A random model knows nothing: about 8 bits a token, which is a few bytes.
    assert 2 < content["bits_per_byte"] < 10
    assert content["kl_nats_per_token"] is None
    assert content["quantized_bits_per_weight"] == 4.125 < content["bits_per_weight"]
    inspected = json.loads(run("inspect", converted, "--json").stdout)
    for name in ("quantized_bits_per_weight", "bits_per_weight"):
        assert content[name] == pytest.approx(inspected[name])


def test_the_originals_own_figure_is_that_of_the_original(original, converted, text_file):
    arguments = ("--text", text_file, "--json")
    compared = json.loads(run("evaluate", converted, "--against", original, *arguments).stdout)
    alone = json.loads(run("evaluate", original, "--cache", "C16", *arguments).stdout)
    assert compared["reference_bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=1e-4)
    assert compared["reference_bits_per_byte"] != compared["bits_per_byte"]


def test_a_prompt_and_a_text_come_from_standard_input(converted):
    arguments = ("generate", converted, "--max-new-tokens", 24, "--json")
    spelled = json.loads(run(*arguments, "--prompt", "def main(").stdout)
    for given in ((), ("--prompt", "-")):
        read = json.loads(run(*arguments, *given, stdin="def main(\n").stdout)
        assert read["prompt"] == spelled["prompt"] == "def main("
        assert read["text"] == spelled["text"]
    content = json.loads(run("evaluate", converted, "--text", "-", "--json", stdin=TEXT).stdout)
    assert content["text_sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        (("--prompt", "-"), b"\xff\xfe", "is no text in UTF-8"),
        (("--prompt", "\udcff"), None, "--prompt: no text in UTF-8"),
        (("--prompt", "a", "--temperature", 1, "--seed", 10**20), None, "--seed"),
        (("--prompt", "a", "--temperature", 1, "--seed", -1), None, "--seed"),
    ],
)
def test_prompts_and_seeds_that_are_none(converted, arguments, stdin, said):
    assert said in run("generate", converted, *arguments, stdin=stdin, code=2).stderr


def test_adapters_go_beside_a_checkpoint(converted, tmp_path):
    tuned = fdq.lora(fdq_checkpoints.load(converted), rank=2)
    rng = np.random.default_rng(5)
    for _, one in nnx.to_flat_state(nnx.state(tuned, nnx.LoRAParam)):
        one.set_value(jnp.asarray(rng.standard_normal(one.shape), one.dtype))
    fdq.save_lora(tuned, tmp_path / "adapters")
    arguments = ("generate", converted, "-p", "def main(", "--max-new-tokens", 8)
    said = run(*arguments, "--lora", tmp_path / "adapters", "--json").stdout
    assert json.loads(said)["text"] == fdq.generate(tuned, ["def main("], 8)[0]
    for wrong, why in (
        (["--lora", tmp_path], "adapter_config.json"),
        (["--lora", tmp_path / "adapters", "--mesh", "tensor=2"], "fdq.merge_lora makes one"),
    ):
        assert why in run(*arguments, *wrong, code=2).stderr


def test_what_nobody_asked_for_ends_with_the_context(converted):
    arguments = ("generate", converted, "-p", "def main(", "--context", 16)
    said = json.loads(run(*arguments, "--json").stdout)  # of 128 by default, or of a file
    assert 0 < len(said["text"]) < 128
    assert "do not fit" in run(*arguments, "--max-new-tokens", 128, code=2).stderr


def test_a_picture_shows_layers_and_what_they_lost(converted, original, tmp_path):
    file = tmp_path / "bits.svg"
    arguments = ("inspect", converted, "--plot", file, "--against", original)
    errors = json.loads(run(*arguments, "--json").stdout)["errors"]
    path = "layers.0.self_attn.o_proj.kernel"
    kernels = [
        fdq.load(one, prepare=False).layers[0].self_attn.o_proj.kernel
        for one in (converted, original)
    ]
    rounded = np.asarray(fdq.dequantize(kernels[0]), np.float64)
    exact = np.asarray(kernels[1].get_value(), np.float64)
    assert errors[path] == pytest.approx(
        np.linalg.norm(rounded - exact) / np.linalg.norm(exact), rel=1e-4
    )
    words = [element.text for element in ElementTree.parse(file).iter() if element.text]
    assert {"layers.0", "embed_tokens", "attention", "bits per weight"} <= set(words)
    assert f"{path}  " in run(*arguments).stdout
    other = ROOT / "tests" / "oracles" / "models" / "llama"
    for wrong, why in (
        (["--plot", tmp_path / "bits.png"], "ends with .svg"),
        (["--against", other], "Give the checkpoint that it was made of"),
    ):
        assert why in run("inspect", converted, *wrong, code=2).stderr


@pytest.mark.parametrize("command", ["generate", "evaluate"])
@pytest.mark.parametrize(
    ("option", "name"), [("--cache", "C8-kvchannel"), ("--scheme", "W8A8-static")]
)
def test_static_scales_are_made_by_convert(command, option, name, original):
    said = run(command, original, option, name, stdin="a", code=2).stderr
    assert f"{option} {name} has static scales" in said
    assert "--calibration-text FILE" in said


def test_an_empty_path_is_not_the_current_directory(converted, monkeypatch):
    monkeypatch.chdir(converted)
    for arguments in (("inspect", ""), ("convert", "", "out"), ("convert", ".", "")):
        assert "an empty path" in run(*arguments, code=2).stderr


def test_a_tree_of_arrays_is_no_model(tmp_path):
    fdq.save({"w": np.ones((64, 32), np.float32)}, tmp_path / "tree")
    for command in ("generate", "evaluate"):
        said = run(command, tmp_path / "tree", code=2, stdin="a").stderr
        assert "a tree of arrays, not a model that decodes" in said


def test_what_another_tool_quantized_is_converted_without_a_scheme(tmp_path, original):
    foreign.model("gptq", tmp_path / "gptq", np.random.default_rng(0))
    content = json.loads(run("convert", tmp_path / "gptq", tmp_path / "kept", "--json").stdout)
    assert content["scheme"] == "W4A16C16-g32-f16"
    assert (
        "say what it is to be stored in" in run("convert", original, tmp_path / "x", code=2).stderr
    )
    run("convert", tmp_path / "gptq", tmp_path / "other", "--scheme", "W8A16")
    assert not (tmp_path / "x").exists()


def test_schemes_and_models_are_listed():
    output = run("schemes").stdout
    assert all(name in output for name in ("NF4", "g64", "kvchannel", "wint4", "block_wise_fp8"))
    content = json.loads(run("schemes", "--json").stdout)
    assert content["names"]["wint4"] == "W4A16C16"
    assert "*.experts" in content["names"]["mix_quant"]
    assert content["types"]["cache"] == ["16", *(f.grammar_name for f in CACHE_FORMATS.values())]
    output = run("models", "--json").stdout
    assert all(name in output for name in (*CONFIGS, *FAMILIES))
    content = json.loads(output)
    assert content["models"]["ernie-4.5-0.3b"]["parameters"] == pytest.approx(0.36e9, rel=0.01)


def test_schemes_show_what_they_cost():
    """The figures of the table in docs/schemes.md."""
    measured = json.loads(run("schemes", "--json").stdout)["measured"]
    page = (ROOT / "docs/schemes.md").read_text("utf-8")
    table = page.split("<!-- schemes:begin -->")[1].split("<!-- schemes:end -->")[0]
    assert len(measured) == table.count("\n") - 3
    for row in measured:
        bits, every, figure = (
            row[name] for name in ("quantized_bits_per_weight", "bits_per_weight", "bits_per_byte")
        )
        quantized = "—" if bits is None else f"{bits:.3f}"
        assert f"| {row['scheme']} | {quantized} | {every:.3f} | {figure:.4f} |" in table
        kl, top = row["kl_nats_per_token"], row["same_top_token"]
        assert f"| {kl:.5f} | {top:.1%} | {row['cache_bytes_per_token']:,} |" in table
    assert "0.01825" in run("schemes").stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_and_options(shell, tmp_path):
    script = run("completion", shell).stdout
    assert "repetition-penalty" in script
    assert "max-tokens" not in script  # which is hidden
    if shell != "bash":
        return
    (tmp_path / "fdq").write_text(script)
    asked = [("fdq", "ge"), ("fdq", "generate", "--max-n"), ("fdq", "--ver"), ("fdq", "chat", "x")]
    lines = [
        f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _fdq; "
        'echo "${COMPREPLY[*]}"'
        for words in asked
    ]
    command = ["bash", "--norc", "-c", "\n".join([f"source {tmp_path / 'fdq'}", *lines])]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert found.splitlines() == ["generate", "--max-new-tokens", "--version", ""]


def test_a_shell_that_is_not_known():
    assert "tcsh: expected one of bash, zsh, fish" in run("completion", "tcsh", code=2).stderr


def test_an_error_is_an_object_for_programs(tmp_path):
    for arguments in (("inspect", tmp_path / "absent"), ("plan", "ernie-4.5-0.3b", "-s", "W5")):
        result = run(*arguments, "--json", code=2)
        content = json.loads(result.stdout)
        assert content["exit_code"] == 2
        assert content["error"] in result.stderr
        assert result.stdout.count("\n") == 1  # as lines of chats and batches are


def test_a_defect_is_told_from_wrong_use_in_one_screen(original, monkeypatch):
    def broken(depth):
        return broken(depth - 1) if depth else {}["key"]

    monkeypatch.setattr(fdq_checkpoints, "inspect", lambda *_, **__: broken(50))
    result = run("inspect", original, code=3)
    last = result.stderr.splitlines()[-1]
    assert (
        last
        == "Error: a defect of fdq: KeyError: 'key'. Please report it, with what --debug shows."
    )
    assert len(result.stderr.splitlines()) < 20
    assert "Traceback" in (whole := run("inspect", original, "--debug", code=3).stderr)
    assert "fdq/cli/inspect.py" in whole
    assert "fdq/cli/inspect.py" not in result.stderr

    def full(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(fdq_checkpoints, "inspect", full)
    assert "Error: out of memory: RES" in run("inspect", original, code=2).stderr


def test_a_mixture_says_what_it_does_to_a_model_without_experts(original, tmp_path):
    output = run("convert", original, tmp_path / "mixed", "-s", "mix_quant").stdout
    assert "No tensor here is for the rule '*.experts'" in output
    assert "all that is quantized is W8A" in output


def test_plan_prints_a_table_and_json():
    arguments = ("plan", "ernie-4.5-0.3b", "--scheme", "W4A16C8", "--context", 1000)
    assert "dense mlp" in run(*arguments).stdout
    content = json.loads(run(*arguments, "--json").stdout)
    assert content["cache"]["format"] == "C8"
    assert content["remarks"] == []
    assert "quantized weights" in run(*arguments).stdout


def test_plan_remarks_on_more_tokens_than_the_model_has_positions():
    arguments = ("plan", "ernie-4.5-0.3b", "--scheme", "W4A16C8", "--context", 10_000_000)
    result = run(*arguments)
    assert "10,000,000 tokens are more than the 131,072 positions" in result.stderr
    (remark,) = json.loads(run(*arguments, "--json").stdout)["remarks"]
    assert remark in result.stderr


@pytest.mark.slow
def test_plan_of_devices_that_are_not_there(tmp_path):
    """A row for each scheme and GPU; half of the weights, and a picture where it is asked for."""
    arguments = ("plan", "ernie-4.5-0.3b", "-s", "W4A16C8", "--mesh", "tensor=2")
    whole = json.loads(run(*arguments[:4], "--json").stdout)
    (half,) = json.loads(run(*arguments, "--json").stdout)["plans"]
    assert 0.5 < half["weight_bytes"] / whole["weights"]["bytes"] < 0.51
    assert half["mesh"] == {"tensor": 2} and half["fits"] is None
    more = (*arguments, "-s", "W8A8C8", "--gpu", "l4", "--gpu", "H200")
    text = run(*more, "--plot", tmp_path / "plan.svg").stdout
    rows = [line.split()[:2] for line in text.splitlines() if "A" in line and "C8" in line]
    assert rows == [[gpu, s] for s in ("W4A16C8", "W8A8C8") for gpu in ("l4", "h200")]
    assert (tmp_path / "plan.svg").read_text("utf-8").count("<polyline") == 4
    assert "the longest: " in run(*arguments, "--gpu", "l4").stdout


def test_schemes_beside_may_be_repeated():
    assert html_page.schemes(["W4A16, W2A16", "W8A16"]) == ["W4A16", "W2A16", "W8A16"]
    assert html_page.schemes(None) == list(html_page.BESIDE) and html_page.schemes([""]) == []


_BOTH = ("--calibration", "{text}", "--calibration-text", "{text}")
WRONG = {
    "unknown scheme": (["convert", "{original}", "{new}", "-s", "W4A16C9"], "Did you mean"),
    "unknown scheme of plan": (["plan", "ernie-4.5-0.3b", "-s", "W5"], "Unknown"),
    "a mesh that does not divide": (
        ["plan", "ernie-4.5-0.3b", "-s", "W4", "--mesh", "tensor=3"],
        "over tensor=3 does not divide",
    ),
    "a mesh that is none": (["plan", "ernie-4.5-0.3b", "-s", "W4", "--mesh", "8"], "tensor=4"),
    "sequences that a mesh does not divide": (
        ["plan", "ernie-4.5-0.3b", "-s", "W4", "--mesh", "data=3", "--batch", "4", "--gpu", "l4"],
        "Decode 6 at once, or use 1 there and the other devices for another axis.\n",
    ),
    "an axis without rules": (
        ["plan", "ernie-4.5-0.3b", "-s", "W4", "--mesh", "tp=2"],
        "no rule uses the axis 'tp'",
    ),
    "an unknown GPU": (["plan", "ernie-4.5-0.3b", "-s", "W4", "--gpu", "h1000"], "'h100'"),
    "a plot of nothing": (["plan", "ernie-4.5-0.3b", "-s", "W4", "--plot", "{new}"], "--gpu h100"),
    "unknown model": (["plan", "ernie-4.5-0.3c", "-s", "W4"], "Did you mean 'ernie-4.5-0.3b'"),
    "destination exists": (["convert", "{original}", "{original}", "-s", "W4A16"], "exist"),
    "how to replace it": (["convert", "{original}", "{original}", "-s", "W4A16"], "--overwrite"),
    "unknown dtype": (["generate", "{original}", "-p", "a", "--dtype", "float12"], "float12"),
    "part of a name": (["plan", "ernie-4.5-300b", "-s", "W4"], "mean 'ernie-4.5-300b-a47b'"),
    "missing source": (["convert", "{new}", "{new}2", "-s", "W4A16"], "does not exist"),
    "not a checkpoint": (["inspect", "{empty}"], "config.json"),
    "a file": (["generate", "{text}", "-p", "a"], "is a file"),
    "missing directory": (["evaluate", "{new}"], "does not exist"),
    "empty text": (["evaluate", "{original}", "--text", "{blank}"], "empty"),
    "binary text": (["evaluate", "{original}", "--text", "{binary}"], "not UTF-8"),
    "static scheme": (
        ["convert", "{original}", "{new}", "-s", "W8A8-static"],
        "--calibration-text",
    ),
    "no calibration": (
        ["convert", "{original}", "{new}", "-s", "W8A8-static", "--calibration", "{text}"],
        "text.txt: not a calibration",
    ),
    "two calibrations": (
        ["convert", "{original}", "{new}", "-s", "W4", *_BOTH],
        "drop one",
    ),
    "missing text": (["evaluate", "{original}", "--text", "{new}"], "No such file"),
    "prompt longer than the cache": (
        ["generate", "{original}", "-p", "a" * 50, "--context", "8"],
        "do not fit",
    ),
    "empty prompt with top-k only": (
        ["generate", "{original}", "-p", "a", "--top-k", "5"],
        "--temp",
    ),
    "bad probability": (
        ["generate", "{original}", "-p", "a", "--temperature", "1", "--top-p", "2"],
        "top_p",
    ),
    "quantized already": (["convert", "{converted}", "{new}", "-s", "W4A16"], "quantized already"),
    "group does not divide": (["convert", "{original}", "{new}", "-s", "W4A16-g96"], "96"),
    "scheme file is no JSON": (["convert", "{original}", "{new}", "-s", "{bad_json}"], "JSON"),
    "scheme file is missing": (["convert", "{original}", "{new}", "-s", "{new}.json"], "No such"),
    "unknown key": (["convert", "{original}", "{new}", "-s", "{unknown_key}"], "surprise"),
    "int4": (["convert", "{original}", "{new}", "-s", "int4"], "Did you mean 'wint4'?"),
    "another word for new tokens": (
        ["generate", "{original}", "-p", "a", "--max-tokens", "8"],
        "--max-new-tokens 8",
    ),
    "empty standard input": (["generate", "{original}", "-p", "-"], "which is empty: pipe a text"),
    "no model to chat with": (["chat", "{empty}"], "no config.json (nor fdq.json)"),
    "no model to evaluate": (["evaluate", "{empty}"], "no config.json (nor fdq.json)"),
    "no prompt at all": (["generate", "{original}"], "or give --prompt TEXT"),
    "another tokenizer": (
        ["evaluate", "{original}", "--text", "{text}", "--against", "{stranger}"],
        "differ in 2 tokens: 'a' is ",
    ),
    "a prompt without a tokenizer": (
        ["generate", str(ROOT / "tests" / "oracles" / "models" / "llama"), "-p", "a"],
        "no tokenizer.json, which a prompt needs. Put that of the original",
    ),
    "unknown cache": (["evaluate", "{original}", "--cache", "C5"], "C5"),
    "two sizes": (["recommend", "{original}", "--bits", "3", "--memory", "1"], "drop one"),
    "codes of another kind": (
        ["heal", "{original}", "{new}", "--teacher", "{original}", "--codes", "some"],
        "expected fixed or free",
    ),
    "report in no folder": (["evaluate", "{original}", "--html", "{new}/a.html"], "no folder"),
    "report beside static scales": (
        ["evaluate", "{original}", "--html", "{empty}/a.html", "--beside", "W8A8-static"],
        "W8A8-static has static scales",
    ),
    "curve of another kind": (
        ["heal", "{original}", "{new}", "--teacher", "{original}", "--plot", "{empty}/a.png"],
        "--plot {empty}/a.png: expected a name that ends with .svg",
    ),
    "too little to heal on": (
        ["heal", "{original}", "{new}", "--teacher", "{original}", "--text", "{blank}"],
        "empty; healing needs text",
    ),
    "recipe in no folder": (["recommend", "{original}", "--out", "{new}/a.json"], "no folder"),
    "bits that are no number": (["recommend", "{original}", "--bits", "inf"], "a number of bits"),
    "memory that is no number": (["recommend", "{original}", "--memory", "nan"], "positive number"),
    "no text to measure on": (["recommend", "{original}", "--text", "{binary}"], "not UTF-8 text"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_one_clear_line_and_code_2(case, original, converted, stranger, tmp_path):
    names = {"original": original, "converted": converted, "new": tmp_path / "new"}
    names["stranger"] = stranger
    names |= {"empty": tmp_path / "empty", "text": tmp_path / "text.txt"}
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text(TEXT)
    for name, data in (
        ("blank", b" \n"),
        ("binary", b"\xff\xfe\x00"),
        ("bad_json", b"{"),
        ("unknown_key", b'{"quantization": "mix_quant", "surprise": 1}'),
    ):
        names[name] = tmp_path / f"{name}.json"
        names[name].write_bytes(data)
    arguments, message = WRONG[case]
    result = run(*(a.format(**names) for a in arguments), code=2)
    assert message.replace("{empty}", str(names["empty"])) in result.stderr
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.output
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob("new.*tmp*"))


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    arguments = ("inspect", tmp_path / "absent")
    assert "Traceback" in run(*arguments, "--debug", code=2).stderr
    monkeypatch.setenv("FDQ_DEBUG", "1")
    assert "Traceback" in run(*arguments, code=2).stderr


def test_interrupt_is_quiet(original, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(fdq_checkpoints, "load", interrupted)
    result = run("generate", original, "-p", "a", code=130)
    assert result.stderr.strip() == "Interrupted."


def test_missing_extra_is_named(monkeypatch, capsys):
    for name in list(sys.modules):
        if name.startswith("fdq.cli.") or name.split(".")[0] == "typer":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as error:
        fdq.cli.main()
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert "pip install tokenizers typer rich" in message
    assert "pip install -e '.[cli]'" in message


@pytest.mark.slow
def test_in_a_process_of_its_own(converted):
    environment = os.environ | {"NO_COLOR": "1", "COLUMNS": "200", "FDQ_CACHE_DIR": ""}

    def process(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "fdq.cli", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
            check=False,
        )

    good = process("inspect", converted, "--verify")
    assert (good.returncode, good.stderr) == (0, "")
    assert "checksums verified" in good.stdout
    bad = process("convert", converted, "elsewhere", "--scheme", "W4A16C9")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert len(bad.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (123_456, "123 kB"),
        (999_900, "1.00 MB"),
        (8_810_000, "8.81 MB"),
        (5e12, "5.00 TB"),
        (5e15, "5000 TB"),
    ],
)
def test_sizes_have_three_digits(count, text):
    assert size(count) == text


@pytest.mark.slow
@pytest.mark.longest  # `.ci/run` runs the demo, too
def test_demo_converts_decodes_and_compares(tmp_path):
    out = tmp_path / "kept"
    arguments = ("demo", "-s", "W8A16C8", "--text-bytes", 2048, "--out", out, "--json")
    content = json.loads(run(*arguments).stdout)
    original, w8 = content["rows"]
    assert original["name"] == "original"
    assert w8["report"]["kl_nats_per_token"] < 0.002
    assert np.isclose(
        w8["report"]["bits_per_byte"], original["report"]["bits_per_byte"], atol=0.005
    )
    assert "tokens_per_second" not in w8  # of so small a model it would say nothing
    assert [path.name for path in out.iterdir()] == ["W8A16C8"]
    assert "exists" in run(*arguments, code=2).stderr
