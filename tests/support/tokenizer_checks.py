"""Checks of tokenizers in every form, for any Python and its pins; torch and pytest are not needed.

    python -m tests.support.tokenizer_checks

runs them all and says with what. `test_tokenizer.py` runs each by itself.
"""

import json
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from flowspec.tokenizer import SAMPLE, load_tokenizer, render_chat
from tests.support.vocabularies import (
    CORPUS,
    write_config,
    write_json_form,
    write_sentencepiece,
    write_vocabulary,
)

CLASSES = ("LlamaTokenizerFast", "LlamaTokenizer", "Qwen2TokenizerFast", "GPT2Tokenizer", None)
TEXT = "Anna has 3 boxes"
TEMPLATE = (
    "{% for m in messages %}{% if m['content'] == 'no' %}{{ raise_exception('say yes') }}"
    "{% endif %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
)


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """Check that the block raises a one-line ValueError that holds all of `words`."""
    said = ""
    try:
        yield
    except ValueError as error:
        said = str(error)
    assert said, f"nothing was refused; expected {words}"
    missing = [word for word in words if word not in said]
    assert not missing, f"{missing} not in: {said}"
    assert "\n" not in said, said


def check_the_file_decides_and_not_the_class(folder: Path) -> None:
    """A byte-level file under Llama's class keeps its spaces; some transformers lose them."""
    for place, name in enumerate(CLASSES):
        model = write_json_form(folder / str(place), tokenizer_class=name)
        (model / "config.json").write_text('{"model_type": "llama"}')
        tokenizer = load_tokenizer(model)
        own = Tokenizer.from_file(str(model / "tokenizer.json"))
        ids = tokenizer.encode(SAMPLE, add_special_tokens=False)
        assert ids == own.encode(SAMPLE, add_special_tokens=False).ids, name
        assert tokenizer.decode(ids) == SAMPLE, name


def check_a_tokenizer_made_by_class_is_refused_with_both_values(folder: Path) -> None:
    """The file of R1-Distill-Llama is refused as transformers 5.20.2 reads it."""
    write_json_form(folder)
    by_class = transformers.LlamaTokenizer.from_pretrained
    with (
        patch.object(transformers.PreTrainedTokenizerFast, "from_pretrained", by_class),
        refused("tokenizer.json", "Annahas3boxes", TEXT, version("transformers"), "tokenizers "),
    ):
        load_tokenizer(folder)


def check_spaces_before_punctuation_stay(folder: Path) -> None:
    """`clean_up_tokenization_spaces` would remove them while a text streams."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([*CORPUS, "one , two . three"] * 4, trainer)
    write_config(folder, clean_up_tokenization_spaces=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    found = load_tokenizer(folder)
    assert found.decode(found.encode("boxes , and . ")).startswith("boxes , and .")


def check_a_sentencepiece_model_alone(folder: Path) -> None:
    """Vicuna and Llama 2 as first published give sentencepiece's own tokens and text."""
    from sentencepiece import SentencePieceProcessor

    write_sentencepiece(folder)
    own = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    expected = own.encode(SAMPLE)
    for config in (None, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}):
        if config is not None:
            write_config(folder, **config)
        tokenizer = load_tokenizer(folder)
        assert tokenizer.encode(SAMPLE) == [1, *expected], config
        assert tokenizer.decode(expected) == SAMPLE, config
    write_config(folder, tokenizer_class="LlamaTokenizer", add_bos_token=False)
    assert load_tokenizer(folder).encode(SAMPLE) == expected


def check_an_added_token_keeps_its_id(folder: Path) -> None:
    """Old fine-tunes have added tokens in a separate file."""
    write_config(write_sentencepiece(folder), tokenizer_class="LlamaTokenizer")
    size = len(load_tokenizer(folder))
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": size}))
    assert load_tokenizer(folder).encode("[PAD]", add_special_tokens=False)[-1] == size


def check_a_sentencepiece_model_of_another_kind_is_refused(folder: Path) -> None:
    """Models that the Llama tokenizer cannot compute are refused."""
    write_sentencepiece(folder / "unigram", kind="unigram", hard_vocab_limit=False)
    with refused("another type than BPE", "tokenizer.json"):
        load_tokenizer(folder / "unigram")
    write_sentencepiece(
        folder / "normal", normalization_rule_name="nmt_nfkc_cf", remove_extra_whitespaces=True
    )
    with refused("not read as it was written", "Anna", "anna", "sentencepiece "):
        load_tokenizer(folder / "normal")


def check_settings_of_a_sentencepiece_model_that_are_not_read(folder: Path) -> None:
    """Neither the installed versions nor the file is at fault, so another form is advised."""
    write_sentencepiece(folder / "prefix", add_dummy_prefix=False)
    write_sentencepiece(folder / "nfkc", normalization_rule_name="nfkc")
    write_sentencepiece(folder / "nmt_nfkc", normalization_rule_name="nmt_nfkc")
    for name in ("prefix", "nfkc", "nmt_nfkc"):
        with refused(
            "not read as it was", "; give a folder of the same model that has tokenizer.json"
        ):
            load_tokenizer(folder / name)


