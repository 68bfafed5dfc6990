"""`hf://`: what is fetched, what a cut costs, what is refused; by a server that runs here."""

import json
import shutil
import sys

import numpy as np
import pytest

import fdq_checkpoints
from fdq_checkpoints import CheckpointError
from fdq_checkpoints.readers import hub as hub_reader
from fdq_checkpoints.readers import hub_files
from fdq_checkpoints.readers.hub import Address
from fdq_checkpoints.readers.local_directory import local_directory
from tests.checkpoints import builders, hub_server
from tests.checkpoints.test_names import leaves
from tests.cli.command import run

constants = pytest.importorskip("huggingface_hub.constants")
ADDRESS = "hf://owner/name"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A small model in two shards, with its index, and much that is not needed beside it."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    builders.shard(folder, builders.model("qwen3", folder))
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "README.md", "onnx/model.onnx"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x" * 100)
    return folder


@pytest.fixture
def hub(original, tmp_path, monkeypatch):
    folder = shutil.copytree(original, tmp_path / "served")
    with hub_server.serving(folder) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.address)
        pattern = running.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", pattern)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
        hub_reader.fetch.cache_clear()
        yield running
        hub_reader.fetch.cache_clear()


NEEDED = {
    "config.json",
    "generation_config.json",
    "additional_chat_templates/tool_use.jinja",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
}


def test_a_model_is_loaded_with_only_the_files_that_it_needs(hub, original):
    loaded = fdq_checkpoints.load(ADDRESS)
    here = fdq_checkpoints.load(original)
    assert set(hub.fetched()) == NEEDED
    assert loaded.config == here.config
    assert loaded.config.eos_token_ids[-2:] == (7, 9)
    assert all(map(np.array_equal, leaves(loaded).values(), leaves(here).values()))
    count = len(hub.requests)
    hub_reader.fetch.cache_clear()
    folder = local_directory("hf://owner/name@v1")
    assert folder.name == hub_server.COMMIT
    # It is there: the list is asked for, and which commit the tag is.
    assert not [r for r in hub.requests[count:] if r[0] == "GET" and "/resolve/" in r[1]]


