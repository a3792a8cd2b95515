"""Load generation against an OpenAI-compatible server: workloads, client, report."""
