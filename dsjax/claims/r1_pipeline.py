"""The claim that DeepSeek-R1's pipeline makes a model that reasons, in one language, and keeps what else it could do.

arXiv:2501.12948: cold start, reinforcement learning on reasoning with a reward for staying in one language, rejection
sampling, fine-tuning of the base on what was sampled and on general data, reinforcement learning on everything. Here a
base model is pre-trained in a minute on two kinds of text: the parity of bits (dsjax.posttrain.parity), mostly answered
at once and sometimes after a chain of thought in letters, which are Latin or Greek and change between the two within a
chain; and words, read backwards.

    0110=<think>aβAa</think><answer>e</answer>    0110=<answer>e</answer>    dogen><answer>negod</answer>

A stage beside the pipeline has all that the second has but the language reward.
"""

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from dsjax.claims import r1_zero, runs
from dsjax.config import Config, ConfigError, replace
from dsjax.data.tokenizer import SPECIALS, Tokenizer
from dsjax.files import write_json, write_text
from dsjax.posttrain import r1, stages_picture
from dsjax.posttrain.parity import draw_bits, is_heldout, parity, parity_chain, parity_prompt
from dsjax.train import loop

N_BITS = 16
LETTERS = "cdefghijklmn"  # of words
N_LETTERS = 5
GREEK = str.maketrans("abAB", "αβΑΒ")
SWITCH = 0.15  # how often a chain changes its letters
PARITY, CHAINS = 0.7, 0.2  # documents about parity, and those of them with a chain
DOCUMENTS, COLD, PROBLEMS, GENERAL = 40_000, 256, 4096, 2048
STEPS = 500
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
SOLVED, CHANCE, KEPT = 0.95, 0.15, 0.9  # accuracy of reasoning; distance to one half; accuracy of what else it could do
ONE_LANGUAGE, MORE = 0.95, 0.2  # share of words in one language with its reward, and by how much more than without

RECIPE = """\
base = "{base}"

[[stage]]
name = "cold_start"
kind = "sft"
data = ["{text}/cold_start.jsonl"]
epochs = 1
[stage.config]
batch_size = 16
optimizer.peak_lr = 5e-4
data.heldout_fraction = 0.05
{sft}

[[stage]]
name = "reasoning_rl"
kind = "grpo"
from = "cold_start"
task = "{text}/reasoning.jsonl"
rewards = "choice:1,think:1,language:1"
[stage.config]
steps = {steps}
optimizer.peak_lr = 5e-4
{rl}

[[stage]]  # what the language reward is worth: the same without it
name = "without_language"
kind = "grpo"
from = "cold_start"
task = "{text}/reasoning.jsonl"
rewards = "choice:1,think:1,language:0"
[stage.config]
steps = {steps}
optimizer.peak_lr = 5e-4
{rl}

[[stage]]
name = "rejection_sampling"
kind = "traces"
from = "reasoning_rl"
task = "{text}/reasoning.jsonl"
problems = {problems}
samples = 2
language = 1.0
max_tokens = {longest}
max_rows = 256
style = "plain"

[[stage]]
name = "sft"
kind = "sft"
data = ["rejection_sampling", "{text}/general.jsonl:0.25"]
epochs = 1
[stage.config]
batch_size = 32
optimizer.peak_lr = 1e-3
{sft}

[[stage]]
name = "rl"
kind = "grpo"
from = "sft"
recipe = "r1_2"
task = "{text}/reasoning.jsonl:0.5,{text}/general_problems.jsonl:0.5"
rewards = "choice:1,think:1,language:1,accuracy:1"
[stage.config]
steps = {last}
optimizer.peak_lr = 2e-4
{rl}

[[measure]]
name = "reasoning"
task = "{text}/reasoning_heldout.jsonl"
heldout = "{text}/reasoning_heldout.jsonl"
samples = 4
max_tokens = {longest}
max_rows = 256
style = "plain"

[[measure]]
name = "general"
task = "{text}/general_heldout.jsonl"
heldout = "{text}/general_heldout.jsonl"
samples = 4
max_tokens = {longest}
max_rows = 256
style = "plain"
"""
SFT = """\
seed = {seed}
seq_len = {row}
optimizer.name = "adamw"
optimizer.final_lr_ratio = 0.1"""
RL = """\
seed = {seed}
seq_len = {row}
batch_size = {answers}
log_every = 1
eval_every = 10
checkpoint_every = 10
optimizer.name = "adamw"
grpo.style = "plain"
grpo.group_size = 8
grpo.updates = 1
grpo.max_tokens = {longest}
grpo.kl_weight = 0.0
grpo.eval_prompts = 64
grpo.eval_samples = 1"""
ROW, LONGEST = 2 * N_BITS + 16, N_BITS + 6
ANSWERS = 256


