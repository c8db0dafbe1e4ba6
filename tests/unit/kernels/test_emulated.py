"""scripts/every_isa.py runs the kernels where the processor lacks their instructions, by tests/emulated/immintrin.h."""

import re
from pathlib import Path

from gemmakit import native

EMULATED = Path(__file__).parents[2] / "emulated/immintrin.h"


def test_what_the_kernels_ask_of_newer_processors_is_emulated_and_no_more():
    newer = r"_mm512_\w+|_mm256_\w+_avx_\w+|_tile_\w+"
    kernels = [*Path(native.__file__).parent.glob("*.h"), *Path(native.__file__).parent.glob("*.cpp")]
    used = {name for file in kernels for name in re.findall(newer, file.read_text(encoding="utf-8"))}
    defined = re.findall(rf"^#define ({newer})", EMULATED.read_text(encoding="utf-8"), re.M)
    assert used and sorted(used) == sorted(defined)
