from __future__ import annotations
from crash_fuzz_inputs import Target

CLIENT_TARGETS: tuple[type[Target], ...] = ()
