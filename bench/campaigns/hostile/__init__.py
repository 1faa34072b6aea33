"""Hostile requests and adapters: a seeded grammar, how they are sent, and what answers are right."""
