"""Keep the reference's errors of every pair that was trained on, for runs that meet it again.

The frozen reference is asked about a pair's noised images once for each (seed, epoch, position).
What it answers depends on nothing that a run trains, on no method, safeguard, rate or optimizer;
`key` says on what it does. `records` are the files, `errors` a run's view of them, `prepare` opens
them.
"""
