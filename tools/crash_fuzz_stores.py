from __future__ import annotations

from crash_fuzz_inputs import Target

STORE_TARGETS: tuple[type[Target], ...] = ()
