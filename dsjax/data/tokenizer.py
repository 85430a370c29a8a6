"""Text to token ids and back: a byte-level BPE trained here, an existing tokenizer.json, or plain bytes.

All three are one `Tokenizer` and one file format, the tokenizer.json of the `tokenizers` library.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from dsjax.config import ConfigError, show

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
SPECIALS = (BOS, EOS, PAD, *FIM)  # ids 0, 1, 2 as in DeepSeek-V3
# What the tokens are called, DeepSeek's name first.
NAMES = {
    "bos": (BOS, "<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>", "[BOS]", "<|endoftext|>"),
    "eos": (EOS, "</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[EOS]"),
    "pad": (PAD, "<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>"),
    "fim_begin": (FIM[0], "<|fim_prefix|>", "<fim_prefix>"),
    "fim_hole": (FIM[1], "<|fim_suffix|>", "<fim_suffix>"),
    "fim_end": (FIM[2], "<|fim_middle|>", "<fim_middle>"),
    "user": ("<｜User｜>", "<|im_user|>"),
    "assistant": ("<｜Assistant｜>", "<|im_assistant|>"),
    "think": ("<think>", "◁think▷"),
    "end_think": ("</think>", "◁/think▷"),
}
SPECIAL_KEYS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")  # what a run folder may have
TEXT_FILES = (*TOKENIZER_FILES, "chat_template.jinja")  # and what goes with the weights to a run that begins with them
# A word with the one sign before it; up to three digits; signs with the spaces, or the line break and the indentation,
# after them; blank lines with the indentation. Against GPT-2's and DeepSeek-V3's, on Python sources: 9 % fewer tokens.
WORDS = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*[ \t]*|\s*[\r\n]+[ \t]*|\s+(?!\S)|\s+"


class Tokenizer:
    """Encodes text without special tokens, and decodes ids. `fim_ids` (begin, hole, end) is None where there are none.

    `special_ids` has those tokens of NAMES that there are; `eos_ids` are all tokens that end a text, eos_id first.
    `text` is the same tokenizer without its control tokens, so that a text which spells one is only text.
    """

    def __init__(self, backend: Backend, names: Mapping[str, str] | None = None, eos_ids: Iterable[int] = ()):
        """names: of bos_token, eos_token and pad_token, where they are not those of NAMES."""
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.names = backend, dict(names or {})
        self.text = _without_controls(backend)
        vocabulary = backend.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self.special_ids: dict[str, int] = {}
        for key, known in NAMES.items():
            given = self.names.get(f"{key}_token")
            found = [vocabulary[name] for name in (given, *known) if name in vocabulary]
            if found:
                self.special_ids[key] = found[0]
        if "eos" not in self.special_ids:
            raise ConfigError(
                f"data.tokenizer: no end-of-text token in its vocabulary; expected {EOS} or one of "
                f"{', '.join(NAMES['eos'][1:])}"
            )
        self.eos_id = self.special_ids["eos"]
        self.bos_id = self.special_ids.get("bos", self.eos_id)
        self.pad_id = self.special_ids.get("pad", self.eos_id)  # segment 0 hides it
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys((self.eos_id, *eos_ids)))
        fim = [self.special_ids.get(key) for key in ("fim_begin", "fim_hole", "fim_end")]
        self.fim_ids = None if None in fim else tuple(fim)
        self.kind = "bytes" if vocabulary == _bytes_vocabulary() else type(backend.model).__name__.lower()

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([_unicode(text)])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self.kind == "bytes":  # the same ids, 20 times as fast
            return [[len(SPECIALS) + byte for byte in text.encode()] for text in texts]
        return [e.ids for e in self.text.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_rendered(self, text: str) -> list[int]:
        """The ids of a text in which control tokens count, as of a rendered chat template; nothing is added."""
        return self.backend.encode(_unicode(text), add_special_tokens=False).ids

    def encode_pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of a rendered text that is given in pieces: those that encode_rendered has of the whole, or of each
        piece alone where a token would be of two."""
        ends = list(itertools.accumulate(len(text) for text in texts))
        whole = self.backend.encode(_unicode("".join(texts)), add_special_tokens=False)
        pieces, i, before = [[] for _ in texts], 0, 0
        for id, (start, stop) in zip(whole.ids, whole.offsets):
            start, before = min(start, before), stop  # offsets may leave out the spaces that a token begins with
            while i < len(ends) - 1 and start >= ends[i]:
                i += 1
            if stop > ends[i]:
                return [self.encode_rendered(text) for text in texts]
            pieces[i].append(id)
        return pieces

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD, ids above the vocabulary nothing."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def decode_stream(self, ids: Iterable[int], skip_special: bool = True) -> Iterator[str]:
        """Pieces of `decode(ids)` as soon as they are whole characters; what never becomes one comes last."""
        detokenizer = Detokenizer(self, skip_special)
        yield from filter(None, map(detokenizer.push, ids))
        if last := detokenizer.end():
            yield last

    def dumps(self) -> str:
        return self.backend.to_str(pretty=True)

    def beside(self) -> dict[str, str]:
        """File name -> content of what `load` must find beside tokenizer.json to give this tokenizer again."""
        files = {}
        if self.names:
            files["tokenizer_config.json"] = json.dumps(self.names, indent=2, ensure_ascii=False) + "\n"
        if len(self.eos_ids) > 1:
            files["generation_config.json"] = json.dumps({"eos_token_id": self.eos_ids}) + "\n"
        return files

    def save(self, path: Path) -> None:
        Path(path).write_text(self.dumps(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """The tokenizer of a run or Hub folder, or of a tokenizer.json. Raises ConfigError where there is none.

        Beside tokenizer.json, tokenizer_config.json says which tokens begin and end a text, and generation_config.json
        or config.json what else ends it.
        """
        file = Path(path).expanduser()
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise ConfigError(f"data.tokenizer={path}: no such file; expected bpe, bytes or a tokenizer.json")
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(f"data.tokenizer={path}: not a tokenizer.json ({error})") from None
        if file.name != "tokenizer.json":
            return cls(backend)
        return cls(backend, special_tokens(file.parent), _eos_ids(file.parent))


class Detokenizer:
    """Tokens to text, one by one: `push` gives what has become whole characters, `end` what never became one."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._decode = lambda ids: tokenizer.decode(ids, skip_special)
        self._held, self._done = [], 0  # tokens since the last piece but one, and how many of them are out

    def push(self, id: int) -> str:
        self._held.append(int(id))
        more = self._more()
        if not more or more.endswith("\ufffd"):
            return ""
        self._held, self._done = self._held[self._done :], len(self._held) - self._done
        return more

    def end(self) -> str:
        more = self._more()
        self._held, self._done = [], 0
        return more

    def _more(self) -> str:
        before, text = self._decode(self._held[: self._done]), self._decode(self._held)
        return text[len(before) :]


def special_tokens(folder: Path | str) -> dict[str, str]:
    """Name -> text of the special tokens that a Hub folder names, such as "bos_token"; empty where it names none.

    From tokenizer_config.json, and what is not in it from special_tokens_map.json. Raises ConfigError for a damaged
    file.
    """
    tokens = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = Path(folder) / name
        for key, value in _read_json(path).items():
            if key in SPECIAL_KEYS:
                content = value.get("content") if isinstance(value, dict) else value
                if not isinstance(content, str) and value is not None:
                    raise ConfigError(f"{path}: {key}={show(value)}: expected a text, or an object with its content")
                tokens[key] = content
    return {key: content for key, content in tokens.items() if content is not None}


def bytes_tokenizer() -> Tokenizer:
    """One token a byte: after the special tokens, byte b is id 6 + b."""
    backend = Backend(models.BPE(_bytes_vocabulary(), []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIALS))
    return Tokenizer(backend)


def train_bpe(texts: Iterable[str], vocab_size: int, *, progress: bool = False) -> Tokenizer:
    """Byte-level BPE of at most vocab_size tokens, special ones included; the same texts give the same tokenizer."""
    backend = Backend(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIALS), initial_alphabet=byte_letters(), show_progress=progress
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def check_vocabulary(kind: str, vocab_size: int, tokenizer: Tokenizer | None = None, fim_rate: float = 0.0) -> None:
    """Raises ConfigError if the model has fewer rows than the tokenizer ids, or FIM is wanted without its tokens."""
    least = len(SPECIALS) + 256 if tokenizer is None else tokenizer.vocab_size
    if vocab_size < least:
        raise ConfigError(f"model.vocab_size={vocab_size}: data.tokenizer={kind} needs at least {least}")
    if fim_rate and tokenizer and tokenizer.fim_ids is None:
        raise ConfigError(
            f"data.fim_rate={fim_rate}: expected 0, for data.tokenizer={kind} has no tokens {', '.join(FIM)}"
        )


def byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary: its own, or the next one from U+0100 on."""
    own = {ord(letter) for letter in pre_tokenizers.ByteLevel.alphabet()} & set(range(256))
    others = [byte for byte in range(256) if byte not in own]
    return [chr(byte) if byte in own else chr(256 + others.index(byte)) for byte in range(256)]


def _bytes_vocabulary() -> dict[str, int]:
    return {token: id for id, token in enumerate((*SPECIALS, *byte_letters()))}


def _eos_ids(folder: Path) -> list[int]:
    """The tokens that end a text, as a Hub folder numbers them."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        given = _read_json(path).get("eos_token_id")
        if given is not None:
            ids = given if isinstance(given, list) else [given]
            if not all(type(id) is int and 0 <= id < 2**31 for id in ids):
                raise ConfigError(f"{path}: eos_token_id={show(given)}: expected a token's id, or a list of them")
            return ids
    return []


def _read_json(path: Path) -> dict:
    """The object of a JSON file, empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {show(str(error), quote=False)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected an object, got a {type(values).__name__}")
    return values


def _unicode(text: str) -> str:
    """The text, if all of it are characters: JSON can spell half of one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"text: {text[error.start]!a} is half a surrogate pair; expected Unicode") from None
    return text


def _without_controls(backend: Backend) -> Backend:
    """A copy that never encodes a control token; added tokens that stand for text (runs of spaces) stay."""
    values = json.loads(backend.to_str())
    for token in values["added_tokens"]:  # some are not marked as special: DeepSeek's own FIM tokens
        token["special"] |= token["content"].startswith("<") and token["content"].endswith(">")
    values["post_processor"] = values["truncation"] = values["padding"] = None
    text = Backend.from_str(json.dumps(values))
    text.encode_special_tokens = True  # as the text they are
    return text
