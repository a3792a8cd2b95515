"""The vocabulary of kunserve: plain values, standard library only."""
