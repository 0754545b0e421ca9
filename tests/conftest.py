"""What holds for every test process."""

import signal

# Started in the background of a script, a process ignores Ctrl-C, and so do its children. Ours are to be interrupted.
signal.signal(signal.SIGINT, signal.default_int_handler)
