"""The commands; each module has a `main(argv) -> exit code`."""

import os

# Before torch loads OpenMP: a thread that waits for another one sleeps instead of spinning. Where the cores are shared
# (decoding threads, another job) spinning made a step 5 times slower, measured; alone it makes no difference. Only
# commands set it: a library must not change the environment of whoever imports it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
