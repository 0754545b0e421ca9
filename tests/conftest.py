"""What holds for every test process."""

import os
import signal

import torch

# Started in the background of a script, a process ignores Ctrl-C, and a lost terminal if `nohup` starts it; so do its
# children. Ours are to be interrupted.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Triton reads it once, when anything first imports it: without a GPU kernels are interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
