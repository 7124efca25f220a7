"""Compile every pass and compare it with the uncompiled one; run by test_fusing in its own process."""

import time

import torch

from hub_magmax import fusing
from hub_magmax.fusing import FUSED_CHUNK_ELEMENTS, Fuser, run_pass
from hub_magmax.passes import Pass
from tests.test_fusing import RULES, arguments


def main() -> None:
    fusing.FUSE_ABOVE_ELEMENTS = 1
    for rule, (combine, selects) in RULES.items():
        step = Pass(combine, selects, torch.bfloat16)
        fuser = Fuser(1)
        first = arguments(rule, FUSED_CHUNK_ELEMENTS, torch.bfloat16)
        assert fuser.find(step, first) is None
        while (compiled := fuser.find(step, first)) is None and fuser.is_compiling:
            time.sleep(0.2)
        assert compiled is not None, f"{rule} was not compiled"
        assert Fuser(1).find(step, first) is not None, "the next merge does not find what this one compiled"
        for length in (FUSED_CHUNK_ELEMENTS, 1000, 1):
            given = arguments(rule, length, torch.bfloat16, seed=length)
            merged, counts, _ = run_pass(compiled, step, given)
            expected, expected_counts, _ = step(*given)
            assert merged.view(torch.int16).equal(expected.view(torch.int16)), rule
            assert counts.equal(expected_counts), rule
        print(f"{rule}: same bits")


if __name__ == "__main__":
    main()
