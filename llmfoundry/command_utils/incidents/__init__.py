"""Cause, not stack trace: what a run leaves behind when it ends badly, and who says so.

Every rank keeps a *live record* (``record``: step, phase and progress in a file mapped into memory), so that what it was doing is known even after ``kill -9``. A thread in each rank
(``watchdog``) sees no progress, a signal, a launcher that is gone or a fault of another rank, and a second one (``courier``) tells the other nodes. Whoever ends leaves a *bundle* (``bundle``).
One process per node (``watcher``) outlives its ranks, completes the bundles of those that could not write one, and prints one summary (``summary``) of the cause that ``classify`` finds.
``guard`` ties this to the training command.

The launcher is Composer's or torch's and cannot be changed; it ends with the code of the first rank, by number, that failed. So ranks that end because another one failed take over the
code of that one (``faults``).
"""
