"""Keys that come one by one, in any order, give the choice that all of them at once give, ties included."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from ds_agsel.policies.sampling import RunningTopK, top_k

# Few values, so that ties are the rule, and a block without a gradient (0) and one that overflowed among them.
KEYS = st.lists(st.sampled_from([0.0, 1.0, 1.0 + 2**-52, 2.0, math.inf]), min_size=1, max_size=9)


@given(keys=KEYS, k=st.integers(1, 9), data=st.data())
def test_the_best_so_far_are_the_best_of_all(keys, k, data):
    order = data.draw(st.permutations(range(len(keys))))
    running = RunningTopK(k)
    kept: set[int] = set()
    for index in order:
        kept.add(index)
        out = running.add(index, keys[index])
        assert (out is None) == (len(kept) <= k)
        if out is not None:
            kept.remove(out)
        seen = [i for i in range(len(keys)) if i in kept or i == out]
        assert kept == {seen[i] for i in top_k([keys[i] for i in seen], min(k, len(seen)))}
    assert tuple(sorted(kept)) == top_k(keys, min(k, len(keys)))