@pytest.mark.slow
def test_convert_keeps_what_is_beside_the_weights(hub, tmp_path):
    result = run("convert", ADDRESS, tmp_path / "w8", "--scheme", "W8A16", "--json")
    assert json.loads(result.stdout)["source"] == ADDRESS
    kept = {p.relative_to(tmp_path / "w8").as_posix() for p in (tmp_path / "w8").rglob("*.j*")}
    assert {"generation_config.json", "additional_chat_templates/tool_use.jinja"} <= kept
    manifest = json.loads((tmp_path / "w8" / "fdq.json").read_text())
    assert manifest["provenance"]["source"] == f"{ADDRESS}@{hub_server.COMMIT}"
    assert "checksums verified" in run("inspect", tmp_path / "w8", "--verify").stdout


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors"])
def test_a_cut_is_gone_on_with(hub, original, name, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cut.add(name)
    folder = local_directory(ADDRESS)
    size = (original / name).stat().st_size
    assert hub.ranges(name) == [None, f"bytes={size // 2 // 1000 * 1000}-"]
    assert (folder / name).read_bytes() == (original / name).read_bytes()


def test_what_another_process_has_begun_is_gone_on_with(hub, original, monkeypatch, tmp_path):
    from huggingface_hub import file_download

    name = "model-00002-of-00002.safetensors"
    usual = file_download.http_get

    def killed(url, file, **options):
        if not url.endswith(name):
            return usual(url, file, **options)
        file.write((original / name).read_bytes()[:1000])
        raise KeyboardInterrupt

    monkeypatch.setattr(file_download, "http_get", killed)
    with pytest.raises(KeyboardInterrupt):
        local_directory(ADDRESS)
    monkeypatch.setattr(file_download, "http_get", usual)
    first = set(hub.fetched())
    hub.requests.clear()
    folder = local_directory(ADDRESS)
    assert hub.fetched() == [name]
    assert first | {name} == NEEDED
    assert hub.ranges(name) == ["bytes=1000-"]
    assert (folder / name).read_bytes() == (original / name).read_bytes()
    assert not list((tmp_path / "cache").rglob("*.fdq-partial*"))


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json"])
def test_another_content_than_the_hash_says_is_refused(hub, name, tmp_path):
    hub.wrong.add(name)
    with pytest.raises(CheckpointError, match=f"{name} is not what the hub says: its hash is"):
        local_directory(ADDRESS)
    assert not list((tmp_path / "cache").rglob(name))
    hub.wrong.clear()
    assert (local_directory(ADDRESS) / name).is_file()


REFUSALS = {
    "gated": (ADDRESS, (403, "GatedRepo"), PermissionError, "a gated model. Accept its terms on "),
    "no repository": ("hf://owner/other", None, FileNotFoundError, "no such model on the hub, or "),
    "private": (ADDRESS, (401, "RepoNotFound"), FileNotFoundError, "log in with `hf auth login`"),
    "no revision": (
        "hf://owner/name@v9", None, FileNotFoundError, "the model has no revision 'v9'",
    ),
    "no file": (
        "hf://owner/name/q4.gguf", None, FileNotFoundError, "no such file in the repository",
    ),
    "down": (ADDRESS, (500, "Broken"), ConnectionError, "the hub answers: .*500"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_explained(hub, case, monkeypatch):
    address, hub.refusal, kind, said = REFUSALS[case]
    with pytest.raises(kind, match=said) as raised:
        local_directory(address)
    assert str(raised.value).startswith(address)
    assert "\n" not in str(raised.value)


def test_without_a_network_the_cache_serves(hub, monkeypatch):
    folder = local_directory(ADDRESS)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_reader.fetch.cache_clear()
    hub.requests.clear()
    assert local_directory(ADDRESS) == folder
    assert not hub.requests
    for name in ("hf://owner/name@v1", "hf://owner/other"):
        with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set, and the cache does not"):
            local_directory(name)
    (folder / "model-00002-of-00002.safetensors").unlink()
    hub_reader.fetch.cache_clear()
    with pytest.raises(ConnectionError, match="the cache does not have all of it"):
        local_directory(ADDRESS)


def test_without_a_network_the_cache_serves_gguf(hub, tmp_path, monkeypatch):
    """Of a repository of GGUF, by its name and by the file's, while all parts are there."""
    shutil.rmtree(tmp_path / "served")
    (tmp_path / "served").mkdir()
    for part in (1, 2):
        (tmp_path / "served" / f"m-0000{part}-of-00002.gguf").write_bytes(b"GGUF%d" % part)
    first = local_directory(ADDRESS)
    assert first.name == "m-00001-of-00002.gguf"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for address in (ADDRESS, f"{ADDRESS}/{first.name}"):
        hub_reader.fetch.cache_clear()
        assert local_directory(address) == first
    (first.parent / "m-00002-of-00002.gguf").unlink()
    for address in (ADDRESS, f"{ADDRESS}/{first.name}"):
        hub_reader.fetch.cache_clear()
        with pytest.raises(ConnectionError, match="the cache does not have all of it"):
            local_directory(address)


def test_files_beside_a_model_are_bounded_in_number():
    """However many a repository has; those that are known by name are among them."""
    many = [f"a{i:04}.json" for i in range(1000)]
    many += [f"additional_chat_templates/a{i:04}.jinja" for i in range(1000)]
    names = of("tokenizer.json", "config.json", "model.safetensors", *many)
    assert {"tokenizer.json", "config.json", "model.safetensors"} <= set(names)
    assert len(names) < 400


def test_a_command_says_it_in_a_line(hub):
    hub.refusal = (403, "GatedRepo")
    for command in ("inspect", "generate", "evaluate", "chat"):
        result = run(command, ADDRESS, code=2, stdin="a")
        assert "a gated model" in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_addresses():
    assert Address.parse("hf:/owner/name") == Address.parse(ADDRESS) == Address("owner/name")
    assert Address.parse("hf://owner/name@refs/pr/3") == Address("owner/name", "refs/pr/3")
    found = Address.parse("hf://o.x/n-1@v1.0/sub/m-Q4.gguf")
    assert found == Address("o.x/n-1", "v1.0", "sub/m-Q4.gguf")
    assert str(found) == "hf://o.x/n-1@v1.0/sub/m-Q4.gguf"
    assert Address.parse("owner/name") is None
    for text in (
        "hf:",
        "hf://owner",
        "hf://owner/name/config.json",
        "hf://../name",
        "hf://a/b/../c.gguf",
    ):
        with pytest.raises(CheckpointError, match="expected hf://owner/name"):
            Address.parse(text)


def of(*names, file=None, index=None, tmp_path=None):
    sizes = dict.fromkeys(names, 10)
    return hub_files.needed(ADDRESS, names, file, sizes, lambda name: tmp_path / name)


def test_which_files_are_needed(tmp_path):
    assert of("config.json", "model.safetensors", "model.fp16.safetensors", "tf_model.h5") == [
        "config.json", "model.safetensors",
    ]  # fmt: skip
    assert of("a.Q4.gguf", "mmproj-a.gguf", "README.md") == ["a.Q4.gguf"]
    parts = [f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    assert of(*reversed(parts)) == parts
    assert of("a.gguf", "b.gguf", file="b.gguf") == ["b.gguf"]
    assert of("README.md", "weights/d/1", "fdq.json", ".gitattributes") == [
        "fdq.json",
        "weights/d/1",
    ]
    with pytest.raises(CheckpointError, match=r"2 models in GGUF: a\.gguf, b\.gguf. Name one"):
        of("a.gguf", "b.gguf")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        of("config.json", "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no weights that fdq reads; it has config.json"):
        of("config.json")


def test_names_that_lead_elsewhere_are_not_fetched():
    assert not any(map(hub_reader._is_plain, ("../a", "a/../b", "/etc/a", "a\\b", "a//b")))
    assert hub_reader._is_plain("a/b.json")


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    hub_reader.fetch.cache_clear()
    with pytest.raises(ModuleNotFoundError, match="pip install huggingface_hub"):
        local_directory(ADDRESS)
