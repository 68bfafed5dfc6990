"""The `fdq` command, in process: what it prints, its JSON, its errors and exit codes."""

import hashlib
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fdq.cli
import fdq_checkpoints
from fdq.analysis.shipped_model import shipped_model_path
from fdq.cache import CACHE_FORMATS
from fdq.cli import html_page
from fdq.cli.console import size
from fdq.models import CONFIGS, FAMILIES
from tests.checkpoints import foreign
from tests.cli.command import ROOT, TEXT, run

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