def base_model(seed: int = 0, steps: int = STEPS) -> Config:
    """That of the claim about R1-Zero, with a letter or a tag a token."""
    base = r1_zero.base_model(seed, steps, N_BITS)
    return replace(
        base,
        name="pipeline",
        seq_len=ROW,
        model=replace(base.model, vocab_size=len(vocabulary())),
    )


def vocabulary() -> tuple[str, ...]:
    latin = "abAB"
    return (*SPECIALS, *TAGS, *"01=>", *"eo", *latin, *latin.translate(GREEK), *sorted(set(LETTERS) - set("e")))


def tokenizer() -> Tokenizer:
    """A token a character, and one a tag."""
    backend = Backend(models.WordLevel({token: id for id, token in enumerate(vocabulary())}, unk_token=SPECIALS[2]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("|".join((*TAGS, "."))), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(list(SPECIALS))
    return Tokenizer(backend)


def mixed(chain: str, draw: random.Random) -> str:
    """A chain whose letters are now Latin, now Greek."""
    greek, letters = draw.random() < 0.5, []
    for letter in chain:
        letters.append(letter.translate(GREEK) if greek else letter)
        greek ^= draw.random() < SWITCH
    return "".join(letters)


def thought(bits: str, draw: random.Random) -> str:
    """What answers after a chain."""
    return f"<think>{mixed(parity_chain(bits)[:-1], draw)}</think>{said(parity(bits))}"


def said(answer: str) -> str:
    return f"<answer>{answer}</answer>"


def draw_word(draw: random.Random, heldout: bool = False) -> str:
    while True:
        word = "".join(draw.choices(LETTERS, k=N_LETTERS))
        if is_heldout(word) == heldout:
            return word


def write_texts(folder: Path, seed: int = 0) -> Path:
    """All that the claim's models learn and are asked, a pure function of the seed; nothing held out is learned."""
    draw = random.Random(f"pipeline {seed}")

    def documents() -> Iterator[dict[str, Any]]:
        for _ in range(DOCUMENTS):
            if draw.random() < PARITY:
                bits = draw_bits(draw, N_BITS)
                yield {"text": parity_prompt(bits) + (
                    thought(bits, draw) if draw.random() < CHAINS else said(parity(bits))
                )}  # fmt: skip
            else:
                word = draw_word(draw)
                yield {"text": f"{word}>{said(word[::-1])}"}

    def reasoning(heldout: bool) -> dict[str, Any]:
        bits = draw_bits(draw, N_BITS, heldout)
        rewards = ["choice", "think", "language"]
        return {"prompt": parity_prompt(bits), "answer": parity(bits), "language": "en", "rewards": rewards}

    def general(heldout: bool) -> dict[str, Any]:
        word = draw_word(draw, heldout)
        return {"prompt": f"{word}>", "answer": word[::-1], "rewards": ["accuracy"]}

    folder.mkdir(parents=True, exist_ok=True)
    cold = (draw_bits(draw, N_BITS) for _ in range(COLD))
    words = (draw_word(draw) for _ in range(GENERAL))
    files = {
        "base": documents(),
        "cold_start": ({"prompt": parity_prompt(bits), "completion": thought(bits, draw)} for bits in cold),
        "reasoning": (reasoning(False) for _ in range(PROBLEMS)),
        "reasoning_heldout": (reasoning(True) for _ in range(128)),
        "general": ({"prompt": f"{word}>", "completion": said(word[::-1])} for word in words),
        "general_problems": (general(False) for _ in range(PROBLEMS)),
        "general_heldout": (general(True) for _ in range(128)),
    }
    for name, records in files.items():
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    (folder / "tokenizer").mkdir(exist_ok=True)
    tokenizer().save(folder / "tokenizer" / "tokenizer.json")
    return folder


def recipe(base: Path, text: Path, seed: int, rl_steps: int) -> str:
    """The pipeline with the ablation in it."""
    places = {"row": ROW, "longest": LONGEST, "seed": seed, "answers": ANSWERS}
    numbers = {"steps": rl_steps, "last": rl_steps, "problems": PROBLEMS // 8}
    return RECIPE.format(base=base, text=text, sft=SFT.format(**places), rl=RL.format(**places), **places, **numbers)


def test(config: Config, rl_steps: int, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Pre-trains, runs the pipeline, and writes claim.json and claim.png; goes on where it was stopped.

    Raises ConfigError if it is stopped now, or the folder's trainings are of other settings.
    """
    began = time.perf_counter()
    runs.only_of(folder, config, rl_steps=rl_steps)
    text, base = write_texts(folder / "text", config.seed), folder / "base"
    files = {"sources": (str(text / "base.jsonl"),), "tokenizer": str(text / "tokenizer" / "tokenizer.json")}
    config = replace(config, data=replace(config.data, **files))
    runs.pretrained(config, base, None, say)
    write_text(folder / "recipe.toml", recipe(base, text, config.seed, rl_steps))
    result = r1.run(folder / "recipe.toml", folder / "run", quiet=True, say=say)
    if not result["done"]:
        raise ConfigError(f"{folder / 'run'}: stopped; the same command goes on from there")
    whole = {
        **compare(result),
        "command": f"dsjax claims r1_pipeline --seed={config.seed} --steps={config.steps} --rl-steps={rl_steps}",
        "seed": config.seed,
        "steps": {"pre-training": config.steps, "reinforcement": rl_steps},
        "seconds": round(time.perf_counter() - began, 1),
        "machine": loop.machine(),
    }
    write_json(folder / "claim.json", whole)
    stages_picture.draw(result, folder / "claim.png")
    return whole


def compare(result: dict[str, Any]) -> dict[str, Any]:
    """Whether reasoning goes from chance to SOLVED, its words into one language by the reward for that and not without
    it, and the general task stays. A base that does not know the general task tests nothing."""
    measured = result["measured"]
    reasoning = {stage: of["reasoning"] for stage, of in measured.items()}
    general = {stage: of["general"]["pass@1"] for stage, of in measured.items()}
    with_it, without = reasoning["reasoning_rl"]["language"], reasoning["without_language"]["language"]
    found = {
        "base at chance": abs(reasoning["base"]["pass@1"] - 0.5) <= CHANCE,
        "reasons at the end": reasoning["rl"]["pass@1"] >= SOLVED,
        "one language by its reward": with_it is not None and with_it >= ONE_LANGUAGE,
        "more than without": with_it is not None and without is not None and with_it - without >= MORE,
        "one language at the end": (reasoning["rl"]["language"] or 0) >= ONE_LANGUAGE,
        "the general task stays": general["rl"] >= KEPT,
    }
    learned = general["base"] >= KEPT
    return {
        "claim": f"the pipeline takes reasoning from chance to {SOLVED:.0%}, in one language, and the rest stays",
        "holds": all(found.values()) and learned,
        "learned": learned,
        "found": found,
        "pipeline": result,
    }


def table(result: dict[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """The pipeline's."""
    return r1.table(result["pipeline"])
