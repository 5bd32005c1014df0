"""The embedded demo target, and the rule that holds prompts out of its training corpus."""
