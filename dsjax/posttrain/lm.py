"""lm-eval's tasks on our engine: `EngineLM` is a model of that library, `run_tasks` evaluates tasks of a folder.

results = run_tasks(loaded, ["my_task"], Path("tasks"))
results["results"]["my_task"]["acc,none"]

Needs the extra `eval`.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from dsjax.config import ConfigError, EngineConfig, nearest, show
from dsjax.hub.chat import ChatTemplate
from dsjax.hub.load import Loaded
from dsjax.infer.engine import Engine
from dsjax.infer.requests import Request
from dsjax.infer.text import Text

_MAX_TOKENS = 256  # of an answer, where a task says nothing
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
_KNOWN = ("until", "max_gen_toks", "do_sample", *_SAMPLING)


class EngineLM(TemplateLM):
    """A model for lm-eval. Texts begin as documents do, or, with chat, as the chat template writes them.

    Request n of generate_until has seed + n, so that samples of one prompt differ. What is longer than the model allows
    loses its beginning.
    """

    def __init__(self, loaded: Loaded, *, chat: bool = False, max_rows: int = 8, seed: int = 0, progress: bool = False):
        super().__init__()
        self.loaded, self.chat, self.max_rows, self.seed, self.progress = loaded, chat, max_rows, seed, progress
        self.longest = loaded.config.model.max_position_embeddings
        self._template = ChatTemplate.load(loaded.folder) if chat else None

    @property
    def eot_token_id(self) -> int:
        return self.loaded.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.loaded.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.loaded.folder.resolve())

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self._template.source if self._template is not None and chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Raises ConfigError for a model that was made without chat."""
        if self._template is None:
            raise ConfigError("chat=false: expected true for messages")
        return self._template.render(chat_history, add_generation_prompt=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Without a token that begins a text, but for one that a chat template writes."""
        tokenizer = self.loaded.tokenizer
        return tokenizer.encode_rendered(string) if self.chat else tokenizer.encode(string)

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of continuations behind their contexts, and whether they are the likeliest."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts; of those too long, in windows that each read only what they are to predict."""
        windows, owner = [], []
        for n, request in enumerate(requests):
            tokens = self.loaded.tokenizer.encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.longest - 2, 1):
                windows.append((("", ""), *make_disjoint_window(window)))
                owner.append(n)
        sums = [0.0] * len(requests)
        for n, (logprob, _) in zip(owner, self._score(windows, as_given=True)):
            sums[n] += logprob
        return sums

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop string or the end of the document."""
        tokenizer, asked, texts = self.loaded.tokenizer, [], []
        for n, request in enumerate(requests):
            context, given = request.args
            options, until, max_tokens = _options(given)
            prompt = self._begin(self.tok_encode(context))[-(self.longest - 1) :]
            max_tokens = min(max_tokens, self.longest - len(prompt))
            seed = (self.seed + n) % 2**32
            one = Request(prompt, max_tokens=max_tokens, seed=seed, stop_ids=tokenizer.eos_ids, **options)
            text = Text(tokenizer, until)
            pieces = text.follow(one)
            asked.append(one)
            texts.append((pieces, text))
        self._run(asked, "answers")
        return ["".join(pieces) + text.end() for pieces, text in texts]

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        return self._score(requests)

    def _score(self, requests, as_given: bool = False) -> list[tuple[float, bool]]:
        """Of each (texts, context, continuation): log-probability, and whether all its tokens are the likeliest."""
        asked, sizes = [], []
        for _, context, continuation in requests:
            context = context if as_given else self._begin(context)
            whole = [*context, *continuation][-(self.longest - 1) :]
            sizes.append(min(len(continuation), len(whole) - 1))
            asked.append(Request(whole, max_tokens=1, temperature=0.0, prompt_logprobs=1))
        self._run(asked, "likelihoods")
        scores = []
        for request, n in zip(asked, sizes):
            said = request.prompt_said[len(request.prompt_said) - n :]
            scores.append(
                (float(np.sum([one.logprob for one in said])), all(one.token == one.top[0][0] for one in said))
            )
        return scores

    def _begin(self, tokens: list[int]) -> list[int]:
        begun = self.chat or tokens[:1] == [self.prefix_token_id]
        return tokens if begun and tokens else [self.prefix_token_id, *tokens]

    def _run(self, requests: list[Request], what: str) -> None:
        if not requests:
            return
        room = max(len(request.prompt) + request.max_tokens for request in requests)
        room = min(self.longest, max(512, 1 << (room - 1).bit_length()))  # few sizes, few compilations
        with (
            jax.set_mesh(self.loaded.mesh),
            tqdm(total=len(requests), desc=what, disable=not self.progress, leave=False) as bar,
        ):
            engine = Engine(self.loaded, EngineConfig(max_rows=self.max_rows, max_model_len=room))
            for request in requests:
                request.done = lambda reason: bar.update()
                engine.submit(request)
            engine.run()


class _Manager(TaskManager):
    """lm-eval's, with another number of samples for tasks that generate."""

    def __init__(self, samples: int | None, **where):
        super().__init__(**where)
        self._samples = samples

    def load(self, task_list):
        found = super().load(task_list)
        for task in found["tasks"].values():
            if self._samples is not None and task.get_config("output_type") == "generate_until":
                task.set_config("repeats", self._samples)
        return found


