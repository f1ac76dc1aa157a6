"""Fast replay: hits of one tier of equal blocks, by arrays."""
from __future__ import annotations
import numpy as np
from numba import njit
from tierkv.plan import groups
from tierkv.plan.groups import Request, RESIDENT

@njit(cache=True)
def replay_adaptive(cache, starts, chain, tokens, now_s, inp, out, stop, due, capacity, hits):
    blocks=cache.blocks
    for r in range(len(starts)-1):
        path=chain[starts[r]:starts[r+1]]
        L=0
        while L<len(path) and blocks[path[L]].resident: L+=1
        h=L*tokens
        if h>inp[r]: h=inp[r]
        hits[r]=h
        whole=min(len(path),inp[r]//tokens)
        groups.use(cache,path,whole,tokens,Request(now_s[r],out[r],stop[r],due[r]))
        groups.shrink(cache,capacity,now_s[r])
