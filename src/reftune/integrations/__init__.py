"""Doors into other people's tools: axolotl and llm find these by entry points."""
