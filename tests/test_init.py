"""`tierkv init`: a file that loads and fits the machine, and lines that work as printed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from tierkv import cli
from tierkv.config import load_config
from tierkv.core.errors import ConfigError
from tierkv.core.geometry import GIB, MIB, Form
from tierkv.setups import SETUPS
from tierkv.setups.base import EngineSetup, Start, options_of, shell
from tierkv.setups.machine import Room, dram_share, nvme_share, room_for
from tierkv.setups.models import ModelFacts, model_facts

ENGINES = ["vllm", "sglang", "lmcache", "transformers"]
ROOT = Path(__file__).resolve().parent.parent


class Done:
    """What a run of the command left behind."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err


Init: TypeAlias = Callable[..., Done]


@pytest.fixture
def init(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Init:
    def run(place: Path, *arguments: str) -> Done:
        monkeypatch.chdir(place)
        monkeypatch.setenv("HF_HOME", str(place))
        monkeypatch.setattr(sys, "argv", ["tierkv", "init", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        code = caught.value.code
        return Done(code if isinstance(code, int) else int(code is not None), out, err)

    return run


def room(**sizes: int) -> Room:
    usual = {"ram": 64 * GIB, "ram_available": 40 * GIB, "disk": 900 * GIB, "disk_free": 500 * GIB}
    return Room(**usual | sizes, directory=Path("kv"))


def setup_of(name: str) -> EngineSetup:
    setup: EngineSetup = SETUPS.load(name)()
    return setup


# ---- the file


def test_every_engine_has_a_setup_of_its_own_name() -> None:
    assert SETUPS.names() == ENGINES
    assert [setup_of(name).name for name in SETUPS] == ENGINES


@pytest.mark.parametrize("engine", ENGINES)
def test_the_file_loads_and_says_what_was_asked_for(
    init: Init, tmp_path: Path, engine: str
) -> None:
    done = init(tmp_path, "--engine", engine, "--model", "llama-3-8b", "--dram", "1GiB",
                "--nvme", "2GiB")  # fmt: skip
    assert done.code == 0, done.err
    config = load_config(tmp_path / "tierkv.yaml")
    assert config.tiers.host.capacity == (256 * MIB if engine == "lmcache" else GIB)
    assert config.tiers.cold.capacity == 2 * GIB
    assert config.tiers.cold.directory == tmp_path / "kv"
    assert config.tiers.device.capacity == 0
    text = (tmp_path / "tierkv.yaml").read_text()
    assert max(map(len, text.splitlines())) <= 110
    assert "131,072 bytes" in text
    host = "2,048" if engine == "lmcache" else "8,192"
    assert f"= {host} tokens" in text


def test_every_key_of_the_file_is_explained(init: Init, tmp_path: Path) -> None:
    assert init(tmp_path, "--engine", "transformers", "--model", "gpt2", "--hbm", "1GiB").code == 0
    lines = (tmp_path / "tierkv.yaml").read_text().splitlines()
    for number, line in enumerate(lines):
        key, before = line.strip().partition(":")[0], lines[number - 1].strip()
        if not line or line.lstrip().startswith("#"):
            continue
        # Of what is explained where it first stands, and of what its section explains.
        if key not in ("tiers", "transfer", "policy", "default", "salt"):
            assert before.startswith("#") or before == "device:", line


def test_sizes_that_were_not_said_are_a_share_of_the_machine(init: Init, tmp_path: Path) -> None:
    done = init(tmp_path, "--engine", "vllm", "--model", "somebody/unknown")
    assert done.code == 0, done.err
    config, found = load_config(tmp_path / "tierkv.yaml"), room_for(tmp_path)
    assert 0 < config.tiers.host.capacity < found.ram
    assert 0 <= config.tiers.cold.capacity < found.disk
    text = (tmp_path / "tierkv.yaml").read_text()
    assert "available now" in text
    assert "shape is not known" in text


def test_a_file_is_not_overwritten_unless_by_force(init: Init, tmp_path: Path) -> None:
    asked = ("--engine", "vllm", "--model", "gpt2", "--nvme", "0", "--dram", "64MiB")
    (tmp_path / "tierkv.yaml").write_text("mine")
    done = init(tmp_path, *asked)
    assert (done.code, done.out) == (2, "")
    assert "--force" in done.err
    assert (tmp_path / "tierkv.yaml").read_text() == "mine"
    assert init(tmp_path, *asked, "--force").code == 0
    assert load_config(tmp_path / "tierkv.yaml").tiers.cold.capacity == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "vlm", "--model", "gpt2"], "did you mean 'vllm'?"),
        (["--engine", "vllm", "--model", "gpt2", "--dram", "900TiB"], "of this machine"),
        (["--engine", "vllm", "--model", "gpt2", "--dram", "64G"], "did you mean GiB"),
        (["--engine", "vllm", "--model", "gpt2", "--dram", "0"], "64MiB"),
        (["--engine", "vllm", "--model", "gpt2", "--dram", "1MiB"], "at least"),
        (["--engine", "vllm", "--model", "gpt2", "--nvme", "90000TiB"], "larger disk"),
        (["--engine", "vllm", "--model", "gpt2", "--hbm", "1GiB"], "leave --hbm out"),
        (["--engine", "transformers", "--model", "gpt2", "--hbm", "10%"], "no meaning here"),
        (["--engine", "lmcache", "--model", "gpt2", "--dram", "200MiB"], "1024MiB"),
        (["--engine", "vllm", "--model", "."], "no config.json"),
        (["--engine", "vllm", "--model", "gpt2", "--directory", "file/kv"], "not a directory"),
        (["--engine", "vllm", "--model", "gpt2", "--out", "no/where.yaml"], "--out"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_cure(
    init: Init, tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "file").write_text("")
    done = init(tmp_path, *arguments)
    assert (done.code, done.out) == (2, "")
    assert words in done.err
    assert not (tmp_path / "tierkv.yaml").exists()


@pytest.mark.parametrize("name", ["with space", "a: b", "quote'd", 'double"', "ünï"])
def test_odd_directories_and_models_come_through(init: Init, tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    place.mkdir()
    (place / "config.json").write_text("{}")
    done = init(place, "--engine", "vllm", "--model", str(place), "--directory", f"{name}/kv",
                "--dram", "64MiB", "--nvme", "1GiB")  # fmt: skip
    assert done.code == 0, done.err
    assert load_config(place / "tierkv.yaml").tiers.cold.directory == place / name / "kv"
    words = shlex.split(done.out, comments=True)
    assert words[2] == str(place)
    transfer = json.loads(words[words.index("--kv-transfer-config") + 1])
    assert transfer["kv_connector_extra_config"] == {"config": str(place / "tierkv.yaml")}


# ---- the machine


def test_a_share_of_memory_and_disk_is_what_is_free_by_half() -> None:
    share, warnings = dram_share(None, room())
    assert (share.text, warnings) == ("20GiB", [])
    assert "40 GiB available" in share.why
    share, warnings = nvme_share(None, room())
    assert (share.text, warnings) == ("250GiB", [])
    assert dram_share(None, room(ram_available=3 * GIB))[0].text == "1536MiB"
    assert dram_share("25%", room())[0].text == "16GiB"


def test_a_full_disk_gets_no_cold_tier_and_a_warning() -> None:
    share, warnings = nvme_share(None, room(disk_free=3 * GIB))
    assert share.size == 0
    assert "--directory" in warnings[0]


def test_more_than_is_free_now_is_a_warning_and_more_than_there_is_an_error() -> None:
    (_, memory), (_, disk) = dram_share("50GiB", room()), nvme_share("600GiB", room())
    assert "40 GiB" in memory[0]
    assert "until the disk is full" in disk[0]
    for refused in (lambda: dram_share("65GiB", room()), lambda: nvme_share("1TiB", room())):
        with pytest.raises(ConfigError, match="is more than the"):
            refused()


# ---- models


def checkpoint(place: Path, **settings: object) -> ModelFacts:
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps(settings))
    return model_facts(str(place))


def test_a_checkpoint_says_its_own_shape(tmp_path: Path) -> None:
    plain = {"num_hidden_layers": 30, "num_attention_heads": 9, "hidden_size": 576}
    facts = checkpoint(tmp_path, **plain, num_key_value_heads=3, torch_dtype="bfloat16")
    assert facts.geometry is not None
    assert facts.geometry.token_bytes == 23_040
    assert facts.for_engine == str(tmp_path)
    latent = checkpoint(tmp_path, **plain, kv_lora_rank=512, qk_rope_head_dim=64, dtype="float16")
    assert latent.geometry is not None
    assert (latent.geometry.form, latent.geometry.head_dim) == (Form.LATENT, 576)
    nested = checkpoint(tmp_path, text_config={**plain, "dtype": "float32"})
    assert nested.geometry is not None
    assert nested.geometry.kv_heads == 9


@pytest.mark.parametrize(
    ("settings", "words", "has_state"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention", False),
        ({"layer_types": ["full_attention"] * 2}, "", False),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention", True),
        ({"sliding_window": 4096}, "4096 tokens", False),
        ({"sliding_window": 4096, "use_sliding_window": False}, "", False),
        ({"sliding_window": None}, "", False),
        ({"mamba_d_state": 16}, "a state", True),
    ],
)
def test_layers_that_are_not_full_attention_are_found(
    tmp_path: Path, settings: dict[str, object], words: str, has_state: bool
) -> None:
    facts = checkpoint(tmp_path, **settings)
    assert words in facts.odd_layers
    assert bool(facts.odd_layers) == bool(words)
    assert facts.has_state_layers == has_state


@pytest.mark.parametrize("text", ["", "[]", '{"num_hidden_layers": ', "\udcff"])
def test_a_broken_description_of_a_model_is_a_message(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"--model: .*config"):
        model_facts(str(tmp_path))


def test_a_shape_that_makes_no_sense_is_not_known(tmp_path: Path) -> None:
    for odd in (True, -1, 1 << 40, "30", 0):
        assert checkpoint(tmp_path, num_hidden_layers=odd, num_attention_heads=9).geometry is None


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", True),
        ("Qwen/Qwen3-8B", True),
        ("mistralai/Mistral-7B-v0.1", True),
        ("openai-community/gpt2-xl", False),
        ("deepseek-ai/DeepSeek-V3.2", False),
        ("somebody/else", False),
    ],
)
def test_a_hub_id_is_known_by_its_name_only_where_the_shape_is_the_same(
    name: str, known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    facts = model_facts(name)
    assert (facts.geometry is not None) == known
    assert facts.for_engine == name


def test_what_the_hub_client_keeps_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    place = tmp_path / "hub/models--a--b/snapshots/123"
    place.mkdir(parents=True)
    checkpoint(place, num_hidden_layers=2, num_attention_heads=4, hidden_size=64)
    facts = model_facts("a/b")
    assert facts.geometry is not None
    assert (facts.for_engine, facts.geometry.layers) == ("a/b", 2)


# ---- the lines


def commands(engine: str, config: str = "/etc/a 'b'.yaml") -> list[list[str]]:
    lines = setup_of(engine).start_lines(Start("org/model", Path(config), 3 * GIB))
    return [shlex.split(line) for line in lines if not line.startswith("#")]


def test_the_json_of_every_command_line_survives_the_shell(tmp_path: Path) -> None:
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    for engine in ("vllm", "sglang", "lmcache"):
        for words in commands(engine):
            # As bash itself splits it, too.
            line = shell(words)
            printed = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], check=True,
                                     capture_output=True, text=True).stdout  # fmt: skip
            assert printed.split("\0")[:-1] == words
            assert all(json.loads(word) for word in words if word.startswith("{"))


