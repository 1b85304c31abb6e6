"""The fault campaign: real faults at random moments of real runs, and what became of each. ``python -m tests.faults`` runs it; see docs/endurance.md."""
