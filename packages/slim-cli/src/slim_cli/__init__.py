"""The slim command."""
