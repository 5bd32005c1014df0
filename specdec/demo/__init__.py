"""The embedded demo target and what is shown with it."""
