"""The simulated world: production decisions in virtual time, with faults. Start at `world`."""
