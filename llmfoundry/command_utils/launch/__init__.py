"""Starting a run elsewhere: one description of a job, rendered for a shell, Slurm, Kubernetes or SkyPilot.

``job`` describes and checks, ``render`` fills the templates of ``assets/launch`` (what a node runs is one of them, ``node.sh``, which all others contain), ``submit`` hands the result over.
"""
