"""The version of kunserve, in one place."""

VERSION = "0.3.0"
