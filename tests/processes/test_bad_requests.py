"""Commands answer conversations and prompts that cannot be served with one sentence.

The tiny model only generates its end token, its chat template refuses an assistant's turn without
text, and its tokenizer knows a token for which the model has no embedding.
"""

import json
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowspec.cli.chat import ChatOptions, chat_loop
from flowspec.cli.main import main
from flowspec.engine.remote import RemoteEngine
from flowspec.transport.secure.token import derive_keys
from tests.support.devices import Processes, two_devices

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' and m['content'] == '' %}"
    "{{ raise_exception('an assistant turn has no text') }}"
    "{% endif %}"
    "{% if 'forbidden' in m['content'] %}{{ raise_exception('a forbidden word') }}{% endif %}"
    "{{ m['content'] }}{% endfor %}"
)
QUESTION = {"question_id": 1, "turns": ["a fox", "and a dog"]}


@pytest.fixture(scope="module")
def refusing(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make `target/`, `eagle/` and `data/`."""
    folder = tmp_path_factory.mktemp("refusing")
    for part in ("target", "eagle"):
        shutil.copytree(checkpoint / part, folder / part)
    target = folder / "target"
    weights = load_file(target / "model.safetensors")
    weights["lm_head.weight"] = torch.zeros_like(weights["lm_head.weight"])  # token 0 is the first
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "eos_token_id": 0}))
    words = json.loads((target / "tokenizer_config.json").read_text())
    words |= {"eos_token": "<s>", "chat_template": TEMPLATE}
    (target / "tokenizer_config.json").write_text(json.dumps(words))
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    last = max(token["id"] for token in tokenizer["added_tokens"])
    own = {**next(t for t in tokenizer["added_tokens"] if t["id"] == last)}
    size = len(tokenizer["model"]["vocab"])
    assert size == config["vocab_size"]
    tokenizer["added_tokens"].append({**own, "id": size, "content": "[PAD]", "special": True})
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "data" / "mt_bench").mkdir(parents=True)
    (folder / "data" / "mt_bench" / "question.jsonl").write_text(json.dumps(QUESTION))
    return folder


@pytest.fixture(scope="module")
def cluster(refusing: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Start a head and the two devices that it needs."""
    with two_devices(tmp_path_factory.mktemp("bad"), refusing) as processes:
        yield processes


@pytest.fixture
def client(cluster: Processes) -> Iterator[RemoteEngine]:
    """Return a connection."""
    with RemoteEngine("127.0.0.1", cluster.port, derive_keys(cluster.token)) as one:
        yield one


def check_serves(cluster: Processes, client: RemoteEngine) -> None:
    """Check that the first epoch still serves and no device was lost."""
    status = client.cluster_status()
    assert status.epoch == 1
    assert not [one for one in status.devices if one.state == "lost"]
    assert all(process.is_alive() for name, process in cluster.running.items() if "ask" not in name)
    assert "Traceback" not in cluster.log("head") + cluster.log("ada") + cluster.log("bob")


def test_a_conversation_that_the_template_refuses_ends_nothing_else(cluster, client, capsys):
    """The second line follows an answer without text; a new conversation is answered."""
    lines = iter(["a fox", "and a dog", "/new", "a fox", "[PAD]", "/quit"])
    chat_loop(client, ChatOptions(max_new_tokens=4), read=lambda prompt: next(lines))
    said = capsys.readouterr().err
    assert said.count("[stop, 1 tokens") == 2
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert all("an assistant turn has no text" in line for line in errors)
    check_serves(cluster, client)


@pytest.mark.parametrize(
    ("prompt", "said", "code"),
    [
        ("[PAD]", "the prompt has the token '[PAD]' (id 300), the model's vocabulary has 300", 2),
        ("forbidden", "a forbidden word", 2),
        ("a fox " * 9000, "tokens, the context holds 600; shorten the prompt", 2),
        ("a fox", "[stop, 1 tokens", 0),
    ],
)
def test_generate_says_why_and_the_cluster_goes_on(cluster, client, prompt, said, code):
    """It prints one line with a user error's exit code, and no device is affected."""
    name = f"ask {prompt[:9]} {len(prompt)}"
    cluster.start(name, "generate", "--head", f"127.0.0.1:{cluster.port}", prompt)
    process = cluster.running[name]
    process.join(timeout=60)
    assert process.exitcode == code
    (line,) = cluster.log(name).strip().splitlines()
    assert said in line
    assert line.startswith("error: ") == bool(code)
    check_serves(cluster, client)


COMMANDS = {
    "run": ("run", "--model", "{target}", "--drafter", "ngram", "--stages", "2", "--prompt"),
    "verify": (
        "verify",
        "{target}",
        "--drafters",
        "ngram",
        "--stages",
        "2",
        "--prompts",
    ),
}


def ends(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Return the exit code and the lines on stderr."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # pytest keeps its own
    monkeypatch.setattr(sys, "argv", ["flowspec", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, capsys.readouterr().err.strip().splitlines()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("prompt", "said"),
    [("[PAD] please", "'[PAD]' (id 300)"), ("forbidden", "a forbidden word")],
)
def test_a_prompt_that_cannot_be_served_is_one_sentence(
    command, prompt, said, refusing, tmp_path, monkeypatch, capsys
):
    """The error comes before any process starts; nothing is restarted or repeated."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text(prompt)
    words = [word.format(target=refusing / "target") for word in COMMANDS[command]]
    code, lines = ends([*words, prompt if command == "run" else "prompts.txt"], monkeypatch, capsys)
    assert code == 2
    assert said in lines[-1]
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in "".join(lines)


def test_a_benchmark_leaves_out_a_second_turn_that_is_refused(
    refusing, tmp_path, monkeypatch, capsys
):
    """The first turn's answer has no text."""
    monkeypatch.chdir(tmp_path)
    words = ["bench", "--model", str(refusing / "target"), "--draft", str(refusing / "eagle")]
    words += ["--data-dir", str(refusing / "data"), "--datasets", "mt_bench", "--jobs", "1"]
    words += ["--cluster", "agx-5", "--stages", "2", "--max-tokens", "4", "--strategies", "ar"]
    code, lines = ends(words, monkeypatch, capsys)
    assert code == 0
    said = [line for line in lines if "an assistant turn has no text" in line]
    assert len(said) == 1, lines
    assert said[0].startswith("left out: mt_bench, question 1, turn 2: ")
    assert "Traceback" not in "".join(lines)
