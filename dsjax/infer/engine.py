"""Continuous batching on the latent cache: every step takes all requests one token further, or more with drafts.

with jax.set_mesh(loaded.mesh):
    engine = Engine(loaded, EngineConfig(max_rows=8))
    engine.submit(Request(tokens, max_tokens=100, tell=..., done=...))
    engine.run()        # until nothing is left; a server calls step() in a loop

Between two steps requests come, go, and wait. Shapes are few and fixed: rows and pages a row are rounded up, prompts
are read in chunks. Where pages run out, the youngest request's go to the host's memory, and come back.
"""

import functools
import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable

import jax
import numpy as np

from dsjax.config import PLAIN, ConfigError, EngineConfig, replace
from dsjax.hub.load import Loaded
from dsjax.infer import programs
from dsjax.infer.eplb import Placement, even_places, place_experts
from dsjax.infer.pages import Pool, chunk_names
from dsjax.infer.requests import Request, Sampled
from dsjax.model.cache import fetch, new_pages, put
from dsjax.model.moe import rearrange
from dsjax.model.transformer import DeepSeek, unstack
from dsjax.precision import RECIPES, cast_weights, in_fp8, weight_name
from dsjax.state import Flat, Replicas, RouterBias, Rows, Sampling, Stepped, Weights
from sharding.rules import RULES, spec

_TRY_EVERY, _TRY_FOR = 128, 4  # steps: how often and how long the way is taken that does not seem to pay