def run_tasks(
    loaded: Loaded,
    names: Sequence[str],
    include_path: Path | None = None,
    *,
    samples: int | None = None,
    sampling: dict[str, float] | None = None,
    limit: int | None = None,
    chat: bool = False,
    max_rows: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """What lm-eval's `simple_evaluate` gives: "results" by task, "samples" with every document, and more.

    include_path: a folder of YAML tasks; lm-eval's own if not given. samples: of tasks that generate, in place of their
    `repeats`, for filters as majority_vote. sampling: temperature and top_p, in place of theirs; a temperature says
    whether it samples: at 0 it takes the likeliest tokens. Raises ConfigError for a task that is not there.
    """
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"include_path={show(str(include_path))}: no such folder")
    manager = _Manager(samples, include_path=include_path, include_defaults=include_path is None)
    for name in names:
        if not manager.match_tasks([name]):
            near = nearest(name, manager.all_tasks) if manager.all_tasks else ["none: it has no tasks"]
            raise ConfigError(f"tasks={show(name)}: no such task; the nearest is {near[0]}")
    given = None
    if sampling is not None:
        given = dict(sampling)
        if "temperature" in sampling:  # top_p alone leaves a greedy task greedy
            given["do_sample"] = sampling["temperature"] > 0
    found = simple_evaluate(
        EngineLM(loaded, chat=chat, max_rows=max_rows, seed=seed, progress=progress),
        tasks=list(names),
        task_manager=manager,
        limit=limit,
        apply_chat_template=chat,
        gen_kwargs=given,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return dict(found)


def rows(results: dict[str, Any]) -> list[tuple[str, str, str, float, float | None]]:
    """Task, metric, filter, value and its standard error of what `run_tasks` gives, if known."""
    found = []
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, filter = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{filter}")
                known = isinstance(error, float) and math.isfinite(error)
                found.append((task, metric, filter, value, error if known else None))
    return found


def _options(given: dict[str, Any]) -> tuple[dict[str, float], list[str], int]:
    """A task's generation_kwargs as fields of a request, stop strings, and the most tokens. Raises ConfigError."""
    for name, value in given.items():
        if name not in _KNOWN and value is not None:
            raise ConfigError(f"generation_kwargs: {name}={show(value)}: expected {', '.join(_KNOWN)}")
    until = given.get("until") or []
    options = {name: given[name] for name in _SAMPLING if given.get(name) is not None}
    options = {name: int(value) if name == "top_k" else float(value) for name, value in options.items()}
    sampled = given.get("do_sample", options.get("temperature", 0) > 0)
    options["temperature"] = options.get("temperature", 1.0) if sampled else 0.0
    return options, [until] if isinstance(until, str) else list(until), int(given.get("max_gen_toks") or _MAX_TOKENS)
