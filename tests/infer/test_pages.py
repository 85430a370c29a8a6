"""The pool of pages: whatever requests come and go, no page has two owners, none is lost, what is shared is right."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.infer.pages import Pool, chunk_names

N_PAGES, PAGES_A_CHUNK, CHUNK = 14, 2, 4  # 2 tokens a page
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=16)
actions = st.lists(st.one_of(prompts, st.integers(0, 5)), max_size=60)


@given(actions)
@settings(max_examples=300, deadline=None)
def test_requests_that_come_and_go_lose_no_page_and_share_only_what_is_theirs(actions):
    pool, held, written = Pool(N_PAGES), [], {}  # written: what stands in each page
    for action in actions:
        if isinstance(action, int):
            if action < len(held):
                pool.give_back(held.pop(action)[1])
        else:
            names = chunk_names(action, CHUNK)
            pages = pool.share(names[: (len(action) - 1) // CHUNK])
            for n, page in enumerate(pages):
                assert written[page] == tuple(action[: 2 * (n + 1)])
            lack, before = -(-len(action) // 2) - len(pages), pool.n_free
            more = pool.take(lack)
            if more is None:
                assert lack > before == pool.n_free
                pool.give_back(pages)
                continue
            pages = pages + more
            for n, page in enumerate(pages):
                written[page] = tuple(action[: 2 * (n + 1)])
            for n, name in enumerate(names):
                pool.remember(name, pages[PAGES_A_CHUNK * n : PAGES_A_CHUNK * (n + 1)])
            held.append((action, pages))
        for prompt, pages in held:  # nobody else wrote there
            assert [written[page] for page in pages] == [tuple(prompt[: 2 * (n + 1)]) for n in range(len(pages))]
        assert pool.n_held == len({page for _, pages in held for page in pages})
        assert pool.n_held + pool.n_free == N_PAGES - 1 and 0 <= pool.n_idle <= pool.n_free
    for _, pages in held:
        pool.give_back(pages)
    assert pool.n_free == N_PAGES - 1 and pool.n_held == 0
    assert sorted(pool.take(N_PAGES - 1)) == list(range(1, N_PAGES))


def test_what_was_used_longest_ago_is_given_away_first_and_a_prompts_end_before_its_beginning():
    pool = Pool(7)
    first, second = chunk_names([1] * 8, CHUNK), chunk_names([2] * 4, CHUNK)
    for names in (first, second):
        pages = pool.take(2 * len(names))
        for n, name in enumerate(names):
            pool.remember(name, pages[2 * n : 2 * n + 2])
        pool.give_back(pages)
    pool.take(2)
    assert len(pool.share(first)) == 2  # its second chunk is gone
    assert len(pool.share(second)) == 2


def test_a_chunks_name_is_of_all_tokens_up_to_its_end():
    a, b = chunk_names([1, 2, 3, 4, 5, 6, 7, 8, 9], 4), chunk_names([0, 2, 3, 4, 5, 6, 7, 8], 4)
    assert len(a) == len(b) == 2 and not set(a) & set(b)
    assert a == chunk_names(np.array([1, 2, 3, 4, 5, 6, 7, 8], np.int64), 4)
    assert chunk_names([1, 2, 3], 4) == []
