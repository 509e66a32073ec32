"""What the process has imported by now is left alone by the garbage collector, here and in what is forked from here.

Imported last by the process that the others are forked from, as Python's documentation of `gc.freeze` has it: the
collector writes to each object that it looks at, and the first passes of a forked process would copy all that was
imported, page by page, 50 ms that no store has to do with.
"""

import gc

gc.collect()
gc.freeze()