def test_vllm_is_told_of_the_connector() -> None:
    ((*start, transfer),) = commands("vllm")
    assert start == ["vllm", "serve", "org/model", "--kv-transfer-config"]
    assert json.loads(transfer) == {
        "kv_connector": "TierKVConnector",
        "kv_connector_module_path": "tierkv.engines.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"config": "/etc/a 'b'.yaml"},
    }


def test_sglang_is_told_of_the_storage() -> None:
    (words,) = commands("sglang")
    options = options_of(shell(words))
    assert words[:3] == ["python", "-m", "sglang.launch_server"]
    assert options["hicache-storage-backend"] == "dynamic"
    assert json.loads(options["hicache-storage-backend-extra-config"]) == {
        "backend_name": "tierkv",
        "module_path": "tierkv.engines.sglang",
        "class_name": "TierKVStorage",
        "interface_v1": 1,
        "config": "/etc/a 'b'.yaml",
    }


def test_lmcache_is_told_of_the_adapter_and_vllm_of_lmcache() -> None:
    server, client = commands("lmcache")
    assert server[:2] == ["lmcache", "server"]
    options = options_of(shell(server))
    assert options["l1-size-gb"] == "3.00"
    assert json.loads(options["l2-adapter"]) == {
        "type": "plugin",
        "module_path": "tierkv.engines.lmcache",
        "class_name": "TierKVL2Adapter",
        "adapter_params": {"config": "/etc/a 'b'.yaml"},
    }
    transfer = json.loads(client[-1])
    assert transfer["kv_connector"] == "LMCacheMPConnector"
    assert str(transfer["kv_connector_extra_config"]["lmcache.mp.port"]) == options["port"]


