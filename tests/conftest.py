"""What holds for every test process."""

import signal

# Started in the background of a script, a process ignores Ctrl-C, and a lost terminal if `nohup` starts it; so do its
# children. Ours are to be interrupted.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
