"""What a model will read, as text: documents and packed rows in parts that say what each is."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from dsjax.config import ConfigError, DataConfig
from dsjax.data.blocks import BadShard
from dsjax.data.corpus import Corpus
from dsjax.data.documents import TokenizedDocuments, slice_document, uniforms
from dsjax.data.places import ShardCache
from dsjax.data.sources import read_documents
from dsjax.data.tokenizer import Tokenizer

SHOWN_DOCUMENTS = 500  # of text sources, tokenised to be shown

Part = tuple[str, str]  # what it is ("text", "prefix", "suffix", "middle", "special"), and its text


def parts_of(ids: np.ndarray, tokenizer: Tokenizer) -> Iterator[Part]:
    """The parts of one document, or of a piece of one, by its special tokens."""
    specials = {tokenizer.bos_id, tokenizer.eos_id}
    places = dict(zip(tokenizer.fim_ids or (), ("prefix", "suffix", "middle")))
    kind, begin, ids = "text", 0, ids.tolist()
    for at, id in enumerate([*ids, None]):
        if id is not None and id not in places and id not in specials:
            continue
        if at > begin:
            yield kind, tokenizer.decode(ids[begin:at], False)
        if id is not None:
            yield "special", tokenizer.decode([id], False)
            kind = places.get(id, "text")
        begin = at + 1


def chat_parts(ids: np.ndarray, learned: np.ndarray, tokenizer: Tokenizer) -> Iterator[Part]:
    """What of a conversation is learned, and what is read."""
    ends = [*(np.flatnonzero(np.diff(learned.astype(np.int8))) + 1).tolist(), len(ids)]
    for begin, end in zip([0, *ends], ends):
        yield "learned" if learned[begin] else "text", tokenizer.decode(ids[begin:end], False)


def row_parts(row: dict[str, np.ndarray], tokenizer: Tokenizer) -> list[list[Part]]:
    """The documents, or pieces of them, of a packed row; padding is left out."""
    places = [row["segment_ids"] == segment for segment in range(1, int(row["segment_ids"].max()) + 1)]
    if "learned" in row:
        return [list(chat_parts(row["tokens"][here], row["learned"][here], tokenizer)) for here in places]
    return [list(parts_of(row["tokens"][here], tokenizer)) for here in places]


def document_parts(tokens: np.ndarray, tokenizer: Tokenizer, fim_rate: float, seed: int, number: int) -> list[Part]:
    """A document as a row would hold it whole, turned to fill-in-the-middle with probability fim_rate."""
    draw = uniforms(3, seed, number)
    cuts = np.sort((draw[1:] * (len(tokens) + 1)).astype(np.int64)) if draw[0] < fim_rate else (-1, -1)
    return list(parts_of(slice_document(tokens, cuts, tokenizer, 0, len(tokens) + 5), tokenizer))


def sample_text(data: DataConfig, tokenizer: Tokenizer) -> Corpus:
    """The first SHOWN_DOCUMENTS documents of text sources, tokenised in memory."""
    documents = [d for d, _ in zip(read_documents(data, Counter()), range(SHOWN_DOCUMENTS))]
    ids = [np.array(i, np.int32) for i in tokenizer.encode_batch([d.text for d in documents])]
    lengths = np.array([len(i) for i in ids], np.int64)
    weights = np.ones(len(ids))
    train = TokenizedDocuments(np.concatenate(ids) if ids else np.zeros(0, np.int32), lengths, weights)
    return Corpus(tokenizer, train, train, b"", {})


def sample_documents(corpus: Corpus, data: DataConfig, n: int, seed: int) -> list[np.ndarray]:
    """The tokens of n training documents, drawn: of shards, from one block."""
    if not corpus.stored:
        count = len(corpus.train)
        return [corpus.train[i] for i in np.argsort(uniforms(count, seed), kind="stable")[:n].tolist()]
    cache, found = ShardCache(data.cache, data.cache_gib), []
    for stored in corpus.stored:
        shards = stored.manifest.train
        a, b = uniforms(2, seed, len(found))
        shard = shards[int(a * len(shards))]
        block = int(b * shard.blocks)
        try:
            reader = cache.open(stored.place, shard)
            lengths, tokens = reader.block_lengths(block), reader.read([block])[0].astype(np.int32)
        except BadShard as error:
            raise ConfigError(f"{stored.place.name(shard.name)}: {error}") from None
        found += [tokens[end - length : end] for end, length in zip(np.cumsum(lengths), lengths)]
    return [found[i] for i in np.argsort(uniforms(len(found), seed), kind="stable")[:n].tolist()]