def test_options_are_read_as_bash_reads_them() -> None:
    found = options_of("serve m --block-size 32 --flag --hash_algo=sha256 --json '{\"a\": 1}'")
    assert found == {"block-size": "32", "flag": "", "hash-algo": "sha256", "json": '{"a": 1}'}
    with pytest.raises(ConfigError, match="--arguments"):
        options_of("--a 'b")


def test_the_program_for_transformers_runs_as_it_is_printed(init: Init, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    place = tmp_path / "tiny model"
    text = "A long document, and a question about it."
    vocabulary = {word: number for number, word in enumerate(["?", *text.split()])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(place)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(place)

    done = init(tmp_path, "--engine", "transformers", "--model", str(place), "--dram", "64MiB",
                "--nvme", "1GiB")  # fmt: skip
    assert done.code == 0, done.err
    assert "256 bytes, by its config.json" in (tmp_path / "tierkv.yaml").read_text()
    # Prompts of eight words need blocks of four to be stored at all.
    file = tmp_path / "tierkv.yaml"
    file.write_text(file.read_text().replace("block_tokens: 16", "block_tokens: 4"))
    (tmp_path / "program.py").write_text(done.out)
    for number in range(2):
        ran = subprocess.run(
            [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        report = ran.stdout.splitlines()[-1]
        assert report.startswith("reused 0 of 8 tokens") or number, report
        # The second process finds on the disk what the first has left, and may find it too short.
        found = "nvme 4" in report or "4 stored ones" in report
        assert found == bool(number), report