class Engine:
    """Requests on the rows of one model. Not for several threads, but for `submit` and `cancel`.

    Call it under the mesh of the model. Raises ConfigError for settings that the model or the devices do not allow.
    """

    def __init__(self, loaded: Loaded, options: EngineConfig = EngineConfig(), *, say: Callable[[str], None] = print):
        cfg, mesh = loaded.config.model, loaded.mesh
        options = replace(options, page_size=options.page_size or (32 if jax.default_backend() == "cpu" else 128))
        self.options, self.cfg, self.mesh = options, cfg, mesh
        if mesh.shape["context"] > 1 or mesh.shape["stage"] > 1:
            raise ConfigError(f"mesh={dict(mesh.shape)}: expected context=1 and stage=1 to generate")
        self.n_shards = math.prod(mesh.shape[axis] for axis in RULES["batch"])
        self.compute = replace(loaded.config.compute, expert_buffer=None, overlap="none")
        if not in_fp8(loaded.model):  # so that weights are not quantised anew at every step
            plain = PLAIN[RECIPES[self.compute.precision].dtype]
            self.compute = replace(self.compute, precision=plain)
        self.n_draft = min(options.n_draft, 8) if cfg.num_nextn_predict_layers else 0
        self.longest = min(options.max_model_len or cfg.max_position_embeddings, cfg.max_position_embeddings)

        self.counts: Counter[str] = Counter()
        self.load = np.zeros((cfg.num_moe_layers, cfg.n_routed_experts), np.int64)
        self._set_weights(loaded.model, loaded.router_bias)

        size = options.page_size
        per_row = -(-(self.longest + 1) // size)
        self.rows_a_shard = -(-options.max_rows // self.n_shards)
        n_pages = (
            1 + (options.cache_tokens or self.rows_a_shard * self.n_shards * self.longest) // self.n_shards // size
        )
        self.n_pages = max(n_pages, per_row + 1)
        self._empty()
        one = options.one_shape
        self.row_sizes = _sizes(self.rows_a_shard if one else 1, self.rows_a_shard)
        self.page_sizes = _sizes(per_row if one else min(per_row, max(1, 256 // size)), per_row)
        self.chunk_sizes = _sizes(min(32, options.prefill_chunk), options.prefill_chunk)
        most = -(-options.prefill_rows // self.n_shards)
        self.prefill_sizes = _sizes(most if one else 1, most)

        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._came: deque[Request | int] = deque()  # requests, and the ids of those to end
        self.accepted_at = np.zeros(max(1, self.n_draft), np.int64)
        self.drafted_at = np.zeros(max(1, self.n_draft), np.int64)
        self.pace = _Pace(self.n_draft)
        self._even: dict[int, tuple[jax.Array, jax.Array]] = {}

    def _empty(self) -> None:
        """A cache with nothing in it."""
        n, dtype = self.n_pages * self.n_shards, RECIPES[self.compute.precision].dtype
        make = functools.partial(new_pages, self.cfg, n, self.options.page_size, dtype, n_mtp=self.n_draft > 0)
        self.pages = jax.jit(make)()
        self._forget_chunks()

    def _forget_chunks(self) -> None:
        """Pages that nobody holds, and of no chunk is it known where it lies."""
        self.pools = [Pool(self.n_pages) for _ in range(self.n_shards)]
        self._experts_of: dict[bytes, np.ndarray] = {}  # chunk -> its tokens' experts, where a request asked for them

    def reset(self, reason: str) -> None:
        """Ends all requests, and starts again on an empty cache: after a step that failed, its pages are gone."""
        self._take()
        for request in (*self.running, *self.waiting):
            self._end(request, reason)
        self._empty()

    # Weights

    def renew(self, model: DeepSeek, router_bias: RouterBias) -> None:
        """Goes on with other weights of the same network. Those in the compute format are not copied, but for CPUs, and
        must live as long as they are used; others are cast. Raises ValueError while there are requests: what is in the
        cache is of the old weights.
        """
        if self.busy:
            n = len(self.running) + len(self.waiting) + len(self._came)
            raise ValueError(f"renew: {n} requests are not done; expected none")
        self._forget_chunks()
        self._set_weights(model, router_bias)

    def _set_weights(self, model: DeepSeek, router_bias: RouterBias) -> None:
        self._flat = None
        self.weights = Weights(cast_weights(model, self.compute.precision), None, router_bias)
        self.placement = None
        self._load_then, self._placed_at = self.load.copy(), self.counts["steps"]  # when the experts got their places
        if self.options.redundant_experts:
            self._replicate()
        self._ready()

    def _ready(self) -> None:
        """The weights as the programs take them.

        On a CPU the blocks are read one by one: a scan over stacked layers copies all their weights every step.
        """
        if jax.default_backend() == "cpu":
            self.weights = self.weights.replace(layers=jax.jit(unstack)(self.weights.model))
        self._flat = Flat(self.weights)

    def _replicate(self) -> None:
        n_layers, n_experts = self.load.shape
        n, n_devices = n_experts + self.options.redundant_experts, self.mesh.shape["expert"]
        if n % n_devices:
            raise ConfigError(
                f"redundant_experts={self.options.redundant_experts}: {n} places do not divide by expert={n_devices}; "
                f"the nearest is {n_devices - n_experts % n_devices}"
            )
        first = Placement(*np.broadcast_arrays(np.arange(n_experts), 0, 0))._replace(
            expert=np.tile(np.arange(n_experts), (n_layers, 1)),
            place=np.tile(np.arange(n_experts)[:, None], (n_layers, 1, 1)),
        )
        self._move(first, even_places(n_layers, n_experts, n, n_devices))

    def rebalance(self) -> None:
        """Gives the experts new places by the tokens that they got since they had their last ones. Between two steps:
        no request notices."""
        n_places, n_devices = self.placement.expert.shape[1], self.mesh.shape["expert"]
        load = self.load - self._load_then
        self._load_then, self._placed_at = self.load.copy(), self.counts["steps"]
        groups = self.cfg.n_group or 1
        nodes = self.compute.expert_groups
        hierarchical = n_devices % nodes == 0 and n_places % nodes == 0
        self._move(self.placement, place_experts(load, n_places, groups, nodes if hierarchical else 1, n_devices))
        self._ready()
        self.counts["rebalances"] += 1

    def _move(self, old: Placement, new: Placement) -> None:
        """The experts' weights from their old places to their new ones."""
        came_from = np.take_along_axis(old.place[:, :, 0], new.expert, axis=1).astype(np.int32)

        def leaf(path, w):
            name = weight_name(path)
            return rearrange(w, came_from) if name.startswith("moe/ffn/experts/") else w

        self.weights, self._flat = self.weights.replace(layers=None), None  # on a CPU the layers are copies
        model = jax.tree_util.tree_map_with_path(leaf, self.weights.model)
        most = self.options.redundant_experts + 1
        turns = np.arange(most) % new.count[:, :, None]
        wide = np.pad(new.place, ((0, 0), (0, 0), (0, max(0, most - new.place.shape[2]))))
        place = np.take_along_axis(wide, turns, axis=2)
        self.weights = self.weights.replace(
            model=model, replicas=Replicas(*(jax.device_put(a.astype(np.int32), jax.P()) for a in (place, new.count)))
        )
        self.placement = new

    # Requests

    def submit(self, request: Request) -> None:
        """Takes a request from any thread. Raises ConfigError for one that cannot be done."""
        request.check(self.cfg.vocab_size, self.longest)
        self._came.append(request)

    def cancel(self, id: int) -> None:
        """Ends a request, from any thread, before the next step."""
        self._came.append(id)

    @property
    def busy(self) -> bool:
        return bool(self._came or self.waiting or self.running)

    def warm(self, *, progress: bool = False) -> None:
        """Compiles every program of this engine, and times steps with drafts and without."""
        from tqdm import tqdm

        drafts = sorted({0, self.n_draft})
        steps = [(b, w, k) for b in self.row_sizes for w in self.page_sizes for k in drafts]
        chunks = [
            (b, t, w)
            for b in self.prefill_sizes
            for t in self.chunk_sizes
            for w in self.page_sizes
            if w * self.options.page_size >= t
        ]
        with tqdm(total=len(steps) + len(chunks), desc="compiling", disable=not progress, leave=False) as bar:
            for b, t, w in chunks:
                rows, none = self._idle_rows(b, w), np.zeros((self.n_shards * b, t), np.int32)
                nothing = np.zeros(self.n_shards * b, np.int32)
                self.pages, _ = programs.prefill(
                    self._flat, self.pages, rows.replace(tokens=none), none, nothing,
                    compute=self.compute, n_draft=self.n_draft, want_prompt=False,
                )  # fmt: skip
                bar.update()
            for b, w, k in steps:
                rows, n = self._idle_rows(b, w), self.n_shards * b
                tokens, drafted = np.zeros((n, 1 + k), np.int32), np.zeros(n, np.int32)
                for _ in range(4):
                    began = time.perf_counter()
                    self.pages, out = programs.step(
                        self._flat, self.pages, rows.replace(tokens=tokens), drafted, compute=self.compute, n_draft=k
                    )
                    jax.device_get(out)
                    self.pace.took(b, bool(k), time.perf_counter() - began, [])
                bar.update()

    def _idle_rows(self, b: int, width: int) -> Rows:
        rows = self._rows([[] for _ in range(self.n_shards)], b)
        return rows.replace(table=np.zeros((self.n_shards * b, width), np.int32))

    def run(self) -> None:
        """Steps until nothing is left."""
        while self.busy:
            self.step()

    def step(self) -> None:
        """Takes what came, admits what has room, reads a chunk of prompts, and takes all rows a step further."""
        self._take()
        self._admit()
        read = 0
        while read < self.options.prefill_chunk and (n := self._prefill()):  # short prompts do not wait for steps
            read += n
        self._decode()
        if self.placement is not None and self.counts["steps"] - self._placed_at >= self.options.rebalance_steps:
            self.rebalance()

    def _take(self) -> None:
        """What came since the last step."""
        while self._came:
            item = self._came.popleft()
            if isinstance(item, int):
                for request in [r for r in (*self.waiting, *self.running) if r.id == item]:
                    self._end(request, "cancelled")
                continue
            item.tokens = list(item.prompt)
            item.chunks = chunk_names(item.prompt, self.options.prefill_chunk)
            self.waiting.append(item)

    def _end(self, request: Request, reason: str) -> None:
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self.pools[request.shard].give_back(request.pages)
        request.pages, request.kept = [], None
        self.counts[f"ended_{reason.split(':')[0]}"] += 1
        done = request.done
        request.tell = request.done = _nothing  # both know the request: a cycle, which is seldom looked for
        done(reason)

    # Room

    def _admit(self) -> None:
        """Gives rows and pages to those that waited longest, as far as they go."""
        while self.waiting:
            request = self.waiting[0]
            rows = [sum(r.shard == s for r in self.running) for s in range(self.n_shards)]
            open_shards = [s for s in range(self.n_shards) if rows[s] < self.rows_a_shard]
            if request.kept is not None:
                open_shards = [s for s in open_shards if s == request.shard] or open_shards
            if not open_shards:
                return
            shard = max(open_shards, key=lambda s: (self.pools[s].n_free, -rows[s]))
            if not self._give_pages(request, shard):
                return
            self.waiting.popleft()
            self.running.append(request)

    def _give_pages(self, request: Request, shard: int) -> bool:
        pool = self.pools[shard]
        request.shard = shard
        if request.kept is not None:
            pages = pool.take(self._n_pages(request.length + 1 + 2 * self.n_draft))
            if pages is None:
                return False
            request.pages = pages
            self.pages = _put(self.pages, self._page_ids(pages[: request.kept_pages]), np.int32(shard), request.kept)
            request.kept = None
            return True
        chunks = [] if request.prompt_logprobs is not None else request.chunks
        shared = pool.share(chunks[: (len(request.tokens) - 1) // self.options.prefill_chunk])
        more = pool.take(self._n_pages(len(request.tokens) + 1 + 2 * self.n_draft) - len(shared))
        if more is None:
            pool.give_back(shared)
            return False
        request.pages = shared + more
        request.length = request.n_cached = len(shared) * self.options.page_size
        if request.keep_experts:
            shape = self.cfg.num_moe_layers, len(request.prompt), self.cfg.num_experts_per_tok
            request.prompt_experts = np.full(shape, -1, np.int32)
            self._know_experts(request, 0, request.length)
        request.prompt_said = []  # of a reading that was broken off
        return True

    def _share_more(self, request: Request) -> None:
        """Chunks of its prompt that became known since it was admitted: as when several samples of one begin."""
        chunk, size, start = self.options.prefill_chunk, self.options.page_size, request.length
        if start % chunk or request.prompt_logprobs is not None:
            return
        pool = self.pools[request.shard]
        shared = pool.share(request.chunks[start // chunk : (len(request.tokens) - 1) // chunk])
        own = slice(start // size, start // size + len(shared))
        pool.give_back(request.pages[own])
        request.pages[own] = shared
        request.length += len(shared) * size
        request.n_cached += len(shared) * size
        if request.keep_experts:
            self._know_experts(request, start, request.length)

    def _know_experts(self, request: Request, start: int, stop: int) -> None:
        """Those of shared chunks of its prompt, where a request that read them asked for them."""
        chunk = self.options.prefill_chunk
        for i in range(start // chunk, stop // chunk):
            if (known := self._experts_of.get(request.chunks[i])) is not None:
                request.prompt_experts[:, i * chunk : (i + 1) * chunk] = known

    def _n_pages(self, n_tokens: int) -> int:
        return -(-min(n_tokens, self.longest + 1) // self.options.page_size)

    def _page_ids(self, pages: list[int]) -> np.ndarray:
        """Filled up to a fixed size with the page that nobody reads."""
        size = next(n for n in self.page_sizes if n >= len(pages))
        return np.array([*pages, *[0] * (size - len(pages))], np.int32)

    def _grow(self, request: Request) -> None:
        """Pages for the next step, if need be those of younger requests, and its own if it is the youngest."""
        pool = self.pools[request.shard]
        while (lack := self._n_pages(request.length + 1 + 2 * self.n_draft) - len(request.pages)) > 0:
            if (pages := pool.take(lack)) is not None:
                request.pages += pages
                return
            youngest = max((r for r in self.running if r.shard == request.shard), key=lambda r: (r.arrived, r.id))
            self._preempt(youngest)
            if youngest is request:
                return

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.waiting.appendleft(request)
        self.counts["preemptions"] += 1
        if request.prefilled:
            used = request.pages[: self._n_pages(request.length)]
            kept = _fetch(self.pages, self._page_ids(used), np.int32(request.shard))
            request.kept, request.kept_pages = jax.device_get(kept), len(used)
        self.pools[request.shard].give_back(request.pages)
        request.pages = []

    # Steps

    def _prefill(self) -> int:
        """A chunk of each of the oldest prompts of each shard that are not read yet; the most tokens of one."""
        todo = [self._to_read(shard) for shard in range(self.n_shards)]
        most = max(map(len, todo))
        if not most:
            return 0
        b = next(n for n in self.prefill_sizes if n >= most)
        placed, chunk = _placed(todo, b), self.options.prefill_chunk
        spans = [(r.length, min(len(r.prompt), r.length - r.length % chunk + chunk)) for _, r in placed]
        t = next(n for n in self.chunk_sizes if n >= max(stop - start for start, stop in spans))
        # As many pages as the chunk's place asks for, whatever the prompt's length: what others may share is the same.
        reach = max(r.length - r.length % chunk + chunk for _, r in placed) + 2 * self.n_draft
        rows = self._rows(todo, b, self._n_pages(reach))
        tokens, following = np.zeros((2, self.n_shards * b, t), np.int32)
        n_new = np.zeros(self.n_shards * b, np.int32)
        for (i, request), (start, stop) in zip(placed, spans):
            tokens[i, : stop - start] = request.prompt[start:stop]
            behind = [*request.prompt[start + 1 : stop + 1]]
            following[i, : len(behind)] = behind
            following[i, len(behind) :] = -1
            n_new[i] = stop - start
        want = any(r.prompt_logprobs is not None for _, r in placed)
        began = time.perf_counter()
        self.pages, out = programs.prefill(
            self._flat,
            self.pages,
            rows.replace(tokens=tokens),
            following,
            n_new,
            compute=self.compute,
            n_draft=self.n_draft,
            want_prompt=want,
        )
        out = jax.device_get(out)
        self.counts["prefill_steps"] += 1
        self.counts["prefill_us"] += int(1e6 * (time.perf_counter() - began))
        for (i, request), span in zip(placed, spans):
            self._chunk_read(request, i, span, out, following[i])
        return int(n_new.max())

    def _to_read(self, shard: int) -> list[Request]:
        """The oldest requests of a shard whose prompts are not read, up to prefill_rows of all shards. One whose next
        chunk another of them reads waits for that: it will be shared."""
        chunk, chosen, reading = self.options.prefill_chunk, [], set()
        for request in self.running:
            if request.shard != shard or request.prefilled:
                continue
            self._share_more(request)
            shared = request.chunks[request.length // chunk : (len(request.tokens) - 1) // chunk][:1]
            if shared and shared[0] in reading and request.prompt_logprobs is None:
                continue
            reading.update(shared)
            chosen.append(request)
            if len(chosen) == self.prefill_sizes[-1]:
                break
        return chosen

    def _chunk_read(self, request: Request, i: int, span: tuple[int, int], out: Stepped, following) -> None:
        start, stop = span
        n = stop - start
        self._count_load(out.indices[:, i, :n])
        if request.prompt_logprobs is not None:
            request.prompt_said += [
                self._sampled(out, i, j, int(following[j]), request.prompt_logprobs)
                for j in range(n)
                if following[j] >= 0
            ]
        request.length = stop
        chunk, size = self.options.prefill_chunk, self.options.page_size
        if request.keep_experts:
            request.prompt_experts[:, start:stop] = out.indices[:, i, :n]
        if start % chunk == 0 and n == chunk:
            pages, name = request.pages[start // size : stop // size], request.chunks[start // chunk]
            self.pools[request.shard].remember(name, pages)
            if request.keep_experts:
                self._experts_of[name] = request.prompt_experts[:, start:stop].copy()
        if stop == len(request.prompt):
            self.counts["prompt_tokens"] += stop
            self.counts["cached_tokens"] += request.n_cached
            request.drafts = out.drafts[i].tolist()
            at = n - 1 if out.logprobs.chosen.shape[1] > 1 else 0
            experts = out.indices[:, i, n - 1].copy()  # a view would keep all of the step's
            self._emit(request, [self._sampled(out, i, at, int(out.tokens[i, 0]), request.logprobs, experts)])

    def _decode(self) -> None:
        for request in sorted(self.running, key=lambda r: (r.arrived, r.id)):
            if request in self.running and request.prefilled:
                self._grow(request)
        by_shard = [[r for r in self.running if r.shard == s and r.prefilled] for s in range(self.n_shards)]
        most = max(map(len, by_shard))
        if not most:
            return
        b = next(n for n in self.row_sizes if n >= most)
        drafting = self.n_draft > 0 if self.options.one_shape else self.pace.drafting(b)
        k = self.n_draft if drafting else 0
        rows = self._rows(by_shard, b)
        tokens = np.zeros((self.n_shards * b, 1 + k), np.int32)
        drafted = np.zeros(self.n_shards * b, np.int32)
        placed = _placed(by_shard, b)
        for i, request in placed:
            tokens[i, 0] = request.tokens[-1]
            if k and len(request.drafts) == k and not request.shaped and request.length + 1 + k <= self.longest:
                tokens[i, 1:], drafted[i] = request.drafts, k
        began = time.perf_counter()
        self.pages, out = programs.step(
            self._flat,
            self.pages,
            rows.replace(tokens=tokens),
            drafted,
            compute=self.compute,
            n_draft=k,
        )
        out = jax.device_get(out)
        seconds = time.perf_counter() - began
        self.counts["steps"] += 1
        self.counts["step_us"] += int(1e6 * seconds)
        counted = np.zeros(tokens.shape, bool)
        for i, _ in placed:
            counted[i, : 1 + out.accepted[i]] = True
        self._count_load(out.indices[:, counted])
        for i, request in placed:
            accepted = int(out.accepted[i])
            if drafted[i]:
                self.drafted_at[:k] += 1
                self.accepted_at[:accepted] += 1
                request.n_drafted += k
            request.length += accepted + 1
            request.drafts = out.drafts[i].tolist() if k else []
            said = []
            for j in range(accepted + 1):
                experts = out.indices[:, i, j].copy()
                one = self._sampled(out, i, j, int(out.tokens[i, j]), request.logprobs, experts, j < accepted)
                said.append(one)
            self._emit(request, said)
        taken = [1 + int(out.accepted[i]) for i, _ in placed if drafted[i]]
        self.pace.took(b, drafting, seconds, taken)

    def _emit(self, request: Request, said: list[Sampled]) -> None:
        """New tokens, up to the end of the text if they hold it."""
        reason, kept = None, []
        for one in said:
            kept.append(one)
            request.tokens.append(one.token)
            if request.grammar is not None:
                request.grammar.advance(one.token)
            ended = request.grammar is not None and request.grammar.ended
            if ended or (one.token in request.stop_ids and request.n_new > request.min_tokens):
                reason = "stop"
            elif request.n_new >= request.max_tokens:
                reason = "length"
            if reason:
                break
        self.counts["generated_tokens"] += len(kept)
        request.n_accepted += sum(one.drafted for one in kept)
        if request.tell(kept) and reason != "stop":
            reason = "stop"
        if reason:
            self._end(request, reason)

    # Arrays

    def _lay(self, a: np.ndarray) -> jax.Array:
        return jax.device_put(a, spec("batch", *(None,) * (a.ndim - 1)))

    def _rows(self, by_shard: list[list[Request]], b: int, n_pages: int | None = None) -> Rows:
        """All but the tokens, of b rows a shard, with as many pages as they have, or the first n_pages."""
        n = self.n_shards * b
        placed = _placed(by_shard, b)
        n_pages = n_pages or max((len(r.pages) for _, r in placed), default=0)
        width = next(w for w in self.page_sizes if w >= n_pages)
        table, length = np.zeros((n, width), np.int32), np.zeros(n, np.int32)
        floats = np.zeros((3, n), np.float32)
        floats[1] = 1
        top_k, seed = np.zeros(n, np.int32), np.zeros(n, np.uint32)
        want = False
        for i, r in placed:
            table[i, : len(r.pages)], length[i] = r.pages[:width], r.length
            floats[:, i] = r.temperature, r.top_p, r.min_p
            top_k[i], seed[i] = min(r.top_k, self.cfg.vocab_size), r.seed % (1 << 32)
            want |= r.logprobs is not None or r.prompt_logprobs is not None
        temperature, top_p, min_p = floats
        sampling = Sampling(temperature, top_k, top_p, min_p, seed)
        added, factor = self._shapes(placed, n)
        return Rows(None, table, length, sampling, added, factor, np.bool_(want))

    def _shapes(self, placed: Iterable[tuple[int, Request]], n: int) -> tuple[jax.Array, jax.Array]:
        """What is added to each row's logits, and what those of tokens that it has are divided by: [n, V]."""
        v = self.cfg.vocab_size
        if n not in self._even:
            self._even[n] = self._lay(np.zeros((n, v), np.float32)), self._lay(np.ones((n, v), np.float32))
        shaped = [(i, r) for i, r in placed if r.shaped]
        if not shaped:
            return self._even[n]
        added, factor = np.zeros((n, v), np.float32), np.ones((n, v), np.float32)
        for i, r in shaped:
            for token, bias in r.logit_bias.items():
                added[i, token] += bias
            if r.presence_penalty or r.frequency_penalty:
                new, times = np.unique(r.tokens[len(r.prompt) :], return_counts=True)
                added[i, new.astype(int)] -= r.presence_penalty + r.frequency_penalty * times
            if r.repetition_penalty != 1:
                factor[i, np.unique(r.tokens)] = r.repetition_penalty
            if r.n_new < r.min_tokens:
                added[i, list(r.stop_ids)] = -np.inf
            if r.grammar is not None and r.grammar.active:
                added[i, r.grammar.forbidden()] = -np.inf
        return self._lay(added), self._lay(factor)

    def _count_load(self, indices: np.ndarray) -> None:
        """indices: [expert layers, T, K] of tokens that count."""
        e = self.cfg.n_routed_experts
        flat = indices.reshape(len(indices), -1) + e * np.arange(len(indices))[:, None]
        self.load += np.bincount(flat.ravel(), minlength=self.load.size).reshape(self.load.shape)

    @staticmethod
    def _sampled(out: Stepped, i, j, token: int, n_top: int | None, experts=None, drafted=False) -> Sampled:
        if n_top is None:
            return Sampled(token, drafted=drafted, experts=experts)
        p = out.logprobs
        top = tuple(zip(p.top_ids[i, j, :n_top].tolist(), p.top[i, j, :n_top].tolist()))
        return Sampled(token, float(p.chosen[i, j]), top, drafted, experts)


class _Pace:
    """Whether drafts pay: tokens a step that they bring, against the time that a step with them takes more."""

    def __init__(self, n_draft: int):
        self.n_draft, self.n_steps, self.trying = n_draft, 0, 0
        self.tokens = 1.0 + n_draft  # a step and row, of late
        self._seconds: dict[tuple[int, bool], deque[float]] = {}  # of the last steps by rows, with drafts and without

    def drafting(self, rows: int) -> bool:
        """Whether the next step is to have drafts."""
        if not self.n_draft:
            return False
        self.n_steps += 1
        with_drafts, without = self.seconds(rows, True), self.seconds(rows, False)
        pays = with_drafts is None or without is None or self.tokens > with_drafts / without
        if self.n_steps % _TRY_EVERY == 0:
            self.trying = _TRY_FOR
        if self.trying:  # the other way, to know what it takes
            self.trying -= 1
            return without is not None and not pays
        return pays

    def seconds(self, rows: int, drafting: bool) -> float | None:
        """Of a step: the median of the last ones. The first one compiled, and does not count."""
        known = self._seconds.get((rows, drafting), ())
        return statistics.median(list(known)[1:]) if len(known) > 2 else None

    def took(self, rows: int, drafting: bool, seconds: float, tokens: list[int]) -> None:
        """tokens: that each row with drafts got."""
        known = self._seconds.setdefault((rows, drafting), deque(maxlen=16))
        known.append(seconds)
        if tokens:
            share = min(0.5, 0.02 * len(tokens))
            self.tokens += share * (sum(tokens) / len(tokens) - self.tokens)


def _nothing(_) -> None:
    pass


def _placed(by_shard: list[list[Request]], b: int) -> list[tuple[int, Request]]:
    """Each request with its row, of b a shard."""
    return [(s * b + i, request) for s, of_shard in enumerate(by_shard) for i, request in enumerate(of_shard)]


def _sizes(first: int, last: int) -> list[int]:
    """first, four times as much, and so on, and last."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 4
    return [*sizes, last]


_fetch = jax.jit(fetch)
_put = jax.jit(put, donate_argnums=0)