def check_byte_order_marks_are_left_out(folder: Path) -> None:
    """Some editors write them; the libraries do not read them, in any file."""
    forms = {
        "tokenizer.json": write_json_form,
        "tokenizer.model": write_sentencepiece,
        "vocab.json": write_vocabulary,
    }
    for form, write in forms.items():
        model = write(folder / form)
        write_config(model, tokenizer_class="GPT2Tokenizer" if form == "vocab.json" else None)
        for name in ("special_tokens_map.json", "config.json"):
            (model / name).write_text("{}")
        (model / "chat_template.jinja").write_text(TEMPLATE)
        (model / "added_tokens.json").write_text(json.dumps({"[PAD]": len(load_tokenizer(model))}))
        expected = load_tokenizer(model).encode(SAMPLE)
        for path in model.iterdir():
            if path.name != "tokenizer.model":
                path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        tokenizer = load_tokenizer(model)
        assert tokenizer.encode(SAMPLE) == expected, form
        assert tokenizer.chat_template == TEMPLATE, form
    (folder / "tokenizer.json" / "tokenizer.json").write_bytes(b"\xef\xbb\xbf{")
    with refused(f"the tokenizer in {folder / 'tokenizer.json'} cannot be loaded: tokenizer.json"):
        load_tokenizer(folder / "tokenizer.json")


def check_a_missing_package_is_named(folder: Path) -> None:
    """Our own error names the package and the command, not a library's guess."""
    write_sentencepiece(folder)
    with (
        patch.dict(sys.modules, {"sentencepiece": None}),
        refused("tokenizer.model", "needs sentencepiece; run", "-m pip install sentencepiece`"),
    ):
        load_tokenizer(folder)


def check_a_vocabulary_with_merges(folder: Path) -> None:
    """The class in the config, or the model's type, decides; other classes are refused."""
    for place, (name, kind) in enumerate([("Qwen2TokenizerFast", "x"), (None, "qwen3")]):
        model = write_vocabulary(folder / str(place), tokenizer_class=name)
        (model / "config.json").write_text(json.dumps({"model_type": kind}))
        tokenizer = load_tokenizer(model)
        assert tokenizer.decode(tokenizer.encode(SAMPLE, add_special_tokens=False)) == SAMPLE
    write_config(folder / "0", tokenizer_class="LlamaTokenizer")
    with refused("names LlamaTokenizer", "Qwen2Tokenizer"):
        load_tokenizer(folder / "0")
    (folder / "1" / "merges.txt").unlink()
    with refused("vocab.json but no merges.txt"):
        load_tokenizer(folder / "1")


def check_damaged_files_are_named(folder: Path) -> None:
    """The error is one sentence, whatever the library raises."""
    with refused("has no tokenizer", "tokenizer.json, tokenizer.model, vocab.json"):
        load_tokenizer(folder)
    for name, content, words in [
        ("tokenizer.model", b"not a model at all", "tokenizer.model"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "tiktoken"),
        ("tokenizer.json", b'{"model": {"type": "Unheard"}}', "tokenizer.json"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ]:
        (folder / name).write_bytes(content)
        with refused(words, str(folder)):
            load_tokenizer(folder)
    write_json_form(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with refused("tokenizer_config.json cannot be read as JSON"):
        load_tokenizer(folder)


def check_chat_templates(folder: Path) -> None:
    """The template renders a conversation; its refusal is passed on in its own words."""
    tokenizer = load_tokenizer(write_json_form(folder, chat_template=TEMPLATE))
    ids = render_chat(tokenizer, [{"role": "user", "content": TEXT}])
    assert tokenizer.decode(ids) == f"[user] {TEXT}"
    for template, content, words in [
        (TEMPLATE, "no", "chat template refuses this conversation: say yes"),
        ("{{ messages[9].content }}", "x", "fails with UndefinedError"),
        ("{{ 1 / 0 }}", "x", "fails with ZeroDivisionError: division by zero"),
        ("{% if %}", "x", "fails with TemplateSyntaxError"),
        ("{# nothing #}", "x", "chat template makes '' of this conversation, which has no tokens"),
    ]:
        tokenizer.chat_template = template
        with refused(words):
            render_chat(tokenizer, [{"role": "user", "content": content}])
    with refused("after 'cut ' it has half a character, \\ud83d"):
        render_chat(tokenizer, [{"role": "user", "content": "cut \ud83d here"}])


CHECKS: dict[str, Callable[[Path], None]] = {
    name.removeprefix("check_"): found
    for name, found in list(globals().items())
    if name.startswith("check_")
}


def main() -> None:
    """Run every check in its own folder."""
    with tempfile.TemporaryDirectory() as name:
        for check, run in CHECKS.items():
            folder = Path(name) / check
            folder.mkdir()
            run(folder)
    with_what = f"transformers {version('transformers')}, tokenizers {version('tokenizers')}"
    said = f"{len(CHECKS)} checks passed, Python {platform.python_version()}, {with_what}"
    sys.stdout.write(said + "\n")


if __name__ == "__main__":
    main()
