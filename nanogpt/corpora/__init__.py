"""Texts that lie on the disk as tokens: OpenWebText, and what `phi1.py prepare` writes."""
